"""The proof without networks: a Gaussian mixture whose estimates are exact."""

import pytest
import torch
from morse_mixture import (
    DIM,
    Mixture,
    run,
    sliced_wasserstein,
    trained_dot,
)

from morse_diffusion.method.sampler import ExtrapolationDot, MorseSampler, ZeroDot
from morse_diffusion.method.schedule import MorsePlan

SPEED_RATIO = 6


def plan_of(budget: int, k: int) -> MorsePlan:
    return MorsePlan.uniform(budget - k, SPEED_RATIO * k)


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    return Mixture()


@pytest.fixture(scope="module")
def trained(mixture):
    return trained_dot(mixture)


@pytest.fixture(scope="module")
def distance(mixture):
    true = mixture.sample(3000, torch.Generator().manual_seed(99))
    return lambda dot, plan: sliced_wasserstein(run(mixture, dot, plan), true)


def test_the_noise_estimate_is_the_gradient_of_the_log_density(mixture) -> None:
    from morse_mixture import LEVELS

    x = torch.randn(5, DIM, dtype=torch.float64, requires_grad=True)
    t = torch.full((5,), 400.0)
    level = LEVELS[400]
    covariance = (level * mixture.std**2 + 1 - level) * torch.eye(DIM, dtype=torch.float64)
    parts = torch.distributions.MultivariateNormal(
        level.sqrt() * mixture.means.double(), covariance
    )
    log_density = torch.logsumexp(parts.log_prob(x[:, None]), dim=1).sum()
    (score,) = torch.autograd.grad(log_density, x)
    ours = mixture.noise(x.detach().float(), t)
    torch.testing.assert_close(ours.double(), -((1 - level).sqrt()) * score, atol=1e-4, rtol=1e-4)


def test_a_dot_that_returns_zero_is_plain_sampling_with_the_dash_steps(mixture) -> None:
    few, many = (
        run(mixture, ZeroDot(), MorsePlan.uniform(10, 0)),
        run(mixture, ZeroDot(), MorsePlan.uniform(10, 40)),
    )
    assert float((few - many).abs().max()) < 1e-4


@pytest.mark.slow
def test_the_trained_dot_explains_most_of_the_residual(trained) -> None:
    assert trained[1] < 0.35


@pytest.mark.slow
def test_morse_is_nearer_to_the_truth_than_ddim_at_equal_cost(trained, distance) -> None:
    plain = distance(ZeroDot(), plan_of(10, 0))
    assert distance(trained[0], plan_of(10, 3)) < 0.7 * plain
    assert distance(trained[0], plan_of(20, 4)) < 0.8 * distance(ZeroDot(), plan_of(20, 0))


@pytest.mark.slow
def test_a_dot_without_the_trajectory_is_worse_than_one_with_it(mixture, trained, distance) -> None:
    blind, _ = trained_dot(mixture, trajectory=False)
    assert distance(blind, plan_of(10, 3)) > distance(trained[0], plan_of(10, 3))


def test_giving_most_of_the_budget_to_the_dot_is_worse_than_ddim(trained, distance) -> None:
    assert distance(trained[0], plan_of(10, 8)) > distance(ZeroDot(), plan_of(10, 0))


def test_permuted_trajectories_are_worse(trained, distance) -> None:
    dot = trained[0]

    def permuted(x_s, x_i, z_s, t_s, t_i, cond=None):
        return dot(x_s.flip(0), x_i, z_s.flip(0), t_s, t_i)

    assert distance(permuted, plan_of(10, 3)) > distance(dot, plan_of(10, 3))


def test_extrapolation_is_the_line_through_two_dash_estimates() -> None:
    a, b = torch.randn(2, 3, 4)
    dot = ExtrapolationDot()
    assert float(dot(a, a, a, 900.0, 850.0).abs().max()) == 0  # one estimate makes no line
    residual = dot(b, b, b, 800.0, 750.0)
    torch.testing.assert_close(b + residual, b + (b - a) * 0.5)
    assert float(dot(a, a, a, 900.0, 850.0).abs().max()) == 0  # a new run forgets the old one


def test_the_sampler_calls_each_network_when_the_plan_says() -> None:
    called: list[str] = []

    def dash(x, t):
        called.append(f"D{t}")
        return x

    def dot(x_s, x_i, z_s, t_s, t_i, cond=None):
        called.append(f"d{t_i} after {t_s}")
        return 0 * x_i

    MorseSampler(dash, dot, lambda x, z, t, u: x)(
        torch.zeros(1), [4, 3, 2, 1, 0], MorsePlan(4, (0, 2))
    )
    assert called == ["D4", "d3 after 4", "D2", "d1 after 2"]
