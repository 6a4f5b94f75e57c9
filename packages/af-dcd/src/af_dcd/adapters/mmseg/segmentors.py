"""Segmenters that distil while they train: mmseg's own classes with one mixin in front.

The weights keep mmseg's names, so a checkpoint loads without this package; only ``afdcd.*`` is added.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.logging import MessageHub
from mmseg.models.segmentors import CascadeEncoderDecoder, EncoderDecoder
from mmseg.registry import MODELS
from torch import Tensor

from af_dcd.adapters.mmseg.feature_recorder import (
    default_tap,
    last_head,
    record_features,
    tapped_shapes,
)
from af_dcd.adapters.mmseg.teacher import Teacher
from af_dcd.config import DistillConfig
from af_dcd.method.distillation import AfDCDLoss, check_contrast_fits, kd_term
from af_dcd.method.presets import PRESETS, replace_settings
from af_dcd.method.taps import Tap
from effml_common.errors import ConfigError, InputError
from effml_common.logging import warn
from effml_common.stopping import check_finite

HARMFUL_CONTRAST_RATIO = 10  # of contrast to task loss; measured to be harmful on small data
DEFAULT_CROP = (512, 512)  # height and width where neither config nor preprocessor names one
ADVICE = "lower the weight of what is largest, raise tau, or use bf16 instead of fp16"


class AfDCDMixin:
    """Adds ``loss_kd``, ``loss_fd`` and ``loss_ctr`` to what the segmenter below it computes.

    Args:
        teacher: Arguments of ``Teacher``.
        distill: ``preset`` (default cityscapes), ``student_tap``, ``teacher_tap``, ``size`` (of a
            training crop; default the preprocessor's) and any field of ``DistillConfig``.
        args, kwargs: Of the segmenter.

    Raises:
        InputError: If the two models and the settings do not fit together.
    """

    def __init__(
        self,
        *args: Any,
        teacher: dict[str, Any],
        distill: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)

        # Settings of the method: a preset, and what the config changes in it.
        settings = dict(distill or {})
        preset, size = settings.pop("preset", "cityscapes"), settings.pop("size", None)
        taps = settings.pop("student_tap", None), settings.pop("teacher_tap", None)
        if preset not in PRESETS:
            raise ConfigError(f"there is no preset {preset!r}; use one of {', '.join(PRESETS)}")
        self.distill = replace_settings(PRESETS[preset], settings)

        # The teacher, and the branch between the two models.
        last_head(self)  # type: ignore[arg-type]
        self.teacher = Teacher(**teacher)
        height, width = size or getattr(self.data_preprocessor, "size", None) or DEFAULT_CROP  # type: ignore[attr-defined]
        self.crop = int(height), int(width)  # of training
        self.taps = self._join_models(taps)
        self._first_batch = True

    def _join_models(self, taps: Sequence[str | None]) -> tuple[Tap, Tap]:
        """See that the pair fits, and build the branch; returns the parsed taps."""
        # Shapes at the size of a training crop, on meta tensors.
        models: Any = self, self.teacher.model
        crop, config = self.crop, self.distill
        student_tap, teacher_tap = (
            Tap.parse(tap or default_tap(model, crop))
            for model, tap in zip(models, taps, strict=True)
        )
        student_map, student_scores = tapped_shapes(models[0], student_tap, crop)
        teacher_map, teacher_scores = tapped_shapes(models[1], teacher_tap, crop)
        if config.has_branch:
            _check_same_size("feature", student_map, teacher_map, config, crop)
        if config.lambda_kd > 0:
            _check_same_size("score", student_scores, teacher_scores, config, crop)
            _check_same_classes(student_scores[1], teacher_scores[1])
        self.tapped_shapes = {
            "student": tuple(student_map),
            "teacher": tuple(teacher_map),
            "scores": tuple(student_scores),
        }

        # No "head", "norm" or "backbone" in these names: mmengine's rules match parts of them.
        if config.has_branch:
            compared = student_map if config.resize == "teacher" else teacher_map
            check_contrast_fits((teacher_map[1], *compared[2:]), config)
            self.afdcd = AfDCDLoss(student_map[1], teacher_map[1], config)
        return student_tap, teacher_tap

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Move a batch of the data loader to the device, prepare it and distil one step."""
        batch = self.data_preprocessor(data, True)  # type: ignore[attr-defined]
        return distill_step(self, batch, optim_wrapper)

    def loss(self, inputs: Tensor, data_samples: Any) -> dict[str, Any]:
        """Compute the segmenter's losses and the distillation terms.

        Raises:
            InputError: If a label is out of range.
        """
        # The student, as mmseg trains it, with its features recorded on the way.
        self._check_labels(data_samples)
        with record_features(self, self.taps[0]) as student:
            losses = super().loss(inputs, data_samples)  # type: ignore[misc]
        config = self.distill
        if config.lambda_kd == 0 and not config.has_branch:
            return losses

        # The teacher on the same images, and the terms between the two.
        features, scores = self.teacher.observe(inputs, self.taps[1], self)  # type: ignore[arg-type]
        self._teacher_is_finite = torch.isfinite(features).all()
        losses.update(kd_term(student.scores(), scores, config))
        if config.has_branch:
            losses.update(self.afdcd(student.feature(), features))
        return losses

    def parse_losses(self, losses: dict[str, Any]) -> Any:
        """Sum the terms, and stop on a number that is not finite, on all ranks alike.

        Raises:
            NonFiniteError: With the iteration, every weighted term, and advice.
        """
        # All terms are read together: each number that is read alone waits for the device.
        total, logged = super().parse_losses(losses)  # type: ignore[misc]
        names = [name for name in logged if "loss" in name and name != "loss"]
        values = torch.stack([total.detach(), *(logged[n].detach() for n in names)]).tolist()
        terms = dict(zip(names, values[1:], strict=True))

        # Name every term, and the teacher where it is the cause.
        step = int(MessageHub.get_current_instance().get_info("iter", 0) or 0) + 1
        words = " + ".join(f"{name} {value:.4g}" for name, value in terms.items())
        teacher_broke = not math.isfinite(values[0]) and not self._teacher_was_finite()
        cause = "the teacher's features are not finite: " if teacher_broke else ""
        check_finite(values[0], step=step, term=f"total ({cause}{words}; {ADVICE})")

        if self._first_batch:
            self._first_batch = False
            _warn_if_contrast_dominates(terms)
        return total, logged

    def _teacher_was_finite(self) -> bool:
        finite = getattr(self, "_teacher_is_finite", None)
        return finite is None or bool(finite)

    def _check_labels(self, data_samples: Any) -> None:
        head = last_head(self)  # type: ignore[arg-type]
        classes = max(head.num_classes, 2)  # a single score still tells two classes

        def outside(labels: Tensor) -> Tensor:
            return (labels != head.ignore_index) & ((labels < 0) | (labels >= classes))

        # One answer for all, so that a batch waits for the device once.
        maps = [sample.gt_sem_seg.data for sample in data_samples]
        if not torch.stack([outside(labels).any() for labels in maps]).any():
            return

        # Only now is it worth asking which image it was.
        for sample, labels in zip(data_samples, maps, strict=True):
            wrong = labels[outside(labels)]
            if len(wrong):
                path = sample.metainfo.get("seg_map_path", "an image")
                raise InputError(
                    f"{path} has label {int(wrong[0])}, and the model {head.num_classes} classes; "
                    f"use labels 0 to {classes - 1} and {head.ignore_index} for what is ignored "
                    "(reduce_zero_label, the data set's converter)"
                )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if "teacher" in self.__dict__:
            self.teacher.model._apply(fn)
        return super()._apply(fn, recurse)  # type: ignore[misc]


def _check_same_size(
    kind: str,
    student: torch.Size,
    teacher: torch.Size,
    config: DistillConfig,
    crop: tuple[int, int],
) -> None:
    if config.resize == "none" and student[2:] != teacher[2:]:
        raise InputError(
            f"the student's {kind} map is {student[2]}x{student[3]} and the teacher's "
            f"{teacher[2]}x{teacher[3]} at crops of {crop[0]}x{crop[1]}; "
            "tap layers of one stride, or set resize=teacher (or student)"
        )


def _check_same_classes(student: int, teacher: int) -> None:
    if student != teacher:
        raise InputError(
            f"the student has {student} classes and the teacher {teacher}; "
            "give a teacher of the same classes, or lambda_kd=0"
        )


def _warn_if_contrast_dominates(terms: dict[str, float]) -> None:
    task = sum(value for name, value in terms.items() if name.startswith("decode"))
    contrast = terms.get("loss_ctr", 0.0)
    if contrast > HARMFUL_CONTRAST_RATIO * task:
        warn(
            f"the weighted contrast starts at {contrast:.3g}, the task loss at {task:.3g}; "
            "a contrast that dominates was measured to be harmful: lower lambda_ctr"
        )


def distill_step(model: Any, batch: dict[str, Any], optim_wrapper: Any) -> dict[str, Tensor]:
    """Make one update of the student and the branch; moves no data and logs nothing.

    Args:
        model: A segmenter with ``AfDCDMixin``.
        batch: What its preprocessor gives: ``inputs`` [b, 3, h, w] and ``data_samples``, on the
            model's device.
        optim_wrapper: mmengine's, around an optimizer of the model's parameters.

    Returns:
        The weighted terms and their sum, on the device.

    Raises:
        NonFiniteError: If a term or a gradient is not finite.
    """
    with optim_wrapper.optim_context(model):
        losses = model(**batch, mode="loss")
    total, terms = model.parse_losses(losses)
    optim_wrapper.update_params(total)
    return terms


@MODELS.register_module()
class AfDCDEncoderDecoder(AfDCDMixin, EncoderDecoder):
    """``EncoderDecoder`` that distils."""


@MODELS.register_module()
class AfDCDCascadeEncoderDecoder(AfDCDMixin, CascadeEncoderDecoder):
    """``CascadeEncoderDecoder`` that distils."""
