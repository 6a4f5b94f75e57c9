"""The ``inspect`` command."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from af_dcd.config import InspectConfig, TrainConfig


@dataclass(frozen=True)
class Facts:
    """Named facts, as a table or as JSON."""

    facts: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The facts."""
        return self.facts

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table("", "", show_header=False)
        for name, value in self.facts.items():
            big = isinstance(value, int) and value > 10_000
            table.add_row(name, f"{value / 1e6:,.2f}M" if big else str(value))
        return table


def inspect(config: InspectConfig) -> Facts:
    """Shapes, weights, memory and cost of a pair; nothing is computed and no weight is read.

    Raises:
        InputError: If the pair does not fit, as ``train`` would say.
    """
    from af_dcd.adapters.mmseg.config_builder import compose
    from af_dcd.adapters.mmseg.summary import describe

    asked = TrainConfig(
        student=config.student,
        teacher=config.teacher,
        preset=config.preset,
        student_tap=config.student_tap,
        teacher_tap=config.teacher_tap,
        method=config.method,
        allow_untrained_teacher=True,
    )
    return Facts(describe(compose(asked, Path("runs") / "inspect")))
