"""Experimental: a Dot around a whole transformer, which then sees 4**m times fewer tokens.

The paper evaluates UNets only. Here convolutions shrink the latent, the Dash runs as a whole with
low-rank residuals on its weights, convolutions come back. Text tokens do not shrink, so N stays smaller
than for a UNet.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from morse_diffusion.adapters.dot import (
    GUIDANCE_FEATURES,
    Cond,
    DotShape,
    MorseDot,
    guidance_features,
    max_before,
    zero_,
)
from morse_diffusion.errors import ShapeError
from morse_diffusion.lora import LowRankResiduals

CLASSES = (
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
)


def is_transformer(dash: nn.Module) -> bool:
    """Whether ``TransformerDot`` fits around it."""
    return type(dash).__name__ in CLASSES


class TransformerDot(MorseDot):
    """Dot of DiT, PixArt, SD3 and Flux; ``t_s`` and ``w`` enter beside the first convolution."""

    def __init__(self, dash: nn.Module, shape: DotShape) -> None:
        super().__init__(dash, shape)
        config: Any = dash.config
        self.packed = type(dash).__name__.startswith("Flux")
        self.latent = config.in_channels // 4 if self.packed else config.in_channels
        self.residuals = LowRankResiduals(dict(dash.named_children()), shape.lora_rank)
        width, c = shape.channels, self.latent
        self.conv_in = nn.Conv2d(3 * c, width[0], 3, padding=1)
        self.down = nn.ModuleList(
            nn.Conv2d(max_before(width, i), width[i], 3, stride=2, padding=1)
            for i in range(shape.m)
        )
        self.to_shared = nn.Conv2d(width[-1], c, 1)
        self.from_shared = nn.Conv2d(c, width[-1], 1)
        self.up = nn.ModuleList(
            nn.Conv2d(width[i] + max_before(width, i), max_before(width, i), 3, padding=1)
            for i in reversed(range(shape.m))
        )
        self.conv_out = zero_(nn.Conv2d(width[0], c, 3, padding=1))
        self.from_t_s = zero_(nn.Linear(GUIDANCE_FEATURES, width[0]))
        self.from_guidance = zero_(nn.Linear(GUIDANCE_FEATURES, width[0]))

    def shared(self) -> dict[str, nn.Module]:
        """All of the Dash's children."""
        return dict(self.dash.named_children())

    def fold_(self) -> "TransformerDot":
        """See ``MorseDot.fold_``; here the copy is of the whole Dash."""
        super().fold_()
        whole = self.dash
        # A new Dash around the folded children, without a second copy of the weights.
        copy: nn.Module = object.__new__(type(whole))
        copy.__dict__.update({k: v for k, v in vars(whole).items() if k != "forward"})
        copy._modules = dict(self._copies)
        self._copies = {"": copy}
        return self

    def forward(
        self,
        x_s: Float[Tensor, "b ..."],
        x_i: Float[Tensor, "b ..."],
        z_s: Float[Tensor, "b ..."],
        t_s: Float[Tensor, " b"],
        t_i: Float[Tensor, " b"],
        cond: Cond | None = None,
    ) -> Float[Tensor, "b ..."]:
        """As ``UNetDot.forward``; Flux's samples are packed tokens [b, n, 4 c]."""
        cond = dict(cond or {})
        w = cond.pop("w", None)
        ids: Tensor = cond.get("img_ids", torch.empty(0))
        grid = token_grid(ids) if self.packed else None
        parts = [unpack(p, grid) if grid else p for p in (x_s, x_i, z_s.to(x_i.dtype))]
        self._check_sides(parts[1].shape[-2:])
        h = self.conv_in(torch.cat(parts, dim=1))
        shift = self.from_t_s(guidance_features(t_s, h))
        if w is not None:
            shift = shift + self.from_guidance(guidance_features(w, h))
        h = h + shift[..., None, None]
        skips = []
        for layer in self.down:
            skips.append(h)
            h = layer(nn.functional.silu(h))
        low = self.to_shared(h)
        if grid:
            cond["img_ids"] = coarse_ids(ids, grid, 2**self.shape.m)
        out = self._whole(pack(low) if grid else low, t_i, cond)
        if grid:
            out = unpack(out, (low.shape[-2] // 2, low.shape[-1] // 2))
        h = h + self.from_shared(out[:, : self.latent])
        for layer in self.up:
            large = nn.functional.interpolate(h, scale_factor=2, mode="nearest")
            h = layer(nn.functional.silu(torch.cat([large, skips.pop()], dim=1)))
        residual = self.conv_out(nn.functional.silu(h))
        return pack(residual) if grid else residual

    def _whole(self, low: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        """The Dash on a small latent."""
        kwargs = {k: v for k, v in cond.items() if k != "return_dict"}
        module: nn.Module = self._copies[""] if self._copies else self.dash

        def call(x: Tensor) -> Tensor:
            weights: dict[str, Tensor] = {}
            if "" not in self._copies:
                for root, child in self.shared().items():
                    for name, weight in self.residuals.folded(root, child).items():
                        weights[f"{root}.{name}"] = weight
            weights |= spanning_positions(module, x.shape[-2:], 2**self.shape.m)
            inputs = {"hidden_states": x, "timestep": t, **kwargs, "return_dict": False}
            return functional_call(module, weights, (), inputs)[0]

        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(call, low, use_reentrant=False)
        return call(low)

    def _check_sides(self, sides: Any) -> None:
        config: Any = self.dash.config
        factor = (2 if self.packed else config.patch_size) * 2**self.shape.m
        for side in sides:
            if side % factor or side < 2 * factor:
                low = max(2 * factor, side // factor * factor)
                raise ShapeError(
                    f"a latent side of {side} cannot be halved {self.shape.m} times before "
                    f"patches; use {low} or {low + factor}, or a Dot with a smaller m"
                )


def token_grid(ids: Tensor) -> tuple[int, int]:
    """Rows and columns of Flux's image tokens, from their position ids [n, 3]."""
    last = ids.reshape(-1, ids.shape[-1])[:, 1:].amax(0)
    return int(last[0]) + 1, int(last[1]) + 1


def unpack(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Flux tokens [b, h w, 4 c] as a latent [b, c, 2 h, 2 w]."""
    b, _, c = tokens.shape
    blocks = tokens.view(b, *grid, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return blocks.reshape(b, c // 4, 2 * grid[0], 2 * grid[1])


def pack(latent: Tensor) -> Tensor:
    """The inverse of ``unpack``."""
    b, c, h, w = latent.shape
    blocks = latent.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(b, (h // 2) * (w // 2), 4 * c)


def coarse_ids(ids: Tensor, grid: tuple[int, int], factor: int) -> Tensor:
    """Position ids of a coarser grid whose tokens sit in the middle of those they stand for."""
    rows, columns = (
        torch.arange(n // factor, device=ids.device) * factor + (factor - 1) / 2 for n in grid
    )
    coarse = torch.zeros(len(rows), len(columns), 3, device=ids.device)
    coarse[..., 0] = ids.reshape(-1, 3)[0, 0]
    coarse[..., 1], coarse[..., 2] = rows[:, None], columns[None]
    return coarse.view(-1, 3).to(ids.dtype if ids.is_floating_point() else torch.float32)


def spanning_positions(module: nn.Module, sides: Any, factor: int) -> dict[str, Tensor]:
    """SD3's position table, changed so that a small latent gets positions over the whole image.

    SD3 cuts the middle out of a table of fixed size, so a smaller latent would cover a smaller image.
    The other transformers compute positions for the grid at hand.
    """
    embed: Any = getattr(module, "pos_embed", None)
    size = getattr(embed, "pos_embed_max_size", None)
    if not size:
        return {}
    h, w = (side // embed.patch_size for side in sides)
    table = embed.pos_embed.view(1, size, size, -1).permute(0, 3, 1, 2)
    top, left = (size - h * factor) // 2, (size - w * factor) // 2
    if min(top, left) < 0:
        return {}
    cut = table[:, :, top : top + h * factor, left : left + w * factor]
    table = table.clone()
    top, left = (size - h) // 2, (size - w) // 2
    table[:, :, top : top + h, left : left + w] = nn.functional.avg_pool2d(cut, factor)
    return {"pos_embed.pos_embed": table.permute(0, 2, 3, 1).reshape(1, size * size, -1)}
