"""The best model of a stage so far, as its library loads it."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from com_pt.training.tasks.base import Task
from effml_common.errors import ConfigError

RECORD = "best.json"


class BestModel:
    """Keeps the weights of the best evaluation of a stage, with its step and value.

    Args:
        task: Its headline metric decides.
        spec: Settings of the model, for saving and loading.
        folder: Where it is kept; ``best.json`` in it names step and metrics.
    """

    def __init__(self, task: Task, spec: Any, folder: Path) -> None:
        self.task, self.spec, self.folder = task, spec, folder
        self._new, self._old = (folder.with_name(f".tmp-best-{name}") for name in ("new", "old"))

    def read(self) -> dict[str, Any] | None:
        """Return step, metric, value and all metrics of the best model; None before there is one."""
        path = self.folder / RECORD
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def offer(self, model: nn.Module, step: int, metrics: Mapping[str, float]) -> None:
        """Keep a model if it is better than the best so far; of equals the earlier one stays."""
        # A kill between two renames has left the old one under another name.
        if not self.folder.exists() and self._old.exists():
            self._old.rename(self.folder)
        name = self.task.headline
        best = self.read()
        if name not in metrics or (best and not self._is_better(metrics[name], best["value"])):
            return

        # The record lies with the weights, so that both change at once.
        shutil.rmtree(self._new, ignore_errors=True)
        self.task.save(model, self.spec, self._new)
        record = {"step": step, "metric": name, "value": metrics[name], "metrics": dict(metrics)}
        (self._new / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if self.folder.exists():
            shutil.rmtree(self._old, ignore_errors=True)
            self.folder.rename(self._old)
        self._new.rename(self.folder)
        shutil.rmtree(self._old, ignore_errors=True)

    def discard(self) -> None:
        """Remove what a run left that begins again: its settings may have been others."""
        for folder in (self.folder, self._old, self._new):
            shutil.rmtree(folder, ignore_errors=True)

    def load(self) -> tuple[nn.Module, dict[str, float]]:
        """Return the best model and its metrics.

        Raises:
            ConfigError: If no evaluation had the task's headline metric.
        """
        best = self.read()
        if best is None:
            raise ConfigError(
                f"keep is best, and no evaluation measured {self.task.headline or 'a metric'}; give "
                "held-out data for it, or set keep: last"
            )
        return self.task.load(self.folder, self.spec), best["metrics"]

    def _is_better(self, value: float, best: float) -> bool:
        # Comparisons with NaN are false, so a NaN that came first would stay the best.
        if math.isnan(value) or math.isnan(best):
            return not math.isnan(value)
        return value > best if self.task.headline_is_better == "higher" else value < best
