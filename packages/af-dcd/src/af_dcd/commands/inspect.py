"""The ``inspect`` command: what a pair is and what a step of it costs."""

from pathlib import Path

from af_dcd.config import InspectConfig, TrainConfig
from effml_common.report import Summary

SHOWN_IN_MILLIONS_FROM = 10_000


def inspect(config: InspectConfig) -> Summary:
    """Tell shapes, weights, memory and cost of a pair; nothing is computed and no weight is read.

    Raises:
        InputError: If the pair does not fit, as ``train`` would say.
    """
    from af_dcd.adapters.mmseg.config_builder import build_config
    from af_dcd.adapters.mmseg.summary import summarize_pair

    # The run that train would begin, with a teacher that needs no weights.
    settings = TrainConfig(
        student=config.student,
        teacher=config.teacher,
        preset=config.preset,
        student_tap=config.student_tap,
        teacher_tap=config.teacher_tap,
        method=config.method,
        allow_untrained_teacher=True,
    )
    values = summarize_pair(build_config(settings, Path("runs") / "inspect"))

    # Counts of weights and bytes are easier to read in millions.
    millions = {
        name: f"{value / 1e6:,.2f}M"
        for name, value in values.items()
        if isinstance(value, int) and value > SHOWN_IN_MILLIONS_FROM
    }
    return Summary(values, shown=millions)
