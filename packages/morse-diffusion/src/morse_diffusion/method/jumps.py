"""Noising and closed-form sampler jumps between any two times.

Training needs one jump from t_s to t_o, and a scheduler's ``step`` only walks its own list. Everything
here works on what the network sees: a variance-preserving x = alpha x0 + sigma e (also for Euler
schedulers, whose input scaling makes it so), EDM's c_in-scaled x, or a flow's straight line.

``z`` is in the residual space, in which a constant estimate composes over jumps: the noise e (``vp``),
the denoised x0 (``edm``), the velocity e - x0 (``flow``).
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from effml_common.errors import ConfigError

Family = Literal["vp", "ddpm", "lcm", "edm", "flow"]
PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")
SIGMA_DATA = 0.5  # standard deviation that LCM and EDM assume of their data
LCM_TIMESTEP_SCALING = 10.0
EDM_RHO = 7  # exponent of EDM's own spacing of times
SPACES = {"vp": "epsilon", "ddpm": "epsilon", "lcm": "epsilon", "edm": "x0", "flow": "velocity"}


def vp_jump(x: Tensor, e: Tensor, a_s: Any, s_s: Any, a_o: Any, s_o: Any) -> Tensor:
    """Jump by DDIM: x_o = alpha_o x0 + sigma_o e with x0 = (x_s - sigma_s e) / alpha_s."""
    return a_o * (x - s_s * e) / a_s + s_o * e


def ddpm_jump(
    x: Tensor, e: Tensor, a_s: Any, s_s: Any, a_o: Any, s_o: Any, noise: Tensor
) -> Tensor:
    """Draw from q(x_o | x_s, x0), the posterior of DDPM between two times: an ancestral step."""
    x0 = (x - s_s * e) / a_s
    ratio = a_s / a_o
    step_variance = s_s**2 - ratio**2 * s_o**2
    mean = ratio * s_o**2 / s_s**2 * x + a_o * step_variance / s_s**2 * x0
    return mean + (step_variance.clamp(min=0) ** 0.5 * s_o / s_s) * noise


def lcm_jump(
    x: Tensor, e: Tensor, a_s: Any, s_s: Any, a_o: Any, s_o: Any, t: Tensor, noise: Tensor
) -> Tensor:
    """Jump by a consistency model: the boundary-scaled x0, noised afresh to the next time.

    c_skip and c_out are those of LCM: sigma_data 0.5, timestep scaling 10.
    """
    scaled, variance = t * LCM_TIMESTEP_SCALING, SIGMA_DATA**2
    c_skip, c_out = variance / (scaled**2 + variance), scaled / (scaled**2 + variance) ** 0.5
    clean = c_skip * x + c_out * (x - s_s * e) / a_s
    return a_o * clean + s_o * noise


def edm_jump(x: Tensor, x0: Tensor, sigma_s: Any, sigma_o: Any, data: float = SIGMA_DATA) -> Tensor:
    """Take an Euler step in sigma, between c_in-scaled inputs: c_in = 1 / sqrt(sigma^2 + data^2)."""
    raw = x * (sigma_s**2 + data**2) ** 0.5
    landed = x0 + sigma_o / sigma_s * (raw - x0)
    return landed / (sigma_o**2 + data**2) ** 0.5


def flow_jump(x: Tensor, v: Tensor, sigma_s: Any, sigma_o: Any) -> Tensor:
    """Go along the straight line: x_o = x_s + (sigma_o - sigma_s) v."""
    return x + (sigma_o - sigma_s) * v


@dataclass(frozen=True, kw_only=True)
class Process:
    """A noise schedule and the jump of one sampler family.

    Args:
        family: ``vp`` (DDIM, DPM-Solver, Euler: first order), ``ddpm``, ``lcm``, ``edm``, ``flow``.
        levels: alpha_bar per time step, float64 [T], for the VP families; empty otherwise.
        steps: T; flow times run to T as well (sigma = t / T).
        sigma_range: Smallest and largest sigma of EDM.
        clip: Bound on |x0|, where the scheduler clips its sample; None elsewhere.

    Raises:
        ConfigError: If T is below 2.

    >>> process = Process(family="vp", levels=torch.tensor([0.64, 0.36]), steps=2)
    >>> alpha, sigma = process.scales(torch.tensor([0.0]), ndim=1)
    >>> round(alpha.item(), 3), round(sigma.item(), 3)
    (0.8, 0.6)
    """

    family: Family
    levels: Tensor = field(default_factory=lambda: torch.empty(0))
    steps: int = 1000
    sigma_range: tuple[float, float] = (0.002, 80.0)
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ConfigError(f"the schedule has T = {self.steps} steps; a jump needs at least 2")

    def to(self, device: torch.device) -> "Process":
        """Return the same process with its levels on a device, if that has float64."""
        return self if device.type == "mps" else replace(self, levels=self.levels.to(device))

    @property
    def space(self) -> str:
        """Name of the residual space."""
        return SPACES[self.family]

    @property
    def has_whole_times(self) -> bool:
        """Whether the network knows whole time steps only, as those of the VP families do."""
        return self.family not in ("flow", "edm")

    def draw_pair(
        self, n: int, generator: torch.Generator, gap_max: float = 1.0
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Draw times t_s > t_o, uniform over pairs, at most ``gap_max`` T apart.

        Args:
            n: Number of pairs.
            generator: Source of every random number.
            gap_max: Largest difference, as a share of T, above 0 and up to 1.

        Returns:
            Float tensors in the network's units; whole numbers for the VP families.

        Raises:
            ConfigError: If ``gap_max`` is out of range.
        """
        if not 0 < gap_max <= 1 or gap_max * self.steps < 1:
            raise ConfigError(f"gap_max is {gap_max}; give a share of T above 0, up to 1")

        # Pairs that are out of order or too far apart are drawn again.
        t_s = torch.zeros(n, dtype=torch.float64)
        t_o = t_s.clone()
        is_open = torch.ones(n, dtype=torch.bool)
        while is_open.any():
            a, b = (
                torch.rand((2, n), generator=generator, dtype=torch.float64) * self.steps
            ).unbind()
            if self.has_whole_times:
                a, b = a.floor(), b.floor()
            accepted = is_open & (a > b) & (a - b <= gap_max * self.steps)
            t_s[accepted], t_o[accepted] = a[accepted], b[accepted]
            is_open &= ~accepted
        return self._network_times(t_s), self._network_times(t_o)

    def _network_times(self, t: Tensor) -> Tensor:
        """Return times on the scale of 0 to T in the units that the network is given."""
        if self.family != "edm":
            return t.float()
        # The network of EDM sees log(sigma) / 4.
        low, high = (sigma ** (1 / EDM_RHO) for sigma in self.sigma_range)
        return ((low + t / self.steps * (high - low)) ** EDM_RHO).log().div(4).float()

    def scales(self, t: Tensor, ndim: int = 4) -> tuple[Tensor, Tensor]:
        """Return (alpha, sigma) at times ``t`` [b], to broadcast over samples with ``ndim`` axes."""
        shape = (-1, *(1,) * (ndim - 1))
        if self.family == "edm":
            sigma = (4 * to_float64(t)).exp()
            return torch.ones_like(sigma).view(shape).float(), sigma.view(shape).float()
        if self.family == "flow":
            sigma = to_float64(t) / self.steps
            return (1 - sigma).view(shape).float(), sigma.view(shape).float()
        tables = self.levels.sqrt().float(), (1 - self.levels).sqrt().float()
        alpha, sigma = (table.to(t.device)[t.long()].view(shape) for table in tables)
        return alpha, sigma

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the network's input at ``t``: forward noising of real data, all [b, ...]."""
        alpha, sigma = self.scales(t, clean.ndim)
        x = alpha * clean + sigma * noise
        return x / (sigma**2 + SIGMA_DATA**2) ** 0.5 if self.family == "edm" else x

    def to_space(self, out: Tensor, x: Tensor, t: Tensor, prediction: str) -> Tensor:
        """Return a raw network output in the residual space; ``x`` is what the network saw."""
        a, b = space_coefficients(prediction, *self.scales(t, x.ndim), self.family)
        return a * x + b * out

    def jump(self, x: Tensor, z: Tensor, t_s: Tensor, t_o: Tensor, noise: Tensor) -> Tensor:
        """Make the sampler's update from ``t_s`` to ``t_o``.

        Args:
            x: What the network saw at ``t_s``, [b, ...].
            z: The estimate there, in the residual space.
            t_s: Times, float [b].
            t_o: Times, smaller.
            noise: For stochastic samplers; the others ignore it.
        """
        # Schedulers that clip their sample clip the denoised image.
        (a_s, s_s), (a_o, s_o) = (self.scales(t, x.ndim) for t in (t_s, t_o))
        if self.clip is not None and self.space == "epsilon":
            x0 = ((x - s_s * z) / a_s).clamp(-self.clip, self.clip)
            z = (x - a_s * x0) / s_s

        if self.family == "vp":
            return vp_jump(x, z, a_s, s_s, a_o, s_o)
        if self.family == "ddpm":
            return ddpm_jump(x, z, a_s, s_s, a_o, s_o, noise)
        if self.family == "lcm":
            t = t_s.view(-1, *(1,) * (x.ndim - 1))
            return lcm_jump(x, z, a_s, s_s, a_o, s_o, t, noise)
        return edm_jump(x, z, s_s, s_o) if self.family == "edm" else flow_jump(x, z, s_s, s_o)


