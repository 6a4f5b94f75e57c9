"""The ``eval`` command: mmseg's own test loop on a plain or distilled checkpoint."""

import sys
import time
from importlib.metadata import version
from pathlib import Path

from af_dcd.commands.train import LIBRARIES
from af_dcd.config import EvalConfig
from effml_common.device import device_name, resolve_device
from effml_common.report import Report, Row, environment, write_report


def evaluate(config: EvalConfig) -> Report:
    """Measure a checkpoint on the test data of its config.

    Raises:
        InputError: If config, checkpoint and data do not fit together.
    """
    began = time.monotonic()
    device = resolve_device(config.device)
    from af_dcd.adapters.mmseg.evaluation import test

    out = Path(config.out or time.strftime("runs/eval-%Y%m%d-%H%M%S"))
    metrics = test(config, out / "run", device)
    report = Report(
        package="af-dcd",
        version=version("af-dcd"),
        command=sys.argv,
        seeds=[],
        seconds=time.monotonic() - began,
        rows=[
            Row(Path(config.checkpoint).name, config.model, {k: [v] for k, v in metrics.items()})
        ],
        environment=environment(LIBRARIES, device_name(device)),
    )
    (out / "run").mkdir(parents=True, exist_ok=True)
    write_report(report, out / "run")
    return report
