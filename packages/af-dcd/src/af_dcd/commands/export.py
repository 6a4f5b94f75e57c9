"""The ``export`` command: the plain student of a run, also of one that is not finished."""

from pathlib import Path

from af_dcd.commands.inspect import Facts
from af_dcd.config import ExportConfig
from effml_common import checkpoint
from effml_common.errors import CheckpointError, InputError
from effml_common.files import atomic_write


def export(config: ExportConfig) -> Facts:
    """Write ``to`` and the config beside it.

    Raises:
        InputError: If there is no run, no usable checkpoint, or the file exists.
    """
    run, target = Path(config.run_folder) / "run", Path(config.to)
    if target.exists():
        raise InputError(f"{target} exists; choose another name")
    if not (run / "student.py").is_file():
        raise InputError(f"{config.run_folder} is no run of af-dcd train; give its --out folder")
    found = checkpoint.latest(run / "checkpoints")
    if found is None:
        raise CheckpointError(f"{run} has no usable checkpoint; train it on")
    from af_dcd.adapters.mmseg.runner import metainfo_of, write_student

    weights = {
        name.partition("/")[2]: value
        for name, value in found.tensors.items()
        if name.startswith("state_dict/")
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    text = (run / "student.py").read_text(encoding="utf-8")
    write_student(weights, metainfo_of(run / "student.py"), target)
    atomic_write(target.with_suffix(".py"), text)
    return Facts(
        {"weights": str(target), "config": str(target.with_suffix(".py")), "iteration": found.step}
    )
