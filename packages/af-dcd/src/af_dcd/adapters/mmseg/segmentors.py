"""Segmenters that distil while they train: mmseg's own classes with one mixin in front.

The weights keep mmseg's names, so a checkpoint loads without this package; only ``afdcd.*`` is added.
"""

import math
from typing import Any

import torch
from mmengine.logging import MessageHub
from mmseg.models.segmentors import CascadeEncoderDecoder, EncoderDecoder
from mmseg.registry import MODELS
from torch import Tensor

from af_dcd.adapters.mmseg.feature_recorder import default_tap, last_head, shapes, watching
from af_dcd.adapters.mmseg.teacher import Teacher
from af_dcd.method.distillation import AfDCDLoss, check_fit, kd_term
from af_dcd.method.presets import PRESETS, changed
from af_dcd.method.taps import Tap
from effml_common.errors import ConfigError, InputError
from effml_common.finite import check_finite
from effml_common.logging import warn

DOMINATES = 10  # times the task loss: measured to be harmful on small data


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
        given = dict(distill or {})
        preset, size = given.pop("preset", "cityscapes"), given.pop("size", None)
        taps = given.pop("student_tap", None), given.pop("teacher_tap", None)
        if preset not in PRESETS:
            raise ConfigError(f"there is no preset {preset!r}; use one of {', '.join(PRESETS)}")
        self.distill = changed(PRESETS[preset], given)
        last_head(self)  # type: ignore[arg-type]
        self.teacher = Teacher(**teacher)
        height, width = size or getattr(self.data_preprocessor, "size", None) or (512, 512)  # type: ignore[attr-defined]
        self.taps = self._join((height, width), *taps)
        self._first = True

    def _join(self, size: tuple[int, int], *taps: str | None) -> tuple[Tap, Tap]:
        """See that the pair fits, and build the branch; returns the parsed taps."""
        models = self, self.teacher.model
        texts = [t or default_tap(m, size) for m, t in zip(models, taps, strict=True)]  # type: ignore[arg-type]
        parsed = Tap.parse(texts[0]), Tap.parse(texts[1])
        (fs, zs), (ft, zt) = (
            shapes(m, t, size)  # type: ignore[arg-type]
            for m, t in zip(models, parsed, strict=True)
        )
        config = self.distill
        for what, ours, theirs in (("feature", fs, ft), ("score", zs, zt)):
            used = config.has_branch if what == "feature" else config.lambda_kd > 0
            if used and config.resize == "none" and ours[2:] != theirs[2:]:
                raise InputError(
                    f"the student's {what} map is {ours[2]}x{ours[3]} and the teacher's "
                    f"{theirs[2]}x{theirs[3]} at crops of {size[0]}x{size[1]}; "
                    "tap layers of one stride, or set resize=teacher (or student)"
                )
        if config.lambda_kd > 0 and zs[1] != zt[1]:
            raise InputError(
                f"the student has {zs[1]} classes and the teacher {zt[1]}; "
                "give a teacher of the same classes, or lambda_kd=0"
            )
        self.tapped_shapes = {"student": tuple(fs), "teacher": tuple(ft), "scores": tuple(zs)}
        if config.has_branch:
            map_size = fs[2:] if config.resize == "teacher" else ft[2:]
            check_fit((ft[1], *map_size), config)
            # No "head", "norm" or "backbone" in these names: mmengine's rules match parts of them.
            self.afdcd = AfDCDLoss(fs[1], ft[1], config)
        return parsed

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Move a batch of the data loader to the device, prepare it and distil one step."""
        batch = self.data_preprocessor(data, True)  # type: ignore[attr-defined]
        return distill_step(self, batch, optim_wrapper)

    def loss(self, inputs: Tensor, data_samples: Any) -> dict[str, Any]:
        """The segmenter's losses and the distillation terms."""
        self._check_labels(data_samples)
        with watching(self, self.taps[0]) as seen:
            losses = super().loss(inputs, data_samples)  # type: ignore[misc]
        config = self.distill
        if config.lambda_kd == 0 and not config.has_branch:
            return losses
        features, scores = self.teacher.observe(inputs, self.taps[1], self)  # type: ignore[arg-type]
        self._teacher_sound = torch.isfinite(features).all()
        losses.update(kd_term(seen.scores(), scores, config))
        if config.has_branch:
            losses.update(self.afdcd(seen.feature(), features))
        return losses

    def parse_losses(self, losses: dict[str, Any]) -> Any:
        """Sum the terms, and stop on a number that is not finite, on all ranks alike.

        Raises:
            NonFiniteError: With the iteration, every weighted term, and advice.
        """
        total, logged = super().parse_losses(losses)  # type: ignore[misc]
        names = [k for k in logged if "loss" in k and k != "loss"]
        # Read together: each number that is read alone waits for the device.
        read = torch.stack([total.detach(), *(logged[name].detach() for name in names)]).tolist()
        terms = dict(zip(names, read[1:], strict=True))
        step = int(MessageHub.get_current_instance().get_info("iter", 0) or 0) + 1
        words = " + ".join(f"{name} {value:.4g}" for name, value in terms.items())
        broken = not math.isfinite(read[0]) and not self._sound()
        source = "the teacher's features are not finite: " if broken else ""
        advice = "lower the weight of what is largest, raise tau, or use bf16 instead of fp16"
        check_finite(read[0], step=step, term=f"total ({source}{words}; {advice})")
        if self._first:
            self._first = False
            task = sum(value for name, value in terms.items() if name.startswith("decode"))
            contrast = terms.get("loss_ctr", 0.0)
            if contrast > DOMINATES * task:
                warn(
                    f"the weighted contrast starts at {contrast:.3g}, the task loss at {task:.3g}; "
                    "a contrast that dominates was measured to be harmful: lower lambda_ctr"
                )
        return total, logged

    def _sound(self) -> bool:
        sound = getattr(self, "_teacher_sound", None)
        return sound is None or bool(sound)

    def _check_labels(self, data_samples: Any) -> None:
        head = last_head(self)  # type: ignore[arg-type]
        classes = max(head.num_classes, 2)  # a single score still tells two classes

        def outside(labels: Tensor) -> Tensor:
            return (labels != head.ignore_index) & ((labels < 0) | (labels >= classes))

        # One answer for all, so that a batch waits for the device once.
        maps = [sample.gt_sem_seg.data for sample in data_samples]
        if not torch.stack([outside(labels).any() for labels in maps]).any():
            return
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


def distill_step(model: Any, batch: dict[str, Any], optim_wrapper: Any) -> dict[str, Tensor]:
    """One update of the student and the branch; moves no data and logs nothing.

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
