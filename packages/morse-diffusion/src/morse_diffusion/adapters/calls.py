"""How pipelines call their denoiser: where guidance sits in the batch, and what goes with it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effml_common.logging import warn
from morse_diffusion.errors import GuidanceError, UnsupportedDenoiserError

SIDE_INPUTS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
    "block_controlnet_hidden_states",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
)


def denoiser_of(pipe: Any) -> nn.Module:
    """Return the network that a pipeline calls at every step.

    Raises:
        UnsupportedDenoiserError: If it has neither ``unet`` nor ``transformer``.
    """
    for name in ("unet", "transformer"):
        network = getattr(pipe, name, None)
        if isinstance(network, nn.Module):
            return network
    raise UnsupportedDenoiserError(
        f"{type(pipe).__name__} has neither a unet nor a transformer; "
        "use a diffusers pipeline of a diffusion model"
    )


def device_of_weights(dash: nn.Module) -> torch.device:
    """Return the device that the weights of a Dash are on.

    Raises:
        UnsupportedDenoiserError: If they are only lent to each layer while it runs.
    """
    device = next(dash.parameters()).device
    if device.type == "meta":
        raise UnsupportedDenoiserError(
            "the Dash has no weights in memory (sequential offloading or a meta device), and the Dot "
            "keeps a folded copy of them; use pipe.enable_model_cpu_offload(), or load the weights"
        )
    return device


def refuse_side_inputs(others: Mapping[str, Any]) -> None:
    """Refuse ControlNet and T2I-Adapter features: they run at every step and at full size.

    Raises:
        UnsupportedDenoiserError: Naming the argument.
    """
    for name in SIDE_INPUTS:
        if others.get(name) is not None:
            raise UnsupportedDenoiserError(
                f"the pipeline passes {name} (ControlNet or adapter), which a Dot does not know; "
                "remove Morse for this pipeline"
            )


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance of one run.

    Args:
        doubled: Whether the batch holds both halves.
        scale: w; None without guidance.
        rescale: diffusers' ``guidance_rescale``.
        cond_first: Whether the conditional half comes first (DiT), not second.
        calls: Calls of the denoiser per step.
        learned_sigma: Whether the second half of the output channels is a variance.
    """

    doubled: bool
    scale: float | None
    rescale: float
    cond_first: bool
    calls: int
    learned_sigma: bool

    @staticmethod
    def detect(
        pipe: Any,
        module: nn.Module,
        x: Tensor,
        scale: float | None,
        calls: int,
        others: Mapping[str, Any],
    ) -> "Guidance":
        """Find out how a pipeline guides its denoiser, from the first call of a run.

        Args:
            pipe: The pipeline.
            module: Its denoiser.
            x: The sample that the denoiser was given.
            scale: As the user gave it; None to ask the pipeline.
            calls: Calls of the denoiser per step.
            others: The denoiser's other arguments by name.

        Raises:
            GuidanceError: If guidance is on and its scale is unknown.
        """
        # Pipelines that do not say so double their batch: both halves hold the same samples.
        kind, config = type(module).__name__, getattr(module, "config", None)
        is_conditioned = "encoder_hidden_states" in others or others.get("class_labels") is not None
        doubled = getattr(pipe, "do_classifier_free_guidance", None)
        if doubled is None:
            n = len(x)
            doubled = n % 2 == 0 and is_conditioned and torch.equal(x[: n // 2], x[n // 2 :])
        doubled = bool(doubled) and calls == 1

        # The scale, which some pipelines hide.
        is_guided = doubled or calls == 2
        known = scale if scale is not None else getattr(pipe, "guidance_scale", None)
        if is_guided and known is None:
            raise GuidanceError(
                f"{type(pipe).__name__} guides the denoiser but does not show its scale; "
                "pass guidance_scale=... to Morse as well as to the pipeline"
            )

        outputs, inputs = (getattr(config, name, None) for name in ("out_channels", "in_channels"))
        return Guidance(
            doubled=doubled,
            scale=float(known) if is_guided and known is not None else None,
            rescale=float(getattr(pipe, "guidance_rescale", 0.0) or 0.0),
            cond_first=kind.startswith("DiT"),
            calls=calls,
            learned_sigma=bool(outputs and inputs and outputs == 2 * inputs and x.ndim == 4),
        )

    def compare_with(self, dot: Any) -> None:
        """Warn about a scale that the Dot was not trained on."""
        shape = getattr(dot, "shape", None)
        if shape is None or self.scale is None:
            return
        low, high = shape.guidance or (1.0, 1.0)
        if not low <= self.scale <= high:
            trained = f"{low:g} to {high:g}" if shape.guidance else "no guidance"
            warn(f"guidance scale {self.scale:g}, but the Dot was trained on {trained}")

    def combine(self, out: Tensor, first: Tensor | None) -> Tensor:
        """Return the estimate that the pipeline will make of a Dash output.

        Args:
            out: Output of the step's last call.
            first: Output of its first call, where there are two; that one is conditional.
        """
        # One network output, or two calls.
        if self.learned_sigma:
            out = out.chunk(2, dim=1)[0]
        if self.calls == 2 and first is not None and self.scale is not None:
            return out + self.scale * (first - out)
        if not self.doubled or self.scale is None:
            return out

        # Both halves of one batch.
        first_half, second_half = out.chunk(2)
        positive, negative = (
            (first_half, second_half) if self.cond_first else (second_half, first_half)
        )
        guided = negative + self.scale * (positive - negative)
        if self.rescale:
            axes = list(range(1, out.ndim))
            std = positive.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True)
            guided = guided * (self.rescale * std + 1 - self.rescale)
        return guided

    def condition(self, others: Mapping[str, Any]) -> dict[str, Any]:
        """Return the denoiser's other inputs for the conditional half, and ``w``."""
        cond = {k: self._positive_half(v) for k, v in others.items() if k != "return_dict"}
        return cond if self.scale is None else {**cond, "w": self.scale}

    def _positive_half(self, value: Any) -> Any:
        if not self.doubled:
            return value
        if isinstance(value, Tensor) and value.ndim > 0 and len(value) > 1:
            return value.chunk(2)[0 if self.cond_first else 1]
        if isinstance(value, dict):
            return {k: self._positive_half(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._positive_half(v) for v in value)
        return value

    def as_answer(self, raw: Tensor, like: Any) -> Any:
        """Return a raw estimate in the shape, dtype and class of the denoiser's own answer."""
        if self.learned_sigma:  # the pipeline drops these channels
            raw = torch.cat([raw, torch.zeros_like(raw)], dim=1)
        raw = raw.to(like[0].dtype)
        raw = torch.cat([raw, raw]) if self.doubled else raw
        return (raw,) if type(like) is tuple else type(like)(sample=raw)


def conditional_half(x: Tensor, guidance: Guidance) -> Tensor:
    """Return the conditional half of a doubled batch, or the batch."""
    return x.chunk(2)[0 if guidance.cond_first else 1] if guidance.doubled else x
