"""Teachers and students by timm name, without surprises about their weights."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from timm.models.mlp_mixer import MlpMixer
from torch import nn

from effml_common.errors import ConfigError, InputError
from effml_common.parsing import did_you_mean, one_line
from scalekd.config import PairConfig, TrainConfig

# Students of the paper that timm has no name for; for ``inspect``, since timm could not load them.
MODELS_WITHOUT_A_NAME: dict[str, Callable[..., nn.Module]] = {
    "mixer_b14_224": partial(MlpMixer, patch_size=14, num_blocks=12, embed_dim=768)
}

_REFUSALS = (TypeError, ValueError, RuntimeError, AssertionError, OSError, SafetensorError)


def build(
    name: str, *, num_classes: int, img_size: int | None, extra: str = "", **options: Any
) -> nn.Module:
    """Create a timm model for one image size.

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
    if base in MODELS_WITHOUT_A_NAME:
        return MODELS_WITHOUT_A_NAME[base](num_classes=num_classes, **json_object(extra))
    _check_name(base)

    # Families that take any image size have no such argument, and timm says so by a TypeError.
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


def _check_name(base: str) -> None:
    known = timm.list_models()
    if base not in known:
        longer = [name for name in known if name.startswith(base)]
        advice = did_you_mean(base, known, "see timm.list_models()")
        advice = f"did you mean {longer[0]}?" if longer else advice
        raise InputError(f"timm has no model {base}; {advice}")


def json_object(text: str) -> dict[str, Any]:
    """Read arguments given as JSON.

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


def build_student(config: PairConfig, *, drop_path: float = 0.0) -> nn.Module:
    """Create the student of a configuration, from scratch or with weights.

    Args:
        config: Of ``inspect`` or ``train``; the latter may name weights to start from.
        drop_path: Stochastic depth; 0 leaves timm's default.

    Raises:
        InputError: If timm cannot build it, or its weights are not there.
    """
    options: dict[str, Any] = {"pretrained": getattr(config, "pretrained", False)}
    if drop_path:
        options["drop_path_rate"] = drop_path
    if weights := getattr(config, "student_checkpoint", None):
        options["checkpoint_path"] = existing_file(weights)
    return build(
        config.student,
        num_classes=config.num_classes,
        img_size=config.img_size,
        extra=config.student_args,
        **options,
    )


def build_teacher(config: TrainConfig) -> nn.Module:
    """Create the teacher of a training configuration, with learned weights.

    Raises:
        InputError: If timm cannot build it, or it would have no learned weights and that was not
            asked for.
    """
    # A teacher that has learned nothing is refused, because training would run and teach nothing.
    options: dict[str, Any] = {}
    if config.teacher_checkpoint:
        options["checkpoint_path"] = existing_file(config.teacher_checkpoint)
    elif not config.allow_random_teacher:
        pretrained = timm.get_pretrained_cfg(config.teacher, allow_unregistered=True)
        if pretrained is None or not pretrained.has_weights:
            raise InputError(
                f"timm has no weights for {config.teacher}; give --teacher-checkpoint, a name with "
                "a tag that has weights, or --allow-random-teacher"
            )
        options["pretrained"] = True

    # Its own image size, unless the user wants the student's.
    return build(
        config.teacher,
        num_classes=config.num_classes,
        img_size=None if config.teacher_resize == "auto" else config.img_size,
        extra=config.teacher_args,
        **options,
    )


def existing_file(path: str) -> str:
    """Return the path of a file that is there.

    Raises:
        InputError: If it is not.
    """
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}; check the path")
    return path


def count_parameters(module: nn.Module) -> int:
    """Return the number of weights of a network, buffers aside."""
    return sum(p.numel() for p in module.parameters())
