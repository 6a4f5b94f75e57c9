"""The ``train`` command: a mmsegmentation pair through mmengine's Runner."""

from af_dcd.commands._resume import check_folder
from af_dcd.config import TrainConfig
from effml_common.device import resolve_device
from effml_common.files import atomic_write
from effml_common.folders import run_folder
from effml_common.logging import rank, say
from effml_common.parsing import dump_config
from effml_common.report import Report, ReportBuilder, Row

LIBRARIES = ("mmsegmentation", "mmengine", "mmcv-lite", "mmcv")  # named in reports


def train(config: TrainConfig) -> Report:
    """Distil, and write the plain student.

    Raises:
        InputError: If configs, weights or data do not fit together.
        NonFiniteError: If a loss or a gradient becomes NaN or infinite.
        Interrupted: If a signal stopped it; everything is saved.
    """
    # A missing device is refused before mmsegmentation is imported, which takes seconds.
    builder = ReportBuilder("af-dcd", LIBRARIES)
    device = resolve_device(config.device)
    from af_dcd.adapters.mmseg.config_builder import plan_training
    from af_dcd.adapters.mmseg.runner import prepare_run, run_training
    from af_dcd.adapters.mmseg.student_file import write_student
    from af_dcd.adapters.mmseg.summary import dry_run

    # Plan: read both configs and join them. Nothing is written yet.
    out = run_folder(config.out, "train")
    plan = plan_training(config, out / "run", device)
    if config.dry_run:
        return builder.build(dry_run(plan.config, device), seeds=[config.seed], device=device)

    # Prepare: models, data and optimizer, and what a later resume compares with.
    check_folder(out, config)
    runner = prepare_run(plan, out, config.student_init)
    if rank() == 0:
        atomic_write(out / "run" / "config.yaml", dump_config(config))
        atomic_write(out / "run" / "student.py", plan.student_text)

    # Run: the loop is training_loop.AfDCDTrainLoop, which saves and obeys stop signals.
    say(plan.estimate)
    trained = run_training(runner, device)

    # Write the student as mmseg loads it, and the report.
    write_student(trained.weights, trained.metainfo, out / "student.pth")
    if rank() == 0:
        atomic_write(out / "student.py", plan.student_text)
    metrics = {name: [value] for name, value in trained.metrics.items()}
    metrics["iterations"] = [float(trained.iterations)]
    return builder.write(
        out / "run",
        [Row("student", f"seed {config.seed}", metrics)],
        seeds=[config.seed],
        notes=trained.notes,
        files=["student.pth", "student.py"],
        device=device,
    )
