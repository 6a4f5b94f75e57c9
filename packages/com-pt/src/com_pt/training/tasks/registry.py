"""Tasks by name: the built-in ones, and those of the user's own modules."""

import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from com_pt.training.tasks.base import Task
from effml_common.errors import ConfigError
from effml_common.parsing import did_you_mean, one_line

BUILT_IN = {
    "clip": "com_pt.training.tasks.clip:ClipTask",
    "classify": "com_pt.training.tasks.classify:ClassifyTask",
    "causal-lm": "com_pt.training.tasks.causal_lm:CausalLMTask",
}


def open_task(name: str, data: Mapping[str, Any]) -> Task:
    """Make the task of a chain with its data settings; data are read when they are needed.

    Args:
        name: Short name, or ``module:Class``.
        data: The ``data`` section of the chain file.

    Raises:
        ConfigError: If there is no such task, or a data setting is wrong.
    """
    return task_class(name)(data)


def task_class(name: str) -> type[Task]:
    """Return the class of a task by its short name or ``module:Class``.

    Raises:
        ConfigError: If it cannot be found.
    """
    # A short name stands for an address of this package.
    address = BUILT_IN.get(name, name)
    module, colon, attribute = address.partition(":")
    if not colon:
        hint = did_you_mean(name, list(BUILT_IN), f"use {', '.join(BUILT_IN)} or module:Class")
        raise ConfigError(f"there is no task {name}; {hint}")

    # A module of the user's may stand in the working folder.
    try:
        if name not in BUILT_IN and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        task = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"task {name} cannot be imported: {one_line(str(error))}; check module:Class"
        ) from error

    # It must be a complete task.
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise ConfigError(f"{name} is no Task; derive it from com_pt.Task")
    if inspect.isabstract(task):
        missing = ", ".join(sorted(task.__abstractmethods__))
        raise ConfigError(f"task {name} lacks {missing}; define them in {attribute}")
    return task
