"""A Gaussian mixture whose exact noise estimate is a formula: the Dash of the proof without networks."""

import itertools

import torch
from torch import Tensor, nn

from morse_diffusion.method.jumps import Process, vp_jump
from morse_diffusion.method.objective import draw, make_pair, residual_losses
from morse_diffusion.method.sampler import MorseSampler
from morse_diffusion.method.schedule import MorsePlan

DIM, COMPONENTS = 4, 10
LEVELS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
PROCESS = Process(family="vp", levels=LEVELS)


class Mixture:
    """Ten narrow Gaussians in four dimensions, of unit variance overall."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        means = torch.randn((COMPONENTS, DIM), generator=generator)
        means -= means.mean(0)
        self.std = 0.22
        self.means = means / means.square().mean().sqrt() * (1 - self.std**2) ** 0.5

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        which = torch.randint(COMPONENTS, (n,), generator=generator)
        return self.means[which] + self.std * torch.randn((n, DIM), generator=generator)

    def noise(self, x: Tensor, t: Tensor, cond: object = None, w: object = None) -> Tensor:
        """E[e | x_t] = -sigma_t grad log p_t(x)."""
        level = LEVELS[t.long()].float()[:, None]
        variance = level * self.std**2 + 1 - level
        difference = x[:, None] - level.sqrt()[:, None] * self.means
        weight = (-difference.square().sum(-1) / (2 * variance)).softmax(1)
        score = -(weight[..., None] * difference).sum(1) / variance
        return -(1 - level).sqrt() * score


class MlpDot(nn.Module):
    """Residual network on all of the Dot's inputs, or without the trajectory (the control)."""

    def __init__(self, trajectory: bool = True, width: int = 128) -> None:
        super().__init__()
        self.trajectory = trajectory
        sizes = (3 * DIM + 2, width, width, DIM)
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), nn.SiLU()]
        self.net = nn.Sequential(*layers[:-1])
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x_s, x_i, z_s, t_s, t_i, cond=None) -> Tensor:
        t_s, t_i = (torch.as_tensor(t).float().expand(len(x_i))[:, None] / 1000 for t in (t_s, t_i))
        if not self.trajectory:
            # Estimates the noise from the sample alone: z_s cancels when it is added again.
            nothing = torch.zeros_like(x_i)
            return self.net(torch.cat([nothing, x_i, nothing, 0 * t_s, t_i], 1)) - z_s
        return self.net(torch.cat([x_s, x_i, z_s, t_s, t_i], 1))


def trained_dot(
    mixture: Mixture, trajectory: bool = True, steps: int = 1200
) -> tuple[MlpDot, float]:
    """Algorithm 1; also the part of the residual that is left at the end."""
    torch.manual_seed(0)
    dot = MlpDot(trajectory)
    optimizer = torch.optim.Adam(dot.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    left: list[float] = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        clean = mixture.sample(256, generator)
        draws = draw(PROCESS, clean.shape, generator, gap_max=0.4)
        pair = make_pair(mixture.noise, PROCESS, clean, draws)
        loss, repeated = residual_losses(dot, pair)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        schedule.step()
        left.append(float(loss.detach().mean() / repeated.mean()))
    return dot.eval(), sum(left[-100:]) / 100


def phi(x: Tensor, z: Tensor, t: float, t_next: float) -> Tensor:
    """DDIM between two times; -1 is the clean end."""
    level, after = (LEVELS[int(u)].item() if u >= 0 else 1.0 for u in (t, t_next))
    return vp_jump(x, z, level**0.5, (1 - level) ** 0.5, after**0.5, (1 - after) ** 0.5)


@torch.no_grad()
def run(mixture: Mixture, dot, plan: MorsePlan, n: int = 3000, seed: int = 7) -> Tensor:
    """Samples of a plan; times trail from 999."""

    def dash(x: Tensor, t: float) -> Tensor:
        return mixture.noise(x, torch.full((len(x),), t))

    times = [round(1000 - i * 1000 / plan.n_total) - 1 for i in range(plan.n_total)] + [-1]
    x = torch.randn((n, DIM), generator=torch.Generator().manual_seed(seed))
    return MorseSampler(dash, dot, phi)(x, times, plan)


def sliced_wasserstein(a: Tensor, b: Tensor) -> float:
    """Mean over 200 directions of the distance between sorted projections."""
    directions = torch.randn((a.shape[1], 200), generator=torch.Generator().manual_seed(1))
    directions /= directions.norm(dim=0)
    pa, pb = ((x @ directions).sort(dim=0).values for x in (a, b))
    return (pa - pb).abs().mean().item()
