"""Where each family of timm students is tapped: a new family of students goes here.

Students that are not told apart below are taken as CNNs: their last two stages, as they are.
"""

from typing import Any, Literal

from torch import Tensor, nn

Kind = Literal["cnn", "convnext", "swin", "mlp", "vit"]


def kind_of(model: nn.Module) -> Kind:
    """Return what a timm model is, as far as the taps and the presets care."""
    name = type(model).__name__.lower()
    if "convnext" in name:
        return "convnext"
    if "swin" in name:
        return "swin"
    if hasattr(model, "blocks") and hasattr(model, "patch_embed"):
        return "vit"
    if hasattr(model, "blocks") and hasattr(model, "stem") and "mixer" in name:
        return "mlp"
    return "cnn"


def default_taps(model: nn.Module) -> tuple[int, int]:
    """Indices for ``forward_intermediates``: the last two stages, or two blocks of a plain network.

    They are the paper's: blocks 9 and 12 of a 12-block ViT, the third-last and the last of Mixer and
    EVA-02.
    """
    parts: Any = model
    kind = kind_of(model)
    if kind == "mlp" or (kind == "vit" and _is_eva(model)):
        return -min(3, len(parts.blocks)), -1
    if kind == "vit":
        return -max(2, round(len(parts.blocks) / 3)), -1
    return -2, -1


def last_map(model: nn.Module, final: Tensor, raw: Tensor) -> Tensor:
    """Return the last map as the paper takes it: normed for transformers and ConvNeXt, else raw.

    Args:
        model: Student of timm.
        final: What its ``forward_intermediates`` returns as final features.
        raw: Its last intermediate map, [b, c, h, w].
    """
    parts: Any = model
    kind = kind_of(model)
    if kind == "vit" and not _is_eva(model):
        spatial = final[:, final.shape[1] - raw.shape[2] * raw.shape[3] :]
        return spatial.transpose(1, 2).unflatten(2, raw.shape[-2:])
    if kind == "swin":
        return final.permute(0, 3, 1, 2)
    if kind == "convnext" and isinstance(getattr(parts.head, "norm", None), nn.LayerNorm):
        return parts.head.norm(raw)
    return raw


def _is_eva(model: nn.Module) -> bool:
    return type(model).__name__ == "Eva"
