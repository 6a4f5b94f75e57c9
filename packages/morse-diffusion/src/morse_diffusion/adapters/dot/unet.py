"""A Dot around a UNet: a few extra levels outside, whose blocks see full-size images.

``x_s``, ``x_i`` and ``z_s`` enter through a new convolution, m extra down-sampling blocks halve the side
length, the Dash's blocks run with low-rank residuals on their weights, m extra up-sampling blocks come
back. Only the blocks of the Dash are shared: not its first and last convolution.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.unets.unet_2d_blocks import DownBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from jaxtyping import Float
from torch import Tensor, nn

from morse_diffusion.adapters.dot.base import (
    GUIDANCE_FEATURES,
    Cond,
    DotShape,
    MorseDot,
    guidance_features,
    outer_width,
    zero_init_,
)
from morse_diffusion.errors import ShapeError, UnsupportedDenoiserError
from morse_diffusion.method.lora import LowRankResiduals


class UNetDot(MorseDot):
    """Dot of ``UNet2DModel`` and ``UNet2DConditionModel``."""

    def __init__(self, dash: nn.Module, shape: DotShape) -> None:
        super().__init__(dash, shape)
        network: Any = dash
        if any(hasattr(block, "skip_conv") for block in network.down_blocks):
            raise UnsupportedDenoiserError(
                "skip blocks (NCSN++) pass a second image; use a UNet without them"
            )
        self.conditional = isinstance(dash, UNet2DConditionModel)
        self.residuals = LowRankResiduals(self.shared(), shape.lora_rank)
        self._add_extra_blocks(network.config, shape)

    @staticmethod
    def fits(dash: nn.Module) -> bool:
        """Return whether a network is one of diffusers' two UNets for images."""
        return isinstance(dash, UNet2DModel | UNet2DConditionModel)

    def _add_extra_blocks(self, config: Any, shape: DotShape) -> None:
        """Create what the Dot owns besides its residuals, from the outside inwards and back."""
        base, widths = config.block_out_channels[0], shape.channels
        embedding = config.time_embedding_dim or 4 * base
        groups = math.gcd(config.norm_num_groups or 32, base, *widths)
        options = {
            "temb_channels": embedding,
            "resnet_eps": config.norm_eps,
            "resnet_act_fn": config.act_fn,
            "resnet_groups": groups,
            "resnet_time_scale_shift": config.resnet_time_scale_shift,
        }

        # Down to the resolution at which the Dash's blocks run.
        inputs = 2 * config.in_channels + config.out_channels
        self.conv_in = nn.Conv2d(inputs, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            DownBlock2D(outer_width(widths, i), widths[i], num_layers=shape.layers, **options)
            for i in range(shape.m)
        )

        # Into the Dash's width, and back out of it.
        self.to_shared = nn.Conv2d(widths[-1], base, 1)
        self.from_shared = Upsample2D(base, use_conv=True)

        # Up again; an up block takes one skip more than the down block put aside.
        self.up = nn.ModuleList(
            UpBlock2D(
                outer_width(widths, i),
                base if i == shape.m - 1 else widths[i + 1],
                widths[i],
                num_layers=shape.layers + 1,
                add_upsample=i > 0,
                **options,
            )
            for i in reversed(range(shape.m))
        )
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=config.norm_eps)
        self.conv_out = zero_init_(nn.Conv2d(widths[0], config.out_channels, 3, padding=1))

        # What the Dash's time embedding does not tell: the earlier time and the guidance scale.
        self.from_t_s = zero_init_(nn.Linear(embedding, embedding))
        self.from_guidance = (
            zero_init_(nn.Linear(GUIDANCE_FEATURES, embedding)) if shape.guidance else None
        )

    def shared(self) -> dict[str, nn.Module]:
        """Return the time embedding and the down, middle and up blocks."""
        dash = self.dash
        roots = {"time_embedding": dash.time_embedding}
        roots |= {f"down_blocks.{i}": block for i, block in enumerate(dash.down_blocks)}
        if dash.mid_block is not None:
            roots["mid_block"] = dash.mid_block
        return roots | {f"up_blocks.{i}": block for i, block in enumerate(dash.up_blocks)}

    def check_sides(self, sides: Sequence[int]) -> None:
        """Refuse a sample whose sides the Dot cannot halve; see ``MorseDot.check_sides``."""
        m = self.shape.m
        inner = 2 ** (len(self.dash.config.block_out_channels) - 1)
        # At the deepest shared level a side of 1 leaves attention and norms nothing to work on.
        factor, least = inner * 2**m, 2 * inner * 2**m
        bad = [side for side in sides if side % factor or side < least]
        if bad:
            below = max(least, bad[0] // factor * factor)
            nearest = sorted({below, max(least, -(-bad[0] // factor) * factor)})
            raise ShapeError(
                f"a side of {bad[0]} cannot be halved {m} times outside the Dash; "
                f"use {' or '.join(map(str, nearest))}, or a Dot with a smaller m"
            )

    def forward(
        self,
        x_s: Float[Tensor, "b c h w"],
        x_i: Float[Tensor, "b c h w"],
        z_s: Float[Tensor, "b d h w"],
        t_s: Float[Tensor, " b"],
        t_i: Float[Tensor, " b"],
        cond: Cond | None = None,
    ) -> Float[Tensor, "b d h w"]:
        """Return the residual between the Dash estimates at ``t_s`` and ``t_i`` (Eq. 5).

        Args:
            x_s: What the Dash saw at its last step, as scaled by the scheduler.
            x_i: What it would see now.
            z_s: Its (guided) estimate then, in the residual space.
            t_s: Time of that step, as given to the network.
            t_i: Time now, smaller.
            cond: The Dash's other keyword arguments, and ``w``, the guidance scale.

        Raises:
            ShapeError: If the sides cannot be halved often enough.
        """
        self.check_sides(x_i.shape[-2:])
        embedding, block_inputs = self._embed(x_i, t_s, t_i, dict(cond or {}))

        # The Dot's own blocks on the way down.
        h = self.conv_in(torch.cat([x_s, x_i, z_s.to(x_i.dtype)], dim=1))
        skips = [h]
        for block in self.down:
            h, block_skips = block(h, embedding)
            skips += block_skips
        skips.pop()  # the last output goes on into the Dash, whose first skip it becomes

        # The Dash's blocks, and the Dot's own on the way back up.
        h = self._run_dash_blocks(self.to_shared(h), embedding, block_inputs)
        h = self.from_shared(h)
        n = self.shape.layers + 1  # skips of an up block
        for block in self.up:
            h, skips = block(h, tuple(skips[-n:]), embedding), skips[:-n]
        assert not skips
        return self.conv_out(nn.functional.silu(self.norm_out(h)))

    def _embed(
        self, x: Tensor, t_s: Tensor, t_i: Tensor, cond: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the Dash's time embedding for t_i plus learned terms, and the blocks' other inputs."""
        # Both times and the guidance scale.
        dash, scale = self.dash, cond.pop("w", None)
        now, then = (dash.time_proj(t).to(x.dtype) for t in (t_i, t_s))
        if self.conditional:
            embedding = self.run_shared("time_embedding", now, cond.get("timestep_cond"))
        else:
            embedding = self.run_shared("time_embedding", now)
        embedding = embedding + self.from_t_s(self.run_shared("time_embedding", then))
        if self.from_guidance is not None and scale is not None:
            embedding = embedding + self.from_guidance(guidance_features(scale, x))

        # A UNet without text takes at most a class.
        labels = cond.get("class_labels")
        if not self.conditional:
            if dash.class_embedding is not None:
                labels = dash.time_proj(labels) if dash.config.class_embed_type else labels
                embedding = embedding + dash.class_embedding(labels).to(x.dtype)
            return embedding, {}

        # Class, further conditions and text, in the order of UNet2DConditionModel.forward.
        text, added = cond["encoder_hidden_states"], cond.get("added_cond_kwargs") or {}
        of_class = dash.get_class_embed(sample=x, class_labels=labels)
        embedding = embedding if of_class is None else embedding + of_class
        augmented = dash.get_aug_embed(
            emb=embedding, encoder_hidden_states=text, added_cond_kwargs=added
        )
        embedding = embedding if augmented is None else embedding + augmented
        if dash.time_embed_act is not None:
            embedding = dash.time_embed_act(embedding)
        return embedding, {
            "encoder_hidden_states": dash.process_encoder_hidden_states(text, added),
            "attention_mask": None,
            "cross_attention_kwargs": cond.get("cross_attention_kwargs"),
            "encoder_attention_mask": attention_bias(cond.get("encoder_attention_mask"), x.dtype),
        }

    def _run_dash_blocks(self, h: Tensor, embedding: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Run the Dash's own down, middle and up blocks, on a smaller image."""
        dash = self.dash

        def inputs_of(block: nn.Module) -> dict[str, Any]:
            return inputs if getattr(block, "has_cross_attention", False) else {}

        # Down and through the middle.
        skips: tuple[Tensor, ...] = (h,)
        for i, block in enumerate(dash.down_blocks):
            h, block_skips = self.run_shared(f"down_blocks.{i}", h, embedding, **inputs_of(block))
            skips += block_skips
        if dash.mid_block is not None:
            h = self.run_shared("mid_block", h, embedding, **inputs_of(dash.mid_block))

        # Up, consuming the skips from the last to the first.
        for i, block in enumerate(dash.up_blocks):
            n = len(block.resnets)
            h = self.run_shared(f"up_blocks.{i}", h, skips[-n:], embedding, **inputs_of(block))
            skips = skips[:-n]
        return h


def attention_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a mask of text tokens (1 keeps) as the additive bias that attention blocks take."""
    return None if mask is None else ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)
