"""Data sets of the datasets library as records: from its cache, the hub, or a folder on disk.

A name is ``hf:NAME[/CONFIG][:SPLIT]``, where NAME may have an owner in front, as on the hub:
``hf:wikitext/wikitext-2-raw-v1:train``, ``hf:Salesforce/wikitext/wikitext-2-raw-v1:test``. The split is
``train`` if none is given, and may be a slice, such as ``train[:1000]``.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from effml_common.errors import InputError
from effml_common.logging import say
from sliderquant.adapters.reasons import reason_of

PREFIX = "hf:"
DEFAULT_SPLIT = "train"
COLUMNS = ("text", "messages")


def read_named(name: str) -> Sequence[Mapping[str, Any]]:
    """Return the records of a data set that the datasets library knows by name.

    Args:
        name: ``hf:NAME[/CONFIG][:SPLIT]``.

    Raises:
        InputError: If the library or the data set is not there, or has no ``text`` or ``messages``.
    """
    # What may be meant: with one slash the first part is an owner, or the second one a config.
    repository, _, split = name.removeprefix(PREFIX).partition(":")
    parts = repository.split("/")
    if len(parts) > 3 or not all(parts):
        raise InputError(f"{name} is no name of a data set; write {PREFIX}NAME/CONFIG:SPLIT")
    if (Path(repository) / "state.json").is_file():
        raise InputError(f"{repository} is a folder that save_to_disk wrote; leave out {PREFIX}")
    meanings: list[tuple[str, str | None]] = [
        ("/".join(parts[:2]), parts[2] if parts[2:] else None)
    ]
    if len(parts) == 2:
        meanings.append((parts[0], parts[1]))

    # What is not there under the first meaning may be there under the second.
    datasets = _library(name)
    say(f"reading {name} with the datasets library")
    absent: list[Exception] = []
    for path, config in meanings:
        try:
            with _quiet(datasets):
                data = datasets.load_dataset(path, config, split=split or DEFAULT_SPLIT)
            return _records(data, name)
        except (InputError, MemoryError):
            raise
        except (ConnectionError, FileNotFoundError) as error:
            absent.append(error)
        except Exception as error:  # loaders of many formats raise anything
            raise _unreadable(name, error, "check name, config and split") from error
    remedy = "check the name, or load it once where there is a network"
    raise _unreadable(name, absent[0], remedy) from absent[0]


def read_saved(folder: Path) -> Sequence[Mapping[str, Any]]:
    """Return the records of a folder that ``Dataset.save_to_disk`` wrote.

    Raises:
        InputError: If it is another folder, or damaged.
    """
    # A folder of splits has such a folder for each.
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        raise InputError(
            f"{folder} holds the splits {', '.join(splits) or 'none'}; give the folder of one of them"
        )
    if not (folder / "state.json").is_file():
        raise InputError(f"{folder} is a folder; give files, or a folder that save_to_disk wrote")

    datasets = _library(str(folder))
    try:
        with _quiet(datasets):
            data = datasets.load_from_disk(str(folder))
        return _records(data, str(folder))
    except (InputError, MemoryError):
        raise
    except Exception as error:  # as above
        raise _unreadable(str(folder), error, "save it again with save_to_disk") from error


def _records(data: Any, name: str) -> Sequence[Mapping[str, Any]]:
    """Return the rows of a data set with the column that is read; nothing else is decoded."""
    column = next((column for column in COLUMNS if column in data.column_names), None)
    if column is None:
        raise InputError(
            f"{name} has the columns {', '.join(data.column_names)}; give one with 'text' or 'messages'"
        )
    return data.select_columns([column]).to_list()


def _library(name: str) -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{name} needs the datasets library; pip install 'sliderquant[eval]'"
        ) from None
    return datasets


@contextmanager
def _quiet(datasets: ModuleType) -> Iterator[None]:
    """Silence the library's bars, and its and the hub client's advice, for the duration."""
    from huggingface_hub.utils import logging as hub_logging

    loggers = (datasets.utils.logging, hub_logging)
    levels, bars = (
        [logger.get_verbosity() for logger in loggers],
        datasets.is_progress_bar_enabled(),
    )
    for logger in loggers:
        logger.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _unreadable(name: str, error: Exception, remedy: str) -> InputError:
    """Return the error that says in one line why a data set cannot be read."""
    return InputError(f"{name} cannot be read ({reason_of(error)}); {remedy}")
