"""A diffusers denoiser as the estimate that training needs: guided, in the residual space."""

from typing import Any

import torch
from torch import Tensor, nn

from morse_diffusion.method.jumps import Process
from morse_diffusion.method.objective import map_tensors


class GuidedDash:
    """The frozen Dash as ``(x, t, cond, w) -> z``; guidance is one batch of both halves.

    Args:
        denoiser: UNet or transformer; put into eval mode and frozen.
        process: Noise schedule, for the residual space.
        prediction: What the network predicts.
        negative: Its other inputs for the unconditional half, each [1, ...]; needed with guidance.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        process: Process,
        prediction: str,
        negative: dict[str, Any] | None = None,
    ) -> None:
        self.denoiser = denoiser.eval().requires_grad_(False)
        device = next(denoiser.parameters()).device
        self._process, self._prediction = process.to(device), prediction
        self._negative = map_tensors(negative, lambda v: v.to(device))
        config: Any = denoiser.config
        self._learned_sigma = config.out_channels == 2 * config.in_channels

    def __call__(self, x: Tensor, t: Tensor, cond: Any, w: Tensor | None) -> Tensor:
        """Estimate at times ``t``, float32, without a gradient.

        Args:
            x: What the network sees, [b, ...].
            t: Times, float [b].
            cond: The network's other inputs for the conditional half, each [b, ...].
            w: Guidance scales, [b]; None for one pass without guidance.
        """
        inputs = {k: v for k, v in (cond or {}).items() if k != "w"}
        if w is None:
            out = self._call(x, t, inputs)
        else:
            # Classifier-free guidance: negative first, as in diffusers' pipelines.
            assert self._negative is not None
            negatives = map_tensors(self._negative, lambda v: v.expand(len(x), *v.shape[1:]))
            doubled = concatenate(negatives, inputs)
            out = self._call(torch.cat([x, x]), torch.cat([t, t]), doubled)
            negative, positive = out.chunk(2)
            out = negative + w.view(-1, *(1,) * (x.ndim - 1)) * (positive - negative)
        return self._process.to_space(out.float(), x.float(), t, self._prediction)

    def _call(self, x: Tensor, t: Tensor, inputs: dict[str, Any]) -> Tensor:
        name = "sample" if hasattr(self.denoiser, "conv_in") else "hidden_states"
        out = self.denoiser(**{name: x}, timestep=t, **inputs, return_dict=False)[0]
        return out.chunk(2, dim=1)[0] if self._learned_sigma else out


def concatenate(a: Any, b: Any) -> Any:
    """Concatenate the tensors of two equally nested dicts along their first axis."""
    return {
        k: concatenate(a[k], b[k]) if isinstance(b[k], dict) else torch.cat([a[k], b[k]]) for k in b
    }
