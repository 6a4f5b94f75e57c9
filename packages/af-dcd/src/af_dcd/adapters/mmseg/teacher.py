"""The frozen teacher of an mmseg model, kept out of its weights, its optimizer and its DDP buckets."""

import copy
import hashlib
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from torch import Tensor, nn

from af_dcd.adapters.mmseg.checkpoints import load_weights, read_config
from af_dcd.adapters.mmseg.feature_recorder import forward, last_head, watching
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
        whole = read_config(config) if isinstance(config, str) else Config(dict(config))
        self.model: Any = build_model(without_downloads(plain(whole.model)))
        last_head(self.model)
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
        self.model.eval().requires_grad_(False)
        self._same_norm: bool | None = None

    def __deepcopy__(self, memo: Any) -> "Teacher":
        return self

    @torch.no_grad()
    def observe(self, images: Tensor, tap: Tap, student: nn.Module) -> tuple[Tensor, Tensor]:
        """Tapped map and class scores of images that the student's preprocessor has prepared."""
        with watching(self.model, tap) as seen:
            forward(self.model, self._prepared(images, student))
        return seen.feature(), seen.scores()

    def _prepared(self, images: Tensor, student: nn.Module) -> Tensor:
        """The images as the teacher's own preprocessor would have made them; padding comes along."""
        ours: Any = student.data_preprocessor
        theirs: Any = self.model.data_preprocessor
        if self._same_norm is None:
            # Once: the numbers lie on the device, and comparing them waits for it.
            self._same_norm = _norm(ours) == _norm(theirs)
            if not self._same_norm:
                warn("teacher and student normalise images differently; converted between the two")
        if self._same_norm:
            return images
        if _normalises(ours):
            images = images * ours.std + ours.mean
        if _turns(ours) != _turns(theirs):
            images = images.flip(1)
        return (images - theirs.mean) / theirs.std if _normalises(theirs) else images


def _norm(preprocessor: Any) -> tuple[tuple[float, ...], tuple[float, ...], bool]:
    """Mean, standard deviation, and whether the channels are turned round."""
    if not _normalises(preprocessor):
        return (0.0,) * 3, (1.0,) * 3, _turns(preprocessor)
    numbers = [tuple(getattr(preprocessor, name).flatten().tolist()) for name in ("mean", "std")]
    return numbers[0], numbers[1], _turns(preprocessor)


def _normalises(preprocessor: Any) -> bool:
    return bool(getattr(preprocessor, "_enable_normalize", False))


def _turns(preprocessor: Any) -> bool:
    return bool(getattr(preprocessor, "channel_conversion", False))


def plain(model: ConfigDict) -> ConfigDict:
    """The config of the segmenter itself, without what distilling it added."""
    model = ConfigDict({k: v for k, v in model.items() if k not in ("teacher", "distill")})
    model["type"] = str(model["type"]).removeprefix("AfDCD")
    return model


def without_downloads(model: ConfigDict) -> ConfigDict:
    """A copy that fetches no pretrained weights, for models that get a checkpoint."""

    def strip(node: Any) -> None:
        if isinstance(node, dict):
            for name in ("pretrained", "init_cfg"):
                if node.get(name):
                    node[name] = None
            for value in node.values():
                strip(value)
        elif isinstance(node, list | tuple):
            for value in node:
                strip(value)

    model = copy.deepcopy(model)
    strip(model)
    return model
