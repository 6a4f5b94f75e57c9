"""Af-DCD for any pair of ``nn.Module`` segmenters: torchvision, transformers, your own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from af_dcd.config import DistillConfig
from af_dcd.method.distillation import AfDCDLoss, check_fit, kd_term
from af_dcd.method.taps import Tap, as_map, find_module, recording
from effml_common.errors import InputError, NonFiniteError


@dataclass(frozen=True)
class Distilled:
    """What one call gives.

    Attributes:
        output: Of the student, as it returned it.
        losses: Weighted terms; add them to the task loss.
    """

    output: Any
    losses: dict[str, Tensor]

    @property
    def total(self) -> Tensor | float:
        """Sum of the terms."""
        return sum(self.losses.values(), start=0.0)


class Distiller(nn.Module):
    """A student, a frozen teacher and the branch between them.

    The student and the branch are submodules: ``parameters()`` is what an optimizer needs. The teacher
    is held aside: it stays in eval mode, moves with the module and is in no state dict. The branch's
    widths come from the first call, or from ``prepare``, which must precede making the optimizer.

    Args:
        student: Any module that returns class scores [b, k, h, w]: as a tensor, under "out"
            (torchvision), or as ``.logits`` (transformers).
        teacher: The same, with the same classes.
        taps: Tap of the student and of the teacher, ``module:...`` (see ``taps``).
        config: Settings of the method.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        taps: tuple[str, str],
        config: DistillConfig | None = None,
    ) -> None:
        super().__init__()
        self.student, self.config = student, config or DistillConfig()
        self._aside = (teacher.eval().requires_grad_(False),)  # a tuple: no submodule
        self.taps = Tap.parse(taps[0]), Tap.parse(taps[1])
        for model, tap, text in zip((student, teacher), self.taps, taps, strict=True):
            if tap.kind != "module":
                raise InputError(f"tap {text} is for mmsegmentation models; write module:<path>")
            find_module(model, tap.path)
        self.branch: AfDCDLoss | None = None

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher."""
        return self._aside[0]

    def prepare(self, *args: Any, **kwargs: Any) -> "Distiller":
        """Build the branch from one batch of inputs, without a gradient; returns self.

        Raises:
            InputError: If taps, sizes or settings do not fit.
        """
        training = self.student.training
        self.student.eval()
        with torch.no_grad():
            _, fs, _ = self._run(self.student, 0, *args, **kwargs)
            _, ft, _ = self._run(self.teacher, 1, *args, **kwargs)
        self.student.train(training)
        side = fs if self.config.resize == "teacher" else ft
        check_fit((ft.shape[1], *side.shape[2:]), self.config)
        if self.config.has_branch:
            self.branch = AfDCDLoss(fs.shape[1], ft.shape[1], self.config).to(fs.device)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Distilled:
        """Run both models on the same inputs; ``labels`` are for the student alone.

        Raises:
            NonFiniteError: If the teacher's features are NaN or infinite.
        """
        if self.branch is None and self.config.has_branch:
            self.prepare(*args, **kwargs)
        output, fs, zs = self._run(self.student, 0, *args, **kwargs)
        with torch.no_grad():
            _, ft, zt = self._run(self.teacher, 1, *args, **kwargs)
        if not torch.isfinite(ft).all():
            raise NonFiniteError(
                "the teacher's features are not finite; check its weights, or bf16"
            )
        losses = kd_term(zs, zt, self.config)
        if self.branch is not None:
            losses |= self.branch(fs, ft)
        return Distilled(output, losses)

    def _run(
        self, model: nn.Module, side: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Tensor, Tensor]:
        tap = self.taps[side]
        if side == 1:
            kwargs.pop("labels", None)
        with recording(model, tap) as seen:
            output = model(*args, **kwargs)
        if not seen:
            raise InputError(f"module {tap.path} did not run; tap one on the path to the output")
        return output, as_map(seen[-1], tap), scores(output)

    def train(self, mode: bool = True) -> "Distiller":
        """Train the student and the branch; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "Distiller":
        self.teacher._apply(fn)
        return super()._apply(fn, recurse)


def scores(output: Any) -> Tensor:
    """Class scores [b, k, h, w] in what a segmenter returned.

    Raises:
        InputError: If there are none.
    """
    found = output["out"] if isinstance(output, Mapping) and "out" in output else output
    found = getattr(found, "logits", found)
    if isinstance(found, Tensor) and found.dim() == 4:
        return found
    raise InputError(
        f"the model returned {type(output).__name__} without class scores [b, k, h, w]; "
        "wrap it so that it returns them"
    )
