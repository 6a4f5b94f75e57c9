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
SPACES = {"vp": "epsilon", "ddpm": "epsilon", "lcm": "epsilon", "edm": "x0", "flow": "velocity"}


def vp_jump(x: Tensor, e: Tensor, a_s: Any, s_s: Any, a_o: Any, s_o: Any) -> Tensor:
    """DDIM: x_o = alpha_o x0 + sigma_o e with x0 = (x_s - sigma_s e) / alpha_s."""
    return a_o * (x - s_s * e) / a_s + s_o * e


def ddpm_jump(
    x: Tensor, e: Tensor, a_s: Any, s_s: Any, a_o: Any, s_o: Any, noise: Tensor
) -> Tensor:
    """Ancestral step: a draw from q(x_o | x_s, x0), the posterior of DDPM between two times."""
    x0 = (x - s_s * e) / a_s
    ratio = a_s / a_o
    step_variance = s_s**2 - ratio**2 * s_o**2
    mean = ratio * s_o**2 / s_s**2 * x + a_o * step_variance / s_s**2 * x0
    return mean + (step_variance.clamp(min=0) ** 0.5 * s_o / s_s) * noise


def lcm_jump(
    x: Tensor, e: Tensor, a_s: Any, s_s: Any, a_o: Any, s_o: Any, t: Tensor, noise: Tensor
) -> Tensor:
    """Consistency step: the boundary-scaled x0, noised afresh to the next time.

    c_skip and c_out are those of LCM: sigma_data 0.5, timestep scaling 10.
    """
    scaled = t * 10.0
    c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
    clean = c_skip * x + c_out * (x - s_s * e) / a_s
    return a_o * clean + s_o * noise


def edm_jump(x: Tensor, x0: Tensor, sigma_s: Any, sigma_o: Any, data: float = 0.5) -> Tensor:
    """Euler step in sigma, between c_in-scaled inputs: c_in = 1 / sqrt(sigma^2 + data^2)."""
    raw = x * (sigma_s**2 + data**2) ** 0.5
    landed = x0 + sigma_o / sigma_s * (raw - x0)
    return landed / (sigma_o**2 + data**2) ** 0.5


def flow_jump(x: Tensor, v: Tensor, sigma_s: Any, sigma_o: Any) -> Tensor:
    """Straight line: x_o = x_s + (sigma_o - sigma_s) v."""
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
        """The same process with its levels on a device, if that has float64."""
        return self if device.type == "mps" else replace(self, levels=self.levels.to(device))

    @property
    def space(self) -> str:
        """Name of the residual space."""
        return SPACES[self.family]

    def draw_pair(
        self, n: int, generator: torch.Generator, gap_max: float = 1.0
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Draw times t_s > t_o, uniform over pairs, at most ``gap_max`` T apart.

        Returns:
            Float tensors in the network's units; whole numbers for the VP families.
        """
        if not 0 < gap_max <= 1 or gap_max * self.steps < 1:
            raise ConfigError(f"gap_max is {gap_max}; give a share of T above 0, up to 1")
        t_s = torch.zeros(n, dtype=torch.float64)
        t_o = t_s.clone()
        todo = torch.ones(n, dtype=torch.bool)
        while todo.any():  # pairs that are out of order or too far apart are drawn again
            a, b = (
                torch.rand((2, n), generator=generator, dtype=torch.float64) * self.steps
            ).unbind()
            if self.family != "flow" and self.family != "edm":
                a, b = a.floor(), b.floor()
            good = todo & (a > b) & (a - b <= gap_max * self.steps)
            t_s[good], t_o[good] = a[good], b[good]
            todo &= ~good
        return self._times(t_s), self._times(t_o)

    def _times(self, t: Tensor) -> Tensor:
        if self.family != "edm":
            return t.float()
        # EDM's own spacing (rho = 7); its network sees log(sigma) / 4.
        low, high = (s ** (1 / 7) for s in self.sigma_range)
        return ((low + t / self.steps * (high - low)) ** 7).log().div(4).float()

    def scales(self, t: Tensor, ndim: int = 4) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of the process at times ``t``, shaped to broadcast over a sample."""
        shape = (-1, *(1,) * (ndim - 1))
        if self.family == "edm":
            sigma = (4 * exact(t)).exp()
            return torch.ones_like(sigma).view(shape).float(), sigma.view(shape).float()
        if self.family == "flow":
            sigma = exact(t) / self.steps
            return (1 - sigma).view(shape).float(), sigma.view(shape).float()
        tables = self.levels.sqrt().float(), (1 - self.levels).sqrt().float()
        alpha, sigma = (table.to(t.device)[t.long()].view(shape) for table in tables)
        return alpha, sigma

    def noised(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The network's input at ``t``: forward noising of real data."""
        alpha, sigma = self.scales(t, clean.ndim)
        x = alpha * clean + sigma * noise
        return x / (sigma**2 + 0.25) ** 0.5 if self.family == "edm" else x

    def to_space(self, out: Tensor, x: Tensor, t: Tensor, prediction: str) -> Tensor:
        """A raw network output in the residual space; ``x`` is what the network saw."""
        a, b = space_coefficients(prediction, *self.scales(t, x.ndim), self.family)
        return a * x + b * out

    def jump(self, x: Tensor, z: Tensor, t_s: Tensor, t_o: Tensor, noise: Tensor) -> Tensor:
        """The sampler's update from ``t_s`` to ``t_o`` with estimate ``z``, all [b, ...]."""
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


def exact(t: Tensor) -> Tensor:
    """Times in float64, on devices that have it."""
    return t if t.device.type == "mps" else t.double()


def space_coefficients(
    prediction: str, alpha: Any, sigma: Any, family: str = "vp"
) -> tuple[Any, Any]:
    """(a, b) such that z = a x + b out; a raw output composes over jumps only if a = 0, b = 1.

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
        total = (sigma**2 + 0.25) ** 0.5
        # x is scaled by c_in = 1 / total, hence c_skip / c_in = 0.25 / total.
        skip = 0.25 / total
        out = (0.5 * sigma / total) if prediction == "epsilon" else (-0.5 * sigma / total)
        return skip, out
    if prediction == "v_prediction":
        return sigma, alpha
    return 0.0, 1.0