def to_float64(t: Tensor) -> Tensor:
    """Return times in float64, on devices that have it."""
    return t if t.device.type == "mps" else t.double()


def space_coefficients(
    prediction: str, alpha: Any, sigma: Any, family: str = "vp"
) -> tuple[Any, Any]:
    """Return (a, b) such that z = a x + b out.

    A raw output composes over jumps only if a = 0 and b = 1.

    v-prediction, v = alpha e - sigma x0, becomes e = sigma x + alpha v. EDM's raw output F becomes
    x0 = c_skip x_raw + c_out F, with x_raw = x / c_in (sigma_data 0.5).

    Raises:
        ConfigError: If the prediction type is not known.
    """
    if prediction not in PREDICTIONS:
        raise ConfigError(
            f"prediction type {prediction} is not known; use {', '.join(PREDICTIONS)}"
        )
    if family == "edm":
        total = (sigma**2 + SIGMA_DATA**2) ** 0.5
        # x is scaled by c_in = 1 / total, hence c_skip / c_in = sigma_data^2 / total.
        skip = SIGMA_DATA**2 / total
        sign = 1 if prediction == "epsilon" else -1
        out = sign * SIGMA_DATA * sigma / total
        return skip, out
    if prediction == "v_prediction":
        return sigma, alpha
    return 0.0, 1.0
