"""The Dot: a few extra blocks around the frozen Dash, whose own blocks then see 4**m times fewer pixels.

Section 3.2 of the Morse paper. ``x_s``, ``x_i`` and ``z_s`` enter through a new convolution, m extra
down-sampling blocks halve the side length, the Dash's blocks run with low-rank residuals on their
weights, m extra up-sampling blocks come back. The last convolution starts at zero: an untrained Dot
repeats the last Dash estimate.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.unets.unet_2d_blocks import DownBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from morse_diffusion.adapters.calls import device_of_weights
from morse_diffusion.errors import ShapeError, UnsupportedDenoiserError
from morse_diffusion.lora import LowRankResiduals

GUIDANCE_FEATURES = 64
Cond = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class DotShape:
    """What a Dot is made of; saved in its ``config.json``.

    Args:
        m: Extra halvings of the side length; the paper uses 2, and 1 for few-step models.
        channels: Width of each extra level, outermost first (paper, SD v1.4: 96 and 160).
        layers: Residual blocks per extra down block; an up block has one more.
        lora_rank: Rank of the residuals on the shared weights (paper, SD v1.4: 64).
        guidance: Range of guidance scales that the Dot is trained on; None without guidance.
    """

    m: int = 2
    channels: tuple[int, ...] = (96, 160)
    layers: int = 1
    lora_rank: int = 64
    guidance: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.m < 1 or self.layers < 1 or self.lora_rank < 1:
            raise ShapeError(
                f"m {self.m}, layers {self.layers}, rank {self.lora_rank}: "
                "each must be 1 or more; without a halving the Dot is as slow as the Dash"
            )
        if len(self.channels) != self.m or min(self.channels) < 1:
            raise ShapeError(
                f"channels {list(self.channels)} do not give one width for each of m={self.m} "
                f"levels; give {self.m} positive numbers"
            )


class MorseDot(nn.Module, ABC):
    """A Dot around one Dash. Only its own weights are parameters; the Dash is a plain reference.

    ``forward(x_s, x_i, z_s, t_s, t_i, cond)`` is Eq. 5 of the paper: the residual to add to ``z_s``.
    """

    shape: DotShape
    dash: Any
    residuals: LowRankResiduals

    def __init__(self, dash: nn.Module, shape: DotShape) -> None:
        super().__init__()
        # Past nn.Module's registry: state_dict, .to() and optimizers must not see the Dash.
        object.__setattr__(self, "dash", dash)
        self.shape = shape
        self.gradient_checkpointing = False
        self.trained: dict[str, Any] = {}  # what save_pretrained was told about the training
        self.dash_fingerprint: str | None = None  # of the Dash it was saved with
        self._copies: dict[str, nn.Module] = {}

    @staticmethod
    def build(dash: nn.Module, shape: DotShape | None = None, **settings: Any) -> "MorseDot":
        """Make an untrained Dot, on the Dash's device.

        Args:
            dash: ``UNet2DModel`` or ``UNet2DConditionModel``; experimental: a DiT, PixArt, SD3 or
                Flux transformer.
            shape: What it is made of.
            settings: Fields of ``DotShape``, instead of ``shape``.

        Raises:
            UnsupportedDenoiserError: If the Dash is of another class, or offloaded layer by layer.
        """
        from morse_diffusion.adapters.dot_transformer import TransformerDot, is_transformer

        shape = shape or DotShape(**settings)
        kind = TransformerDot if is_transformer(dash) else UNetDot
        return kind(dash, shape).to(device_of_weights(dash))

    @staticmethod
    def from_pretrained(path: str, dash: nn.Module, *, strict: bool = True) -> "MorseDot":
        """Load what ``save_pretrained`` wrote; see ``adapters.files.load_dot``."""
        from morse_diffusion.adapters.files import load_dot

        return load_dot(path, dash, strict=strict)

    def save_pretrained(self, path: str, training: Mapping[str, Any] | None = None) -> None:
        """Write a folder without any Dash weight; see ``adapters.files.save_dot``."""
        from morse_diffusion.adapters.files import save_dot

        save_dot(self, path, training or {})

    def prepare(self, denoiser: nn.Module, scheduler: Any, *, strict: bool = True) -> None:
        """Get ready to sample beside ``denoiser``: check that they belong together, fold once.

        Raises:
            DotMismatchError: If the Dot was trained for another Dash or scheduler; with
                ``strict=False`` a warning.
            UnsupportedDenoiserError: If the denoiser is offloaded layer by layer.
        """
        from morse_diffusion.adapters.files import check_fits, fingerprint

        device = device_of_weights(denoiser)
        check_fits(self, denoiser, scheduler, strict=strict)
        if self.dash is not denoiser and fingerprint(self.dash) == fingerprint(denoiser):
            # Another copy of the same network: the one that runs is also the one in the right place.
            object.__setattr__(self, "dash", denoiser)
            self._copies = {}

        # An offloaded Dash comes to its device with its first call, and the Dot follows it there.
        if not hasattr(denoiser, "_hf_hook"):
            self.follow(denoiser, device)

    def follow(self, denoiser: nn.Module, device: torch.device) -> None:
        """Be folded on ``device``, in the dtype of the denoiser; does nothing where that is so."""
        own, dtype = next(self.parameters()), next(denoiser.parameters()).dtype
        if not self._copies or (own.device, own.dtype) != (device, dtype):
            self.to(device, dtype).fold_()

    @abstractmethod
    def shared(self) -> dict[str, nn.Module]:
        """The Dash's modules that the Dot runs, by their path in the Dash."""

    def own_parameters(self) -> int:
        """Number of trainable weights."""
        return sum(p.numel() for p in self.parameters())

    def fold_(self) -> "MorseDot":
        """Copy the shared blocks with the residuals added, on the Dot's device, for fast sampling.

        Costs the memory of one more Dash; ``train()`` and ``.to()`` drop the copies again.
        """
        copies, device = {}, next(self.parameters()).device
        elsewhere = next(self.dash.parameters()).device != device  # beside another copy of it
        for root, module in self.shared().items():
            weights = self.residuals.folded(root, module)
            copies[root] = copy.deepcopy(module).requires_grad_(False)
            if elsewhere:
                copies[root].to(device)
            parameters = dict(copies[root].named_parameters())
            with torch.no_grad():
                for name, weight in weights.items():
                    parameters[name].copy_(weight)
        self._copies = copies
        return self.eval()

    def train(self, mode: bool = True) -> "MorseDot":
        """As in torch; training works on the live weights of the Dash."""
        if mode:
            self._copies = {}
        super().train(mode)
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._copies = {}
        return super()._apply(*args, **kwargs)

    def _run(self, root: str, *args: Any, **kwargs: Any) -> Any:
        """Call one shared module with the residuals on its weights."""
        if root in self._copies:
            return self._copies[root](*args, **kwargs)
        module = self.shared()[root]

        def folded(*inputs: Any) -> Any:
            return functional_call(module, self.residuals.folded(root, module), inputs, kwargs)

        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(folded, *args, use_reentrant=False)
        return folded(*args)


