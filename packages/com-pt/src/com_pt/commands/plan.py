"""``com-pt plan``: what a chain would cost beside training every member alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from com_pt.config import PlanConfig
from com_pt.method.cost import ChainCost
from com_pt.training.chain import load_chain
from com_pt.training.plan import plan_chain


@dataclass(frozen=True)
class PlanTable:
    """The cost of a chain, as a table with a row for each stage or as JSON."""

    cost: ChainCost

    def to_json(self) -> dict[str, Any]:
        """Return the cost as plain data."""
        return self.cost.to_json()

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


def plan(config: PlanConfig) -> PlanTable:
    """Compute what a chain costs."""
    return PlanTable(plan_chain(load_chain(config.chain)))
