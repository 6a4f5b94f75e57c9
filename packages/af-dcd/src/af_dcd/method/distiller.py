"""Af-DCD for any pair of ``nn.Module`` segmenters: torchvision, transformers, your own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from af_dcd.config import DistillConfig
from af_dcd.method.distillation import AfDCDLoss, check_contrast_fits, kd_term
from af_dcd.method.taps import Tap, feature_map, find_module, record_outputs
from effml_common.errors import InputError, NonFiniteError


@dataclass(frozen=True)
class DistillationOutput:
    """What one call of a ``Distiller`` gives.

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


@dataclass(frozen=True)
class _Pass:
    """One model's run on a batch: what it returned, and the maps [b, c, h, w] that are compared."""

    output: Any
    features: Tensor
    scores: Tensor


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

    Raises:
        InputError: If a tap is none, or names a module that a model does not have.

    >>> import torch
    >>> def segmenter(width):
    ...     return nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 5, 1))
    >>> config = DistillConfig(groups=4, pool=1)
    >>> distiller = Distiller(segmenter(4), segmenter(8), ("module:1", "module:1"), config)
    >>> images = torch.randn(2, 3, 16, 16)
    >>> result = distiller.prepare(images).train()(images)
    >>> sorted(result.losses)
    ['loss_ctr', 'loss_fd', 'loss_kd']
    >>> result.total.backward()  # beside the task loss, in a training loop
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
        # In eval mode, so that running statistics stay as they are.
        training = self.student.training
        self.student.eval()
        with torch.no_grad():
            student = self._run_student(*args, **kwargs).features
            teacher = self._run_teacher(*args, **kwargs).features
        self.student.train(training)

        # Channels come from the maps; whether patches fit depends on the size that is compared.
        compared = student if self.config.resize == "teacher" else teacher
        check_contrast_fits((teacher.shape[1], *compared.shape[2:]), self.config)
        if self.config.has_branch:
            branch = AfDCDLoss(student.shape[1], teacher.shape[1], self.config)
            self.branch = branch.to(student.device)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> DistillationOutput:
        """Run both models on the same inputs; ``labels`` are for the student alone.

        Raises:
            NonFiniteError: If the teacher's features are NaN or infinite.
        """
        if self.branch is None and self.config.has_branch:
            self.prepare(*args, **kwargs)

        # The teacher computes without a gradient.
        student = self._run_student(*args, **kwargs)
        with torch.no_grad():
            teacher = self._run_teacher(*args, **kwargs)
        if not torch.isfinite(teacher.features).all():
            raise NonFiniteError(
                "the teacher's features are not finite; check its weights, or use bf16"
            )

        # The terms of the method; the task loss is the caller's.
        losses = kd_term(student.scores, teacher.scores, self.config)
        if self.branch is not None:
            losses |= self.branch(student.features, teacher.features)
        return DistillationOutput(student.output, losses)

    def _run_student(self, *args: Any, **kwargs: Any) -> _Pass:
        return _run_tapped(self.student, self.taps[0], *args, **kwargs)

    def _run_teacher(self, *args: Any, **kwargs: Any) -> _Pass:
        kwargs.pop("labels", None)
        return _run_tapped(self.teacher, self.taps[1], *args, **kwargs)

    def train(self, mode: bool = True) -> "Distiller":
        """Train the student and the branch; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "Distiller":
        self.teacher._apply(fn)
        return super()._apply(fn, recurse)


def _run_tapped(model: nn.Module, tap: Tap, *args: Any, **kwargs: Any) -> _Pass:
    with record_outputs(model, tap) as recorded:
        output = model(*args, **kwargs)
    if not recorded:
        raise InputError(f"module {tap.path} did not run; tap one on the path to the output")
    return _Pass(output, feature_map(recorded[-1], tap), class_scores(output))


def class_scores(output: Any) -> Tensor:
    """Take the class scores [b, k, h, w] out of what a segmenter returned.

    Raises:
        InputError: If there are none.
    """
    scores = output["out"] if isinstance(output, Mapping) and "out" in output else output
    scores = getattr(scores, "logits", scores)
    if isinstance(scores, Tensor) and scores.dim() == 4:
        return scores
    raise InputError(
        f"the model returned {type(output).__name__} without class scores [b, k, h, w]; "
        "wrap it so that it returns them"
    )
