"""The Dot's training objective (Algorithm 1 of the Morse paper), for any Dash and any sampler jump."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from morse_diffusion.method.jumps import Process

# (x, t, cond, w) -> z, the guided estimate in the residual space.
Estimate = Callable[[Tensor, Tensor, Any, Tensor | None], Tensor]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What one update learns from; no field carries a gradient.

    Attributes:
        x_s: Noised data at ``t_s``, as the network sees it.
        x_o: Where the sampler lands from there.
        z_s: Dash estimate at ``t_s``.
        z_o: Dash estimate at ``t_o``, the target.
        t_s: Times, float [b]; ``t_o`` is smaller.
        t_o: See ``t_s``.
        cond: The Dash's other inputs, and ``w``.
    """

    x_s: Tensor
    x_o: Tensor
    z_s: Tensor
    z_o: Tensor
    t_s: Tensor
    t_o: Tensor
    cond: Any


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Every random number of one update.

    Attributes:
        t_s: Times, float [b]; ``t_o`` is smaller.
        t_o: See ``t_s``.
        noise: Of the forward process, shaped like the data.
        fresh: Of the jump, shaped like the data; jumps without noise ignore it.
        w: Guidance scales, [b]; None without guidance.
    """

    t_s: Tensor
    t_o: Tensor
    noise: Tensor
    fresh: Tensor
    w: Tensor | None

    def to(self, device: torch.device) -> "Draws":
        """Return the same numbers on a device."""
        return Draws(**map_tensors(vars(self), lambda t: t.to(device)))


def draw(
    process: Process,
    shape: torch.Size,
    generator: torch.Generator,
    *,
    guidance: tuple[float, float] | None = None,
    gap_max: float = 1.0,
) -> Draws:
    """Draw the random numbers of one update, on the CPU, so that a step can be repeated.

    Args:
        process: Noise schedule and jump.
        shape: Of the data, [b, ...].
        generator: Source of every number.
        guidance: Range that one scale per sample is drawn from.
        gap_max: Largest t_s - t_o, as a share of T.
    """
    t_s, t_o = process.draw_pair(shape[0], generator, gap_max)
    noise, fresh = (torch.randn(shape, generator=generator) for _ in range(2))
    w = None
    if guidance is not None:
        low, high = guidance
        w = low + (high - low) * torch.rand(shape[0], generator=generator)
    return Draws(t_s=t_s, t_o=t_o, noise=noise, fresh=fresh, w=w)


@torch.no_grad()
def make_pair(
    dash: Estimate,
    process: Process,
    clean: Tensor,
    draws: Draws,
    *,
    cond: Any = None,
    middle: Callable[..., Tensor] | None = None,
) -> Pair:
    """Noise real data to t_s, take one jump to t_o, and ask the Dash at both ends.

    Args:
        dash: The frozen network.
        process: Noise schedule and jump.
        clean: Data, [b, ...].
        draws: From ``draw``, on the device of ``clean``.
        cond: Passed to ``dash`` and the Dot.
        middle: A Dot. Then the jump stops half way for one Dot step, as sampling does; t_o stays.
    """
    # The Dash on noised data.
    t_s, t_o, fresh, w = draws.t_s, draws.t_o, draws.fresh, draws.w
    if w is not None:
        cond = {**(cond or {}), "w": w}
    x_s = process.add_noise(clean, draws.noise, t_s)
    z_s = dash(x_s, t_s, cond, w)

    # Half of the way by the Dash's estimate, and the other half by the Dot's.
    x, z, t = x_s, z_s, t_s
    if middle is not None:
        t_m = (t_s + t_o) / 2
        if process.has_whole_times:
            t_m = t_m.ceil()  # never t_o itself; where it is t_s the jump is empty
        x = process.jump(x_s, z_s, t_s, t_m, fresh)
        z, t = z_s + middle(x_s, x, z_s, t_s, t_m, cond), t_m

    # The Dash where the sampler lands.
    x_o = process.jump(x, z, t, t_o, fresh)
    z_o = dash(x_o, t_o, cond, w)
    return Pair(x_s=x_s, x_o=x_o, z_s=z_s, z_o=z_o, t_s=t_s, t_o=t_o, cond=cond)


def residual_losses(dot: Callable[..., Tensor], pair: Pair) -> tuple[Tensor, Tensor]:
    """Return the squared error of the Dot, and of repeating ``z_s``, each a mean per sample.

    Their ratio is the share of the residual that is unexplained: 1 at the zero initialisation.

    Args:
        dot: ``(x_s, x_o, z_s, t_s, t_o, cond) -> residual``.
        pair: From ``make_pair``.

    Returns:
        Tensors [b]; the gradient flows through the first only.
    """
    residual = dot(pair.x_s, pair.x_o, pair.z_s, pair.t_s, pair.t_o, pair.cond)
    target = pair.z_o - pair.z_s
    return (target - residual).square().flatten(1).mean(1), target.square().flatten(1).mean(1)


def min_snr_weight(process: Process, t: Tensor, gamma: float = 5.0) -> Float[Tensor, " b"]:
    """Return min(SNR, gamma) / SNR: what an error in the noise is worth at ``t``, at most 1.

    Not in the paper. Near t = 0 the residual of the noise is large and cannot be predicted, yet it
    hardly moves the sample; the plain loss is spent there.

    Args:
        process: Noise schedule; SNR is (alpha / sigma)^2.
        t: Times, float [b].
        gamma: Signal-to-noise ratio above which errors count less.
    """
    alpha, sigma = process.scales(t, 1)
    snr = (alpha / sigma) ** 2
    return snr.clamp(max=gamma) / snr


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor in nested dicts; other values stay."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {k: map_tensors(v, function) for k, v in value.items()}
    return value
