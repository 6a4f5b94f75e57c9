"""What every Dot has in common: its shape, the weights that it borrows from the Dash, its files.

Section 3.2 of the Morse paper. A Dot wraps a few trainable blocks around the frozen Dash. The Dash's own
blocks then run on 4**m times fewer pixels, with low-rank residuals on their weights. The last layer
starts at zero, so an untrained Dot repeats the last Dash estimate.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from effml_common.logging import warn
from morse_diffusion.adapters.calls import device_of_weights
from morse_diffusion.adapters.dot.io import (
    check_match,
    fingerprint,
    read_config,
    read_weights,
    write_dot,
)
from morse_diffusion.adapters.schedulers import family_of, prediction_of
from morse_diffusion.errors import DotMismatchError, ShapeError, UnsupportedDenoiserError
from morse_diffusion.method.lora import LowRankResiduals

GUIDANCE_FEATURES = 64  # sines and cosines that stand for one guidance scale or time
RESIDUALS_PREFIX = "residuals."  # of their names in a Dot's state_dict
Cond = Mapping[str, Any]  # keyword arguments of the Dash besides the sample and the time


@dataclass(frozen=True, kw_only=True)
class DotShape:
    """What a Dot is made of; saved in its ``config.json``.

    Args:
        m: Extra halvings of the side length; the paper uses 2, and 1 for few-step models.
        channels: Width of each extra level, outermost first (paper, SD v1.4: 96 and 160).
        layers: Residual blocks per extra down block; an up block has one more.
        lora_rank: Rank of the residuals on the shared weights (paper, SD v1.4: 64).
        guidance: Range of guidance scales that the Dot is trained on; None without guidance.

    Raises:
        ShapeError: If a count is below 1, or the widths do not match ``m``.
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

    def to_json(self) -> dict[str, Any]:
        """Return the fields as they stand in ``config.json``."""
        return {
            "m": self.m,
            "channels": list(self.channels),
            "layers": self.layers,
            "lora_rank": self.lora_rank,
            "lora_conv_form": "k x k down, 1 x 1 up",
            "guidance": list(self.guidance) if self.guidance else None,
        }

    @staticmethod
    def from_json(config: Mapping[str, Any]) -> "DotShape":
        """Read the fields of a ``config.json``."""
        return DotShape(
            m=config["m"],
            channels=tuple(config["channels"]),
            layers=config["layers"],
            lora_rank=config["lora_rank"],
            guidance=tuple(config["guidance"]) if config["guidance"] else None,
        )


