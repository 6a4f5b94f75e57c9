"""Names of models: directories, or ids of the Hugging Face hub such as ``org/name``."""

import re
from pathlib import Path

from effml_common.errors import InputError
from effml_common.logging import say
from sliderquant.adapters.files import COMPANION_FILES, quiet_transformers
from sliderquant.adapters.reasons import reason_of
from sliderquant.adapters.weights import weight_files

MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Safetensors, configs, the tokenizer, and code for models that bring their own.
NEEDED_FILES = ("*.safetensors", "*.json", "*.py", *COMPANION_FILES)
CONFIG_FILES = ("*.json", "*.py")


def model_directory(name: str | Path, *, weights: bool = True) -> Path:
    """Return the directory of a model; one that exists wins over an id of the same name.

    An id is looked up in the local cache of the hub, then fetched, unless HF_HUB_OFFLINE is set.

    Args:
        name: A path, where ``~`` stands for the home directory, or an id such as ``org/name``.
        weights: Whether the weights are needed; else configs suffice.

    Raises:
        InputError: If the name is neither, or the model can neither be found nor be fetched.
    """
    # A path; its readers say what is wrong with it.
    path = Path(name).expanduser()
    if path.exists() or not MODEL_ID.fullmatch(str(name)):
        return path

    # What is in the cache already, if all of it is.
    cached = _snapshot(str(name), weights, local=True)
    if isinstance(cached, Path) and _is_complete(cached, weights):
        return cached

    # Beside other local models it is a path that was mistyped, which no hub knows.
    if path.parent.is_dir():
        raise InputError(
            f"model directory {name} does not exist, and no id of the hub is fetched where a folder "
            f"{path.parent} is; check the name, or fetch the model first with: hf download {name}"
        )

    # Processes that fetch the same file wait for each other there.
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        say(f"fetching {name} from the Hugging Face hub")
        fetched = _snapshot(str(name), weights, local=False)
        if isinstance(fetched, Path):
            return fetched
        reason = reason_of(fetched)
    elif isinstance(cached, Path):
        return cached
    else:
        reason = "HF_HUB_OFFLINE is set"
    raise InputError(
        f"model directory {name} does not exist, the Hugging Face cache has no model of that name, and "
        f"it cannot be fetched ({reason}); give a local directory, or an id such as org/name"
    )


def model_name(name: str) -> str:
    """Return how reports and cards call a model: its id, or the last part of its path."""
    path = Path(name).expanduser()
    is_id = not path.exists() and MODEL_ID.fullmatch(name)
    return name if is_id else path.resolve().name


def _snapshot(name: str, weights: bool, *, local: bool) -> Path | Exception:
    """Return the folder of a model in the cache, or why there is none."""
    from huggingface_hub import snapshot_download

    try:
        with quiet_transformers():
            patterns = list(NEEDED_FILES if weights else CONFIG_FILES)
            return Path(snapshot_download(name, local_files_only=local, allow_patterns=patterns))
    except Exception as error:  # of the network, of the hub, of the disk
        return error


def _is_complete(directory: Path, weights: bool) -> bool:
    """Whether config and weights are there: the cache may hold some files of a model only."""
    try:
        found = (directory / "config.json").is_file()
        return found and (not weights or bool(weight_files(directory)))
    except InputError:
        return False
