"""The ``eval`` command, and the accuracy that ``train`` ends with."""

import sys
import time
from importlib.metadata import version

from effml_common.device import resolve_device
from effml_common.report import Report, Row, environment
from scalekd.config import EvalConfig
from scalekd.training.evaluation import accuracy_of
from scalekd.training.runs import load_run


def evaluate(config: EvalConfig) -> Report:
    """Accuracy of a trained student.

    Raises:
        InputError: If the device is not there, or the run or the images cannot be read.
    """
    started = time.monotonic()
    device = resolve_device(config.device)
    student, settings, which = load_run(config.checkpoint, config.use_ema)
    score = accuracy_of(
        student, config, settings.img_size, config.val_split, device, config.batch_size
    )
    return Report(
        package="scalekd",
        version=version("scalekd"),
        command=sys.argv,
        seeds=[settings.seed],
        seconds=time.monotonic() - started,
        rows=[Row(settings.student, which, {name: [value] for name, value in score.items()})],
        environment=environment(("timm",), str(device)),
    )
