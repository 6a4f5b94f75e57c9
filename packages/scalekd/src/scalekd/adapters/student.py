"""Where a student's features are taken: two maps beside the logits, in one forward pass."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal

from torch import Tensor, nn

from effml_common.errors import InputError
from scalekd.adapters.teacher import token_grid

Kind = Literal["cnn", "convnext", "swin", "mlp", "vit"]


def kind_of(model: nn.Module) -> Kind:
    """What a timm model is, as far as the taps and the presets care."""
    name = type(model).__name__.lower()
    if "convnext" in name:
        return "convnext"
    if "swin" in name:
        return "swin"
    if hasattr(model, "blocks") and hasattr(model, "patch_embed"):
        return "vit"
    return (
        "mlp" if hasattr(model, "blocks") and hasattr(model, "stem") and "mixer" in name else "cnn"
    )


def default_taps(model: nn.Module) -> tuple[int, int]:
    """Indices for ``forward_intermediates``: the last two stages, or two blocks of a plain net.

    The paper's: blocks 9 and 12 of a 12-block ViT, the third-last and the last of Mixer and EVA-02.
    """
    parts: Any = model
    kind = kind_of(model)
    if kind == "mlp" or (kind == "vit" and type(model).__name__ == "Eva"):
        return -min(3, len(parts.blocks)), -1
    if kind == "vit":
        return -max(2, round(len(parts.blocks) / 3)), -1
    return -2, -1


class StudentTap(nn.Module):
    """A student that also returns two maps; its weights are the student's own.

    Args:
        model: Student: of timm, or any module that maps images to logits.
        taps: ``auto`` and pairs of indices use timm's ``forward_intermediates``; a pair of module
            names (``layer3``, ``layer4``) works for any network.
        prefix_tokens: Leading tokens to drop where a named module returns [b, n, c].

    Raises:
        InputError: If the model offers neither, a name is unknown, or it drops patches.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Literal["auto"] | Sequence[int] | Sequence[str] = "auto",
        prefix_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.model, self.prefix_tokens = model, prefix_tokens
        name = type(model).__name__
        if getattr(getattr(model, "patch_drop", None), "prob", 0) or "naflex" in name.lower():
            raise InputError(
                f"{name} drops or packs patches, which loses the token grid; "
                "set patch_drop_rate=0, or use a fixed-size student"
            )
        if taps == "auto":
            if not hasattr(model, "forward_intermediates"):
                raise InputError(
                    f"{name} has no forward_intermediates; name two modules, as in "
                    'taps=("layer3", "layer4")'
                )
            taps = default_taps(model)
        if len(taps) != 2:
            raise InputError(f"{len(taps)} taps were given; give two, the earlier first")
        self.taps = tuple(taps)
        if isinstance(self.taps[0], str):
            known = dict(model.named_modules())
            if missing := [tap for tap in self.taps if tap not in known]:
                shown = ", ".join(list(dict(model.named_children())))
                raise InputError(f"{name} has no module {missing[0]}; it has {shown}")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [b, classes] and the maps S3 and S4, [b, c, h, w] each."""
        if isinstance(self.taps[0], str):
            return self._with_hooks(x)
        model: Any = self.model
        # Sorted by timm, so equal depths cannot be asked for twice.
        final, maps = model.forward_intermediates(x, indices=list(self.taps), output_fmt="NCHW")
        return model.forward_head(final), maps[0], self._last_map(final, maps[1])

    def _last_map(self, final: Tensor, raw: Tensor) -> Tensor:
        """The last map as the paper takes it: normed for transformers and ConvNeXt, raw otherwise."""
        model: Any = self.model
        kind = kind_of(model)
        if self.taps[1] != -1:
            return raw
        if kind == "vit" and type(model).__name__ != "Eva":
            spatial = final[:, final.shape[1] - raw.shape[2] * raw.shape[3] :]
            return spatial.transpose(1, 2).unflatten(2, raw.shape[-2:])
        if kind == "swin":
            return final.permute(0, 3, 1, 2)
        if kind == "convnext" and isinstance(getattr(model.head, "norm", None), nn.LayerNorm):
            return model.head.norm(raw)
        return raw

    def _with_hooks(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        caught: dict[str, Any] = {}
        modules = dict(self.model.named_modules())
        with ExitStack() as hooks:
            for tap in map(str, self.taps):
                handle = modules[tap].register_forward_hook(
                    lambda _m, _a, y, tap=tap: caught.__setitem__(tap, y)
                )
                hooks.callback(handle.remove)
            logits = self.model(x)
        s3, s4 = (self._as_map(str(tap), caught.get(str(tap)), x) for tap in self.taps)
        return getattr(logits, "logits", logits), s3, s4

    def _as_map(self, tap: str, value: Any, x: Tensor) -> Tensor:
        value = getattr(value, "last_hidden_state", value)
        value = value[0] if isinstance(value, tuple) else value
        if not isinstance(value, Tensor) or value.ndim not in (3, 4):
            raise InputError(f"module {tap} returns no map or tokens; name another")
        if value.ndim == 4:
            return value
        spatial = value[:, self.prefix_tokens :]
        return spatial.transpose(1, 2).unflatten(2, token_grid(spatial.shape[1], tuple(x.shape)))
