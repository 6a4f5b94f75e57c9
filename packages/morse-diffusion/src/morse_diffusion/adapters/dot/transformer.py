"""Experimental: a Dot around a whole transformer, which then sees 4**m times fewer tokens.

The paper evaluates UNets only. Here convolutions shrink the latent, the Dash runs as a whole with
low-rank residuals on its weights, convolutions come back. Text tokens do not shrink, so N stays smaller
than for a UNet.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from morse_diffusion.adapters.dot.base import (
    GUIDANCE_FEATURES,
    Cond,
    DotShape,
    MorseDot,
    guidance_features,
    outer_width,
    zero_init_,
)
from morse_diffusion.errors import ShapeError
from morse_diffusion.method.lora import LowRankResiduals

TRANSFORMER_CLASSES = (
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
)
WHOLE = ""  # name of the folded copy of the whole Dash


class TransformerDot(MorseDot):
    """Dot of DiT, PixArt, SD3 and Flux; ``t_s`` and ``w`` enter beside the first convolution."""

    def __init__(self, dash: nn.Module, shape: DotShape) -> None:
        super().__init__(dash, shape)
        config: Any = dash.config
        self.packed = type(dash).__name__.startswith("Flux")
        self.latent = config.in_channels // 4 if self.packed else config.in_channels
        self.residuals = LowRankResiduals(dict(dash.named_children()), shape.lora_rank)

        # Down to the Dash's resolution, through it, and up again.
        widths, c = shape.channels, self.latent
        self.conv_in = nn.Conv2d(3 * c, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            nn.Conv2d(outer_width(widths, i), widths[i], 3, stride=2, padding=1)
            for i in range(shape.m)
        )
        self.to_shared = nn.Conv2d(widths[-1], c, 1)
        self.from_shared = nn.Conv2d(c, widths[-1], 1)
        self.up = nn.ModuleList(
            nn.Conv2d(widths[i] + outer_width(widths, i), outer_width(widths, i), 3, padding=1)
            for i in reversed(range(shape.m))
        )

        # What starts at zero: the output, and the terms that the Dash's own inputs do not tell.
        self.conv_out = zero_init_(nn.Conv2d(widths[0], c, 3, padding=1))
        self.from_t_s = zero_init_(nn.Linear(GUIDANCE_FEATURES, widths[0]))
        self.from_guidance = zero_init_(nn.Linear(GUIDANCE_FEATURES, widths[0]))

    @staticmethod
    def fits(dash: nn.Module) -> bool:
        """Return whether a network is one of ``TRANSFORMER_CLASSES``."""
        return type(dash).__name__ in TRANSFORMER_CLASSES

    def shared(self) -> dict[str, nn.Module]:
        """Return all of the Dash's children."""
        return dict(self.dash.named_children())

    def check_sides(self, sides: Sequence[int]) -> None:
        """Refuse a latent whose sides the Dot cannot halve; see ``MorseDot.check_sides``."""
        config: Any = self.dash.config
        factor = (2 if self.packed else config.patch_size) * 2**self.shape.m
        for side in sides:
            if side % factor or side < 2 * factor:
                low = max(2 * factor, side // factor * factor)
                raise ShapeError(
                    f"a latent side of {side} cannot be halved {self.shape.m} times before "
                    f"patches; use {low} or {low + factor}, or a Dot with a smaller m"
                )

    def fold_(self) -> "TransformerDot":
        """Copy the whole Dash with the residuals added; see ``MorseDot.fold_``."""
        super().fold_()
        dash = self.dash
        # A new Dash around the folded children, without a second copy of the weights.
        folded: nn.Module = object.__new__(type(dash))
        folded.__dict__.update({k: v for k, v in vars(dash).items() if k != "forward"})
        folded._modules = dict(self._folded)
        self._folded = {WHOLE: folded}
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
        """Return the residual as ``UNetDot.forward`` does.

        Flux's samples are packed tokens [b, n, 4 c]; those of the others are latents [b, c, h, w].
        """
        # Latents in place of packed tokens.
        cond = dict(cond or {})
        scale = cond.pop("w", None)
        ids: Tensor = cond.get("img_ids", torch.empty(0))
        grid = token_grid(ids) if self.packed else None
        latents = [unpack(p, grid) if grid else p for p in (x_s, x_i, z_s.to(x_i.dtype))]
        self.check_sides(latents[1].shape[-2:])

        # The earlier time and the guidance scale shift the first features.
        h = self.conv_in(torch.cat(latents, dim=1))
        shift = self.from_t_s(guidance_features(t_s, h))
        if scale is not None:
            shift = shift + self.from_guidance(guidance_features(scale, h))
        h = h + shift[..., None, None]

        # Down, through the Dash, and up.
        skips = []
        for layer in self.down:
            skips.append(h)
            h = layer(nn.functional.silu(h))
        h = h + self.from_shared(self._run_dash(self.to_shared(h), t_i, cond, grid))
        for layer in self.up:
            large = nn.functional.interpolate(h, scale_factor=2, mode="nearest")
            h = layer(nn.functional.silu(torch.cat([large, skips.pop()], dim=1)))
        residual = self.conv_out(nn.functional.silu(h))
        return pack(residual) if grid else residual

    def _run_dash(
        self, low: Tensor, t: Tensor, cond: dict[str, Any], grid: tuple[int, int] | None
    ) -> Tensor:
        """Run the Dash on a small latent [b, c, h, w]; the result has the same shape.

        Args:
            low: The latent.
            t: Times, [b].
            cond: The Dash's other inputs.
            grid: Rows and columns of the large latent's tokens, for Flux; None for the others.
        """
        if grid is None:
            return self._call_dash(low, t, cond)[:, : self.latent]
        coarse = coarse_ids(cond["img_ids"], grid, 2**self.shape.m)
        tokens = self._call_dash(pack(low), t, {**cond, "img_ids": coarse})
        return unpack(tokens, (low.shape[-2] // 2, low.shape[-1] // 2))[:, : self.latent]

    def _call_dash(self, low: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        """Call the Dash as it is called by its pipeline, with the residuals on its weights."""
        kwargs = {k: v for k, v in cond.items() if k != "return_dict"}
        folded = self._folded.get(WHOLE)
        module: nn.Module = self.dash if folded is None else folded

        def call(x: Tensor) -> Tensor:
            weights: dict[str, Tensor] = {}
            if folded is None:
                for root, child in self.shared().items():
                    for name, weight in self.residuals.folded_weights(root, child).items():
                        weights[f"{root}.{name}"] = weight
            weights |= spanning_positions(module, x.shape[-2:], 2**self.shape.m)
            inputs = {"hidden_states": x, "timestep": t, **kwargs, "return_dict": False}
            return functional_call(module, weights, (), inputs)[0]

        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(call, low, use_reentrant=False)
        return call(low)


def token_grid(ids: Tensor) -> tuple[int, int]:
    """Return rows and columns of Flux's image tokens, from their position ids [n, 3]."""
    last = ids.reshape(-1, ids.shape[-1])[:, 1:].amax(0)
    return int(last[0]) + 1, int(last[1]) + 1


def unpack(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return Flux tokens [b, h w, 4 c] as a latent [b, c, 2 h, 2 w]."""
    b, _, c = tokens.shape
    blocks = tokens.view(b, *grid, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return blocks.reshape(b, c // 4, 2 * grid[0], 2 * grid[1])


def pack(latent: Tensor) -> Tensor:
    """Return a latent as Flux tokens; the inverse of ``unpack``."""
    b, c, h, w = latent.shape
    blocks = latent.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(b, (h // 2) * (w // 2), 4 * c)


def coarse_ids(ids: Tensor, grid: tuple[int, int], factor: int) -> Tensor:
    """Return position ids of a coarser grid; its tokens sit in the middle of those they stand for.

    Args:
        ids: Position ids of the fine grid, [n, 3].
        grid: Its rows and columns.
        factor: How many fine tokens a coarse one spans in each direction.
    """
    rows, columns = (
        torch.arange(n // factor, device=ids.device) * factor + (factor - 1) / 2 for n in grid
    )
    coarse = torch.zeros(len(rows), len(columns), 3, device=ids.device)
    coarse[..., 0] = ids.reshape(-1, 3)[0, 0]
    coarse[..., 1], coarse[..., 2] = rows[:, None], columns[None]
    return coarse.view(-1, 3).to(ids.dtype if ids.is_floating_point() else torch.float32)


def spanning_positions(module: nn.Module, sides: Sequence[int], factor: int) -> dict[str, Tensor]:
    """Return SD3's position table, changed so that a small latent gets the whole image's positions.

    SD3 cuts the middle out of a table of fixed size, so a smaller latent would cover a smaller image.
    The other transformers compute positions for the grid at hand; for them the result is empty.

    Args:
        module: The transformer.
        sides: Height and width of the small latent.
        factor: How many times smaller its sides are than those of the image's latent.
    """
    embed: Any = getattr(module, "pos_embed", None)
    size = getattr(embed, "pos_embed_max_size", None)
    if not size:
        return {}

    # The part of the table that the large latent would get.
    h, w = (side // embed.patch_size for side in sides)
    table = embed.pos_embed.view(1, size, size, -1).permute(0, 3, 1, 2)
    top, left = (size - h * factor) // 2, (size - w * factor) // 2
    if min(top, left) < 0:
        return {}
    large = table[:, :, top : top + h * factor, left : left + w * factor]

    # Averaged, it takes the place of the part that the small latent gets.
    table = table.clone()
    top, left = (size - h) // 2, (size - w) // 2
    table[:, :, top : top + h, left : left + w] = nn.functional.avg_pool2d(large, factor)
    return {"pos_embed.pos_embed": table.permute(0, 2, 3, 1).reshape(1, size * size, -1)}
