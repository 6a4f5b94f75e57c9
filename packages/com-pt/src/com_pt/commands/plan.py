"""``com-pt plan``: what a chain would cost beside training every member alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from com_pt.config import PlanConfig
from com_pt.method.cost import ChainCost
from com_pt.method_config import ChainConfig
from com_pt.training.chain import load_chain
from com_pt.training.plan import plan_chain


@dataclass(frozen=True)
class PlanTable:
    """The cost of a chain, as a table with a row for each stage or as JSON.

    Attributes:
        cost: What the chain costs.
        accounting: How a training sample is counted.
        published_ratio: What the authors state for this chain; None if they state nothing.
    """

    cost: ChainCost
    accounting: str
    published_ratio: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the cost as plain data."""
        return {
            **self.cost.to_json(),
            "accounting": self.accounting,
            "published_ratio": self.published_ratio,
        }

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.table import Table

        # One row for each stage, in the chain's order.
        cost = self.cost
        table = Table("stage", "epochs", "forward GMAC", "training GMAC a sample", "of the chain")
        for stage in cost.stages:
            share = stage.per_sample * stage.epochs / cost.chain
            table.add_row(
                stage.name,
                f"{stage.epochs:g}",
                f"{stage.forward / 1e9:.4g}",
                f"{stage.per_sample / 1e9:.4g}",
                f"{share:.1%}",
            )
        yield table

        # The chain as a whole.
        yield (
            f"family: every member alone for {cost.individual_epochs:g} epochs costs "
            f"{cost.ratio:.2f} times as much"
        )
        yield f"largest member: {100 * cost.share_of_largest:.1f} % of training it alone"

        # How it was counted, beside what the authors state.
        if self.published_ratio is None:
            yield f"counted as {self.accounting}"
        else:
            yield (
                f"published: {self.published_ratio:.2f}x for {len(cost.stages)} members (the paper's "
                f"abstract); here {cost.ratio:.2f}x, counted as {self.accounting}"
            )


def plan(config: PlanConfig) -> PlanTable:
    """Compute what a chain costs."""
    chain = load_chain(config.chain)
    return PlanTable(plan_chain(chain), describe_accounting(chain), chain.published_ratio)


def describe_accounting(chain: ChainConfig) -> str:
    """Say what is counted for a sample of a chain, and what a forward pass is."""
    accounting = "3 forward passes of the member and, with a feature loss, 1 of its predecessor"
    if chain.task == "clip":
        captions = int(chain.data.get("captions", 1))
        texts = f"{captions} captions" if captions > 1 else "1 caption"
        return f"{accounting}; a forward pass is 1 image and {texts}"
    return accounting
