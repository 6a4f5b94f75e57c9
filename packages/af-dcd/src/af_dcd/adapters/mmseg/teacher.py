"""The frozen teacher of an mmseg model, kept out of its weights, its optimizer and its DDP buckets."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn

from af_dcd.adapters.mmseg.checkpoints import load_weights
from af_dcd.adapters.mmseg.config_builder import plain_model, without_downloads
from af_dcd.adapters.mmseg.config_files import read_config
from af_dcd.adapters.mmseg.feature_recorder import last_head, record_features, run_heads
from af_dcd.adapters.mmseg.shims import build_model
from af_dcd.method.taps import Tap
from effml_common.errors import CheckpointError
from effml_common.logging import warn


class Teacher:
    """Holder of the model; no ``nn.Module``, and a deep copy of it (EMA makes one) is itself.

    Args:
        config: Path, name (see ``read_config``) or dict of the config.
        checkpoint: Its weights; None only with ``allow_untrained``.
        strict: Refuse weights that the config does not have.
        allow_untrained: Take random weights, for dry runs and tests.

    Raises:
        InputError: If the config cannot be read or the head has no ``cls_seg``.
        CheckpointError: If there is no checkpoint or it does not fit.
    """

    def __init__(
        self,
        config: str | dict[str, Any],
        checkpoint: str | None = None,
        strict: bool = True,
        allow_untrained: bool = False,
    ) -> None:
        # The plain segmenter of the config, also where that distils itself.
        mmseg_config = read_config(config) if isinstance(config, str) else Config(dict(config))
        self.model: Any = build_model(without_downloads(plain_model(mmseg_config.model)))
        last_head(self.model)

        # Its weights, and what the checkpoint says of its classes.
        self.classes: Any = None
        self.sha256 = None
        if checkpoint is not None:
            meta = load_weights(self.model, checkpoint, strict=strict)
            self.classes = (meta.get("dataset_meta") or {}).get("classes", meta.get("CLASSES"))
            with open(Path(checkpoint), "rb") as file:
                self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        elif not allow_untrained:
            raise CheckpointError(
                "the teacher has no checkpoint; give --teacher-checkpoint (a random teacher teaches "
                "nothing; --allow-untrained-teacher takes one for a dry run)"
            )

        # It never learns; how it normalises images is compared at the first batch.
        self.model.eval().requires_grad_(False)
        self._same_normalisation: bool | None = None

    def __deepcopy__(self, memo: Any) -> "Teacher":
        return self

    @torch.no_grad()
    def observe(self, images: Tensor, tap: Tap, student: nn.Module) -> tuple[Tensor, Tensor]:
        """Compute the tapped map and the class scores of images of the student's preprocessor."""
        with record_features(self.model, tap) as record:
            run_heads(self.model, self._convert_images(images, student))
        return record.feature(), record.scores()

    def _convert_images(self, images: Tensor, student: nn.Module) -> Tensor:
        """Prepare the images as the teacher's own preprocessor would have; padding comes along."""
        # Compared once: the numbers lie on the device, and comparing them waits for it.
        student_side: Any = student.data_preprocessor
        teacher_side: Any = self.model.data_preprocessor
        if self._same_normalisation is None:
            normalisations = _normalisation(student_side), _normalisation(teacher_side)
            self._same_normalisation = normalisations[0] == normalisations[1]
            if not self._same_normalisation:
                warn("teacher and student normalise images differently; converted between the two")
        if self._same_normalisation:
            return images

        # Undo the student's normalisation, match the order of channels, apply the teacher's.
        if _normalises(student_side):
            images = images * student_side.std + student_side.mean
        if _swaps_channels(student_side) != _swaps_channels(teacher_side):
            images = images.flip(1)
        if _normalises(teacher_side):
            images = (images - teacher_side.mean) / teacher_side.std
        return images


def _normalisation(preprocessor: Any) -> tuple[tuple[float, ...], tuple[float, ...], bool]:
    """Read mean, standard deviation, and whether BGR and RGB are swapped."""
    if not _normalises(preprocessor):
        return (0.0,) * 3, (1.0,) * 3, _swaps_channels(preprocessor)
    mean = tuple(preprocessor.mean.flatten().tolist())
    std = tuple(preprocessor.std.flatten().tolist())
    return mean, std, _swaps_channels(preprocessor)


def _normalises(preprocessor: Any) -> bool:
    return bool(getattr(preprocessor, "_enable_normalize", False))


def _swaps_channels(preprocessor: Any) -> bool:
    return bool(getattr(preprocessor, "channel_conversion", False))