class MorseDot(nn.Module, ABC):
    """A Dot around one Dash. Only its own weights are parameters; the Dash is a plain reference.

    ``forward(x_s, x_i, z_s, t_s, t_i, cond)`` is Eq. 5 of the paper: the residual to add to ``z_s``.
    Every subclass answers for one family of networks, see ``fits``.

    >>> from diffusers import UNet2DModel
    >>> dash = UNet2DModel(sample_size=16, block_out_channels=(8, 8), norm_num_groups=4,
    ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    >>> dot = MorseDot.build(dash, m=1, channels=(4,), lora_rank=2)
    >>> x, t = torch.randn(1, 3, 16, 16), torch.tensor([800.0])
    >>> dot(x, x, x, t, t - 200).shape
    torch.Size([1, 3, 16, 16])
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
        self._folded: dict[str, nn.Module] = {}

    @staticmethod
    @abstractmethod
    def fits(dash: nn.Module) -> bool:
        """Return whether this kind of Dot can be built around a network."""

    @abstractmethod
    def shared(self) -> dict[str, nn.Module]:
        """Return the Dash's modules that the Dot runs, by their path in the Dash."""

    @abstractmethod
    def check_sides(self, sides: Sequence[int]) -> None:
        """Refuse a sample whose height or width the Dot cannot halve often enough.

        Raises:
            ShapeError: With the nearest sizes that work.
        """

    @staticmethod
    def build(dash: nn.Module, shape: DotShape | None = None, **settings: Any) -> "MorseDot":
        """Build an untrained Dot, on the Dash's device.

        Args:
            dash: ``UNet2DModel`` or ``UNet2DConditionModel``; experimental: a DiT, PixArt, SD3 or
                Flux transformer.
            shape: What it is made of.
            settings: Fields of ``DotShape``, instead of ``shape``.

        Raises:
            UnsupportedDenoiserError: If the Dash is of another class, or offloaded layer by layer.
        """
        shape = shape or DotShape(**settings)
        for kind in MorseDot.__subclasses__():
            if kind.fits(dash):
                return kind(dash, shape).to(device_of_weights(dash))
        raise UnsupportedDenoiserError(
            f"{type(dash).__name__} is no denoiser that a Dot fits around; use UNet2DModel, "
            "UNet2DConditionModel, or (experimental) a DiT, PixArt, SD3 or Flux transformer"
        )

    @staticmethod
    def from_pretrained(path: str | Path, dash: nn.Module, *, strict: bool = True) -> "MorseDot":
        """Load a Dot around its Dash, in eval mode, on the Dash's device.

        Args:
            path: Folder that ``save_pretrained`` wrote.
            dash: The Dash it was trained for.
            strict: Refuse another Dash; else only warn.

        Raises:
            DotMismatchError: If the Dash or the files differ from what was saved.
            UnsupportedDenoiserError: If the Dash is offloaded layer by layer.
        """
        # The folder must hold a Dot, and the Dot must be one of this Dash.
        config = read_config(path)
        device_of_weights(dash)
        shape = DotShape.from_json(config)
        saved = {name: config[name] for name in ("dash_class", "dash_fingerprint")}
        current = {"dash_class": type(dash).__name__, "dash_fingerprint": fingerprint(dash)}
        check_match(saved, current, strict=strict)

        # Its weights replace those of an untrained Dot; none may be missing or left over.
        dot = MorseDot.build(dash, shape)
        try:
            blocks, residuals = read_weights(path)
            missing, unexpected = dot.load_state_dict(blocks, strict=False)
            lost = [name for name in missing if not name.startswith(RESIDUALS_PREFIX)]
            if lost or unexpected:
                raise ValueError(f"{len(lost)} tensors are missing, {len(unexpected)} too many")
            dot.residuals.load_peft_state(residuals)
        except Exception as error:  # a damaged file makes the readers fail in their own ways
            raise DotMismatchError(
                f"the weights in {path} do not fit this Dash ({error}); train a Dot for it"
            ) from error
        dot.trained, dot.dash_fingerprint = config["training"], config["dash_fingerprint"]
        return dot.eval()

    def save_pretrained(self, path: str | Path, training: Mapping[str, Any] | None = None) -> None:
        """Write the Dot into a folder, created if missing; no weight of the Dash goes with it.

        Args:
            path: Folder.
            training: What it was trained on: ``family``, ``prediction``, ``steps_of_process`` and
                others.

        Raises:
            OSError: If the folder cannot be written.
        """
        # What the two JSON files say.
        config = {
            "dash_class": type(self.dash).__name__,
            "dash_fingerprint": fingerprint(self.dash),
            **self.shape.to_json(),
            "training": {**self.trained, **(training or {})},
        }
        adapter = {
            "peft_type": "LORA",
            "r": self.shape.lora_rank,
            "lora_alpha": self.residuals.alpha,
            "target_modules": sorted(self.residuals.paths),
            "bias": "none",
            "inference_mode": True,
        }

        # The weights, residuals apart from the rest.
        blocks = {
            name: tensor
            for name, tensor in self.state_dict().items()
            if not name.startswith(RESIDUALS_PREFIX)
        }
        write_dot(Path(path), config, adapter, blocks, self.residuals.peft_state())

    def prepare(self, denoiser: nn.Module, scheduler: Any, *, strict: bool = True) -> None:
        """Get ready to sample beside ``denoiser``: check that they belong together, fold once.

        Args:
            denoiser: The network that the pipeline calls.
            scheduler: The pipeline's scheduler.
            strict: Refuse a Dot that was trained for another Dash or scheduler; else only warn.

        Raises:
            DotMismatchError: If they do not belong together.
            UnsupportedDenoiserError: If the denoiser is offloaded layer by layer.
        """
        device = device_of_weights(denoiser)
        self._check_fits(denoiser, scheduler, strict=strict)

        # Another copy of the same network: the one that runs is also the one in the right place.
        if self.dash is not denoiser and fingerprint(self.dash) == fingerprint(denoiser):
            object.__setattr__(self, "dash", denoiser)
            self._folded = {}

        # An offloaded Dash comes to its device with its first call, and the Dot follows it there.
        if not hasattr(denoiser, "_hf_hook"):
            self.follow(denoiser, device)

    def _check_fits(self, denoiser: nn.Module, scheduler: Any, *, strict: bool) -> None:
        """Compare with the network and the scheduler that the Dot is about to run beside."""
        current_dash = fingerprint(denoiser)
        if self.dash is not denoiser:
            check_match({"Dash": fingerprint(self.dash)}, {"Dash": current_dash}, strict=strict)
        has_lora = bool(getattr(denoiser, "peft_config", None))
        if self.dash_fingerprint not in (None, current_dash) or has_lora:
            warn(
                "the Dash has a LoRA or other weights that the Dot was not trained with: its residuals "
                "fit less well, so give it fewer steps"
            )

        # A Dot that was trained without a record of its process fits any scheduler.
        current = {
            "family": family_of(scheduler),
            "prediction": prediction_of(scheduler),
            "steps_of_process": int(scheduler.config.get("num_train_timesteps") or 1000),
        }
        saved = {name: self.trained[name] for name in current if name in self.trained}
        check_match(saved, current, strict=strict)

    def follow(self, denoiser: nn.Module, device: torch.device) -> None:
        """Be folded on ``device``, in the dtype of the denoiser; do nothing where that is so."""
        own, dtype = next(self.parameters()), next(denoiser.parameters()).dtype
        if not self._folded or (own.device, own.dtype) != (device, dtype):
            self.to(device, dtype).fold_()

    def own_parameters(self) -> int:
        """Return the number of trainable weights."""
        return sum(p.numel() for p in self.parameters())

    def fold_(self) -> "MorseDot":
        """Copy the shared blocks with the residuals added, on the Dot's device, for fast sampling.

        Costs the memory of one more Dash; ``train()`` and ``.to()`` drop the copies again.

        Returns:
            The Dot itself, in eval mode.
        """
        copies, device = {}, next(self.parameters()).device
        is_elsewhere = next(self.dash.parameters()).device != device  # beside another copy of it
        for root, module in self.shared().items():
            weights = self.residuals.folded_weights(root, module)
            copies[root] = copy.deepcopy(module).requires_grad_(False)
            if is_elsewhere:
                copies[root].to(device)
            parameters = dict(copies[root].named_parameters())
            with torch.no_grad():
                for name, weight in weights.items():
                    parameters[name].copy_(weight)

        self._folded = copies
        return self.eval()

    def train(self, mode: bool = True) -> "MorseDot":
        """Switch the mode as in torch; training works on the live weights of the Dash."""
        if mode:
            self._folded = {}
        super().train(mode)
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._folded = {}
        return super()._apply(*args, **kwargs)

    def run_shared(self, root: str, *args: Any, **kwargs: Any) -> Any:
        """Call one shared module with the residuals on its weights."""
        if root in self._folded:
            return self._folded[root](*args, **kwargs)
        module = self.shared()[root]

        def call_with_residuals(*inputs: Any) -> Any:
            weights = self.residuals.folded_weights(root, module)
            return functional_call(module, weights, inputs, kwargs)

        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(call_with_residuals, *args, use_reentrant=False)
        return call_with_residuals(*args)


def outer_width(widths: Sequence[int], level: int) -> int:
    """Return the width of the level outside ``level``; the outermost level is its own."""
    return widths[max(level - 1, 0)]


def zero_init_(layer: Any) -> Any:
    """Set a layer's weight and bias to zero, in place, and return the layer."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def guidance_features(scale: Any, x: Tensor) -> Float[Tensor, "b f"]:
    """Return sines and cosines of the guidance scale (or a time), [b, GUIDANCE_FEATURES].

    Args:
        scale: A number, or one per sample, [b].
        x: The samples; device, dtype and batch size are theirs.
    """
    values = torch.as_tensor(scale, dtype=torch.float32, device=x.device).expand(x.shape[0])
    octaves = torch.arange(GUIDANCE_FEATURES // 2, device=x.device) / 4 - 4
    angles = values[:, None] * 2.0**octaves
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(x.dtype)