class UNetDot(MorseDot):
    """Dot of ``UNet2DModel`` and ``UNet2DConditionModel``."""

    def __init__(self, dash: nn.Module, shape: DotShape) -> None:
        super().__init__(dash, shape)
        from diffusers import UNet2DConditionModel, UNet2DModel

        if not isinstance(dash, UNet2DModel | UNet2DConditionModel):
            raise UnsupportedDenoiserError(
                f"{type(dash).__name__} is no denoiser that a Dot fits around; use UNet2DModel, "
                "UNet2DConditionModel, or (experimental) a DiT, PixArt, SD3 or Flux transformer"
            )
        if any(hasattr(block, "skip_conv") for block in dash.down_blocks):
            raise UnsupportedDenoiserError(
                "skip blocks (NCSN++) pass a second image; use a UNet without them"
            )
        self.conditional = isinstance(dash, UNet2DConditionModel)
        self.residuals = LowRankResiduals(self.shared(), shape.lora_rank)
        self._make_extra_blocks(dash.config, shape)

    def _make_extra_blocks(self, config: Any, shape: DotShape) -> None:
        base, width = config.block_out_channels[0], shape.channels
        temb = config.time_embedding_dim or 4 * base
        groups = math.gcd(config.norm_num_groups or 32, base, *width)
        options = {
            "temb_channels": temb,
            "resnet_eps": config.norm_eps,
            "resnet_act_fn": config.act_fn,
            "resnet_groups": groups,
            "resnet_time_scale_shift": config.resnet_time_scale_shift,
        }
        inputs = 2 * config.in_channels + config.out_channels
        self.conv_in = nn.Conv2d(inputs, width[0], 3, padding=1)
        self.down = nn.ModuleList(
            DownBlock2D(max_before(width, i), width[i], num_layers=shape.layers, **options)
            for i in range(shape.m)
        )
        self.to_shared = nn.Conv2d(width[-1], base, 1)
        self.from_shared = Upsample2D(base, use_conv=True)
        self.up = nn.ModuleList(
            UpBlock2D(
                max_before(width, i),
                base if i == shape.m - 1 else width[i + 1],
                width[i],
                num_layers=shape.layers + 1,
                add_upsample=i > 0,
                **options,
            )
            for i in reversed(range(shape.m))
        )
        self.norm_out = nn.GroupNorm(groups, width[0], eps=config.norm_eps)
        self.conv_out = zero_(nn.Conv2d(width[0], config.out_channels, 3, padding=1))
        self.from_t_s = zero_(nn.Linear(temb, temb))
        self.from_guidance = zero_(nn.Linear(GUIDANCE_FEATURES, temb)) if shape.guidance else None

    def shared(self) -> dict[str, nn.Module]:
        """Time embedding, down, middle and up blocks."""
        dash = self.dash
        roots = {"time_embedding": dash.time_embedding}
        roots |= {f"down_blocks.{i}": block for i, block in enumerate(dash.down_blocks)}
        if dash.mid_block is not None:
            roots["mid_block"] = dash.mid_block
        return roots | {f"up_blocks.{i}": block for i, block in enumerate(dash.up_blocks)}

    def forward(
        self,
        x_s: Float[Tensor, "b c h w"],
        x_i: Float[Tensor, "b c h w"],
        z_s: Float[Tensor, "b d h w"],
        t_s: Float[Tensor, " b"],
        t_i: Float[Tensor, " b"],
        cond: Cond | None = None,
    ) -> Float[Tensor, "b d h w"]:
        """Residual between the Dash estimates at ``t_s`` and ``t_i`` (Eq. 5).

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
        check_sides(self.dash, self.shape.m, x_i.shape[-2:])
        cond = dict(cond or {})
        emb, blocks = self._embed(x_i, t_s, t_i, cond)
        h = self.conv_in(torch.cat([x_s, x_i, z_s.to(x_i.dtype)], dim=1))
        skips = [h]
        for block in self.down:
            h, more = block(h, emb)
            skips += more
        skips.pop()  # the last output goes on into the Dash, whose first skip it becomes
        h = self._shared_part(self.to_shared(h), emb, blocks)
        h = self.from_shared(h)
        for block in self.up:
            n = self.shape.layers + 1
            h, skips = block(h, tuple(skips[-n:]), emb), skips[:-n]
        assert not skips
        return self.conv_out(nn.functional.silu(self.norm_out(h)))

    def _embed(
        self, x: Tensor, t_s: Tensor, t_i: Tensor, cond: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Time embedding of the Dash for t_i plus learned terms, and the blocks' other inputs."""
        dash, w = self.dash, cond.pop("w", None)
        now, then = (dash.time_proj(t).to(x.dtype) for t in (t_i, t_s))
        if self.conditional:
            emb = self._run("time_embedding", now, cond.get("timestep_cond"))
        else:
            emb = self._run("time_embedding", now)
        emb = emb + self.from_t_s(self._run("time_embedding", then))
        if self.from_guidance is not None and w is not None:
            emb = emb + self.from_guidance(guidance_features(w, x))
        labels = cond.get("class_labels")
        if not self.conditional:
            if dash.class_embedding is not None:
                labels = dash.time_proj(labels) if dash.config.class_embed_type else labels
                emb = emb + dash.class_embedding(labels).to(x.dtype)
            return emb, {}
        text, added = cond["encoder_hidden_states"], cond.get("added_cond_kwargs") or {}
        class_emb = dash.get_class_embed(sample=x, class_labels=labels)
        emb = emb if class_emb is None else emb + class_emb
        aug = dash.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=added)
        emb = emb if aug is None else emb + aug
        emb = emb if dash.time_embed_act is None else dash.time_embed_act(emb)
        text = dash.process_encoder_hidden_states(text, added)
        return emb, {
            "encoder_hidden_states": text,
            "attention_mask": None,
            "cross_attention_kwargs": cond.get("cross_attention_kwargs"),
            "encoder_attention_mask": mask_to_bias(cond.get("encoder_attention_mask"), x.dtype),
        }

    def _shared_part(self, h: Tensor, emb: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The Dash's own down, middle and up blocks, on a smaller image."""
        dash = self.dash

        def extra(block: nn.Module) -> dict[str, Any]:
            return inputs if getattr(block, "has_cross_attention", False) else {}

        skips: tuple[Tensor, ...] = (h,)
        for i, block in enumerate(dash.down_blocks):
            h, more = self._run(f"down_blocks.{i}", h, emb, **extra(block))
            skips += more
        if dash.mid_block is not None:
            h = self._run("mid_block", h, emb, **extra(dash.mid_block))
        for i, block in enumerate(dash.up_blocks):
            n = len(block.resnets)
            h = self._run(f"up_blocks.{i}", h, skips[-n:], emb, **extra(block))
            skips = skips[:-n]
        return h


def max_before(width: tuple[int, ...], i: int) -> int:
    """Width of the level outside level ``i``."""
    return width[max(i - 1, 0)]


def zero_(layer: Any) -> Any:
    """Set a layer's weight and bias to zero, in place."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def guidance_features(w: Any, x: Tensor) -> Float[Tensor, "b f"]:
    """Sines and cosines of the guidance scale, [b, GUIDANCE_FEATURES]."""
    scale = torch.as_tensor(w, dtype=torch.float32, device=x.device).expand(x.shape[0])
    octaves = torch.arange(GUIDANCE_FEATURES // 2, device=x.device) / 4 - 4
    angles = scale[:, None] * 2.0**octaves
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(x.dtype)


def mask_to_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask of text tokens (1 keeps) as the additive bias that attention blocks take."""
    return None if mask is None else ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)


def check_sides(dash: Any, m: int, sides: Any) -> None:
    """Refuse a sample whose sides the Dot cannot halve.

    Raises:
        ShapeError: Naming the nearest sizes that work.
    """
    inner = 2 ** (len(dash.config.block_out_channels) - 1)
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
