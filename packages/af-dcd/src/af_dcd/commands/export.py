"""The ``export`` command: the plain student of a run, also of one that is not finished."""

from pathlib import Path

from af_dcd.config import ExportConfig
from effml_common import checkpoint
from effml_common.errors import CheckpointError, InputError
from effml_common.files import atomic_write
from effml_common.report import Summary


def export(config: ExportConfig) -> Summary:
    """Write ``to`` and the config beside it.

    Raises:
        InputError: If there is no run, no usable checkpoint, or the file exists.
    """
    # The run, and its latest checkpoint.
    run, target = Path(config.run_folder) / "run", Path(config.to)
    if target.exists():
        raise InputError(f"{target} exists; choose another name")
    if not (run / "student.py").is_file():
        raise InputError(f"{config.run_folder} is no run of af-dcd train; give its --out folder")
    saved = checkpoint.latest(run / "checkpoints")
    if saved is None:
        raise CheckpointError(f"{run} has no usable checkpoint; train it on")

    # A checkpoint may hold averaged weights as well; what mmseg loads is under "state_dict/".
    from af_dcd.adapters.mmseg.config_files import dataset_metainfo
    from af_dcd.adapters.mmseg.student_file import write_student

    weights = {
        address.removeprefix("state_dict/"): value
        for address, value in saved.tensors.items()
        if address.startswith("state_dict/")
    }

    # The student's weights, and its config beside them.
    target.parent.mkdir(parents=True, exist_ok=True)
    text = (run / "student.py").read_text(encoding="utf-8")
    write_student(weights, dataset_metainfo(run / "student.py"), target)
    config_file = target.with_suffix(".py")
    atomic_write(config_file, text)
    return Summary({"weights": str(target), "config": str(config_file), "iteration": saved.step})
