"""Teachers and students by timm name, without surprises about their weights."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models.mlp_mixer import MlpMixer
from torch import nn

from effml_common.errors import ConfigError, InputError
from effml_common.parsing import did_you_mean, one_line

# Students of the paper that timm has no name for; for ``inspect``, since timm could not load them.
LACKING: dict[str, Callable[..., nn.Module]] = {
    "mixer_b14_224": partial(MlpMixer, patch_size=14, num_blocks=12, embed_dim=768)
}

_REFUSALS = (TypeError, ValueError, RuntimeError, AssertionError, OSError, SafetensorError)


def build(
    name: str, *, num_classes: int, img_size: int | None, extra: str = "", **options: Any
) -> nn.Module:
    """A timm model for one image size.

    Args:
        name: timm name, with or without a tag.
        num_classes: Classes of its head.
        img_size: Side in pixels; families that take any size ignore it.
        extra: JSON object of further arguments, which win.
        options: ``pretrained``, ``checkpoint_path``, ``drop_path_rate``.

    Raises:
        InputError: If timm knows no such model, or refuses the arguments.
    """
    base = name.split(".")[0]
    if base in LACKING:
        return LACKING[base](num_classes=num_classes, **json_object(extra))
    known = timm.list_models()
    if base not in known:
        longer = [each for each in known if each.startswith(base)]
        advice = did_you_mean(base, known, "see timm.list_models()")
        advice = f"did you mean {longer[0]}?" if longer else advice
        raise InputError(f"timm has no model {base}; {advice}")
    arguments = {"num_classes": num_classes, **options, **json_object(extra)}
    try:
        if img_size is not None and "img_size" not in arguments:
            try:
                return timm.create_model(name, img_size=img_size, **arguments)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
        return timm.create_model(name, **arguments)
    except _REFUSALS as error:
        raise InputError(
            f"timm cannot build {name}: {one_line(str(error))}; check the arguments and the weights"
        ) from error


def json_object(text: str) -> dict[str, Any]:
    """Arguments given as JSON.

    Raises:
        ConfigError: If it is no JSON object.
    """
    try:
        value = json.loads(text) if text else {}
    except ValueError as error:
        raise ConfigError(f'{text!r} is no JSON ({error}); write {{"key": value}}') from error
    if not isinstance(value, dict):
        raise ConfigError(f'{text!r} is no JSON object; write {{"key": value}}')
    return value


def build_student(
    config: Any, *, drop_path: float | None = None, num_classes: int | None = None
) -> nn.Module:
    """The student of a configuration, from scratch or with weights."""
    options: dict[str, Any] = {"pretrained": getattr(config, "pretrained", False)}
    if drop_path:
        options["drop_path_rate"] = drop_path
    if getattr(config, "student_checkpoint", None):
        options["checkpoint_path"] = existing(config.student_checkpoint)
    return build(
        config.student,
        num_classes=num_classes or config.num_classes,
        img_size=config.img_size,
        extra=config.student_args,
        **options,
    )


def build_teacher(config: Any) -> nn.Module:
    """The teacher of a training configuration, with learned weights.

    Raises:
        InputError: If it would have none and that was not asked for.
    """
    options: dict[str, Any] = {}
    if config.teacher_checkpoint:
        options["checkpoint_path"] = existing(config.teacher_checkpoint)
    elif not config.allow_random_teacher:
        cfg = timm.get_pretrained_cfg(config.teacher, allow_unregistered=True)
        if cfg is None or not cfg.has_weights:
            raise InputError(
                f"timm has no weights for {config.teacher}; give --teacher-checkpoint, a name with "
                "a tag that has weights, or --allow-random-teacher"
            )
        options["pretrained"] = True
    return build(
        config.teacher,
        num_classes=config.num_classes,
        img_size=None if config.teacher_resize == "auto" else config.img_size,
        extra=config.teacher_args,
        **options,
    )


def existing(path: str) -> str:
    """A file that is there.

    Raises:
        InputError: If it is not.
    """
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}; check the path")
    return path


def fingerprint(model: nn.Module) -> str:
    """Hash of a model's weights and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(
            value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()
