"""Where each family of timm teachers ends: a new family of teachers goes here.

A family is one entry of ``FAMILIES``: the attribute of the timm model that holds its blocks or stages,
and a function that names the modules of the tail, which the model must call one after the other at its
end. The tail is recorded and replayed in ``teacher.py``, for all families alike; each start checks the
replay against the teacher. A tiny model of the family goes into ``tests/scalekd_tiny.py``, where the
tests of all families pick it up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from effml_common.errors import ConfigError, InputError
from scalekd.adapters.layouts import Layout


@dataclass(frozen=True)
class TeacherFamily:
    """One way in which timm builds networks.

    Attributes:
        attribute: Of the model: what its blocks or stages are called.
        members: For the reader: which networks these are.
        matches: Whether a model is built in this way.
        find_tail: From a model and the wanted number of blocks to the modules of its tail.
    """

    attribute: str
    members: str
    matches: Callable[[nn.Module], bool]
    find_tail: Callable[[nn.Module, int], list[nn.Module]]


def find_tail(model: nn.Module, tail_blocks: int) -> list[nn.Module]:
    """Return the modules at the end of a teacher that student features will pass through.

    Args:
        model: Teacher of timm.
        tail_blocks: Blocks in the tail of a plain transformer; a hierarchy takes its last stage.

    Raises:
        InputError: If the family has no known tail, or the teacher drops patches.
        ConfigError: If the teacher has no more than ``tail_blocks`` blocks.
    """
    for family in FAMILIES:
        if family.matches(model):
            return family.find_tail(model, tail_blocks)
    tried = ", ".join(family.attribute for family in FAMILIES)
    raise InputError(
        f"no tail is known for {type(model).__name__} (tried {tried}); pass tail=[modules] to "
        "TeacherSplit, or use_tpp=False"
    )


def token_layout(model: nn.Module) -> tuple[Layout, int]:
    """Return how a teacher lays out its features, and its number of class and register tokens."""
    if hasattr(model, "blocks"):
        return "NLC", getattr(model, "num_prefix_tokens", 0)
    layout: Layout = str(getattr(model, "output_fmt", "NCHW"))  # pyright: ignore[reportAssignmentType]
    return layout, 0


def _is_plain_transformer(model: nn.Module) -> bool:
    return hasattr(model, "blocks") and hasattr(model, "norm")


def _last_blocks(model: nn.Module, tail_blocks: int) -> list[nn.Module]:
    """The last blocks of a plain transformer, and its final norm."""
    parts: Any = model
    name = type(model).__name__
    if getattr(getattr(model, "patch_drop", None), "prob", 0):
        raise InputError(f"{name} drops patches, which loses the token grid; set patch_drop_rate=0")

    depth = len(parts.blocks)
    if not 1 <= tail_blocks < depth:
        raise ConfigError(
            f"tail_blocks is {tail_blocks} but {name} has {depth} blocks; use 1 to {depth - 1}"
        )
    return [*parts.blocks[depth - tail_blocks :], parts.norm]


def _has_stages(attribute: str) -> Callable[[nn.Module], bool]:
    return lambda model: hasattr(model, attribute) and len(getattr(model, attribute)) > 1


def _last_stage(attribute: str) -> Callable[[nn.Module, int], list[nn.Module]]:
    """The last stage of a hierarchy, and the norm behind it where there is one."""

    def find(model: nn.Module, _tail_blocks: int) -> list[nn.Module]:
        norm = getattr(model, "norm" if hasattr(model, "norm") else "norm_pre", None)
        final_norm = [norm] if isinstance(norm, nn.Module) else []
        return [getattr(model, attribute)[-1], *final_norm]

    return find


# Tried in this order.
FAMILIES = (
    TeacherFamily(
        attribute="blocks",
        members="plain transformers: ViT, CLIP-ViT, SigLIP, DeiT, BEiT, EVA, EVA-02, DINOv3",
        matches=_is_plain_transformer,
        find_tail=_last_blocks,
    ),
    TeacherFamily(
        attribute="layers",
        members="Swin, SwinV2",
        matches=_has_stages("layers"),
        find_tail=_last_stage("layers"),
    ),
    TeacherFamily(
        attribute="stages",
        members="ConvNeXt",
        matches=_has_stages("stages"),
        find_tail=_last_stage("stages"),
    ),
)
