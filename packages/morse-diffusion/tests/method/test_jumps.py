"""Closed-form jumps against diffusers' own schedulers and against hand-written posteriors."""

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from morse_tiny import SCHEDULE, ddim

from effml_common.errors import ConfigError
from morse_diffusion.adapters.schedulers import process_of
from morse_diffusion.method.jumps import Process, ddpm_jump, space_coefficients


def tensors(n: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn((2, 3, 4, 4), generator=generator) for _ in range(n)]


def test_the_vp_jump_is_one_step_of_ddim() -> None:
    scheduler = ddim()
    scheduler.set_timesteps(10)
    x, e, noise = tensors()
    t_s, t_o = (torch.full((2,), float(t)) for t in scheduler.timesteps[3:5])
    ours = process_of(scheduler).jump(x, e, t_s, t_o, noise)
    torch.testing.assert_close(ours, scheduler.step(e, scheduler.timesteps[3], x).prev_sample)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_an_euler_step_in_sigma_is_the_vp_jump_of_the_scaled_inputs(prediction: str) -> None:
    scheduler = EulerDiscreteScheduler(prediction_type=prediction, **SCHEDULE)
    scheduler.set_timesteps(10)
    raw, out, noise = tensors()
    times = scheduler.timesteps[2:4].round()
    scheduler.sigmas[2:4] = torch.tensor(
        [((1 - a) / a) ** 0.5 for a in scheduler.alphas_cumprod[times.long()]]
    )
    raw = raw * scheduler.sigmas[2]
    seen = scheduler.scale_model_input(raw, scheduler.timesteps[2])
    process = process_of(scheduler)
    t_s, t_o = (torch.full((2,), float(t)) for t in times)
    z = process.to_space(out, seen, t_s, prediction)
    ours = process.jump(seen, z, t_s, t_o, noise)
    stepped = scheduler.step(out, scheduler.timesteps[2], raw).prev_sample
    theirs = stepped / (scheduler.sigmas[3] ** 2 + 1) ** 0.5
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_the_flow_jump_is_one_step_of_flow_matching() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(8)
    x, v, noise = tensors()
    t_s, t_o = (torch.full((2,), float(t)) for t in scheduler.timesteps[2:4])
    ours = process_of(scheduler).jump(x, v, t_s, t_o, noise)
    torch.testing.assert_close(ours, scheduler.step(v, scheduler.timesteps[2], x).prev_sample)


def test_the_edm_jump_is_one_step_of_edm_euler() -> None:
    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(8)
    raw, out, noise = tensors()
    raw = raw * scheduler.sigmas[2]
    seen = scheduler.scale_model_input(raw, scheduler.timesteps[2])
    process = process_of(scheduler)
    t_s, t_o = (torch.full((2,), float(t)) for t in scheduler.timesteps[2:4])
    denoised = process.to_space(out, seen, t_s, "epsilon")
    stepped = scheduler.step(out, scheduler.timesteps[2], raw)
    torch.testing.assert_close(denoised, stepped.pred_original_sample, atol=1e-4, rtol=1e-4)
    theirs = stepped.prev_sample / (scheduler.sigmas[3] ** 2 + 0.25) ** 0.5
    ours = process.jump(seen, denoised, t_s, t_o, noise)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_lcm_jump_is_one_step_of_lcm_given_its_noise() -> None:
    scheduler = LCMScheduler(clip_sample=False)
    scheduler.set_timesteps(4)
    x, e, _ = tensors()
    stepped = scheduler.step(
        e, scheduler.timesteps[1], x, generator=torch.Generator().manual_seed(5)
    ).prev_sample
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    t_s, t_o = (torch.full((2,), float(t)) for t in scheduler.timesteps[1:3])
    ours = process_of(scheduler).jump(x, e, t_s, t_o, noise)
    torch.testing.assert_close(ours, stepped, atol=1e-5, rtol=1e-4)


def test_the_ddpm_jump_draws_from_the_posterior() -> None:
    # q(x_o | x_s, x0) as the product of the two Gaussians q(x_o | x0) and q(x_s | x_o), in float64.
    a_s, a_o = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    s_s, s_o = (1 - a_s**2).sqrt(), (1 - a_o**2).sqrt()
    x0, x = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-0.4, dtype=torch.float64)
    ratio, extra = a_s / a_o, 1 - (a_s / a_o) ** 2
    precision = 1 / s_o**2 + ratio**2 / extra
    mean = (a_o * x0 / s_o**2 + ratio * x / extra) / precision
    e = (x - a_s * x0) / s_s
    one = torch.ones((), dtype=torch.float64)
    still = ddpm_jump(x, e, a_s, s_s, a_o, s_o, 0 * one)
    torch.testing.assert_close(still, mean)
    torch.testing.assert_close(ddpm_jump(x, e, a_s, s_s, a_o, s_o, one) - still, precision**-0.5)


def test_clipping_bounds_the_clean_estimate_as_ddim_does() -> None:
    scheduler = ddim(clip_sample=True)
    scheduler.set_timesteps(10)
    x, e, noise = tensors()
    x = 3 * x
    t_s, t_o = (torch.full((2,), float(t)) for t in scheduler.timesteps[3:5])
    ours = process_of(scheduler).jump(x, e, t_s, t_o, noise)
    step = scheduler.step(e, scheduler.timesteps[3], x, use_clipped_model_output=True)
    torch.testing.assert_close(ours, step.prev_sample, atol=1e-5, rtol=1e-4)


def test_v_prediction_becomes_noise() -> None:
    x0, e, _ = tensors()
    alpha, sigma = 0.6, 0.8
    x, v = alpha * x0 + sigma * e, alpha * e - sigma * x0
    a, b = space_coefficients("v_prediction", alpha, sigma)
    torch.testing.assert_close(a * x + b * v, e)


@pytest.mark.parametrize("family", ["vp", "flow", "edm"])
def test_pairs_are_ordered_and_no_further_apart_than_allowed(family) -> None:
    levels = DPMSolverMultistepScheduler().alphas_cumprod
    process = Process(family=family, levels=levels)
    generator = torch.Generator().manual_seed(0)
    t_s, t_o = process.draw_pair(2000, generator, gap_max=0.25)
    assert bool((t_s > t_o).all())
    if family != "edm":
        assert float((t_s - t_o).max()) <= 250
        assert float(t_s.max()) > 900


def test_two_steps_are_the_least_that_a_jump_needs() -> None:
    with pytest.raises(ConfigError, match="needs at least 2"):
        Process(family="vp", steps=1)
    # T = 2 has one pair only, and it is found.
    t_s, t_o = Process(family="vp", steps=2).draw_pair(8, torch.Generator().manual_seed(0))
    assert t_s.tolist() == [1.0] * 8
    assert t_o.tolist() == [0.0] * 8


def test_an_unknown_prediction_is_refused() -> None:
    with pytest.raises(ConfigError, match="prediction type score is not known"):
        space_coefficients("score", 1.0, 0.0)
