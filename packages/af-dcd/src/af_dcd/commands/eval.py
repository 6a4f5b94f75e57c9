"""The ``eval`` command: mmseg's own test loop on a plain or distilled checkpoint."""

from pathlib import Path

from af_dcd.commands.train import LIBRARIES
from af_dcd.config import EvalConfig
from effml_common.device import resolve_device
from effml_common.folders import run_folder
from effml_common.report import Report, ReportBuilder, Row


def evaluate(config: EvalConfig) -> Report:
    """Measure a checkpoint on the test data of its config.

    Raises:
        InputError: If config, checkpoint and data do not fit together.
    """
    # A missing device is refused before mmsegmentation is imported, which takes seconds.
    builder = ReportBuilder("af-dcd", LIBRARIES)
    device = resolve_device(config.device)
    from af_dcd.adapters.mmseg.evaluation import run_test_loop

    run_dir = run_folder(config.out, "eval") / "run"
    metrics = run_test_loop(config, run_dir, device)
    row = Row(Path(config.checkpoint).name, config.model, {k: [v] for k, v in metrics.items()})
    return builder.write(run_dir, [row], device=device)
