"""The hook on a bare UNet: what every scheduler does with it, its state, and its refusals."""

import diffusers
import pytest
import torch
from morse_tiny import SCHEDULE, ddim, tiny_unet

from morse_diffusion.adapters.apply import apply_morse, remove_morse
from morse_diffusion.adapters.dot import MorseDot
from morse_diffusion.adapters.pixels import PixelPipeline
from morse_diffusion.adapters.schedulers import SUPPORTED, coefficients, fit_plan
from morse_diffusion.errors import (
    NumericsError,
    StateError,
    UnsupportedDenoiserError,
    UnsupportedSchedulerError,
)
from morse_diffusion.method.sampler import ZeroDot
from morse_diffusion.method.schedule import MorsePlan

PLAN = MorsePlan(20, (0, 4, 8, 12, 16))


def noise(n: int = 2) -> torch.Tensor:
    return torch.randn((n, 3, 16, 16), generator=torch.Generator().manual_seed(0))


def scheduler(name: str, **options):
    if name == "DDIMScheduler":
        return ddim(**options)
    cls = getattr(diffusers, name)
    known = {
        k: v for k, v in SCHEDULE.items() if k in cls.__init__.__wrapped__.__code__.co_varnames
    }
    return cls(**{**known, **options})


DETERMINISTIC = [
    ("DDIMScheduler", {}),
    ("DDIMScheduler", {"prediction_type": "v_prediction"}),
    ("DDIMScheduler", {"prediction_type": "sample"}),
    ("DPMSolverMultistepScheduler", {"solver_order": 1}),
    ("DPMSolverMultistepScheduler", {"solver_order": 1, "prediction_type": "v_prediction"}),
    ("DPMSolverMultistepScheduler", {"solver_order": 1, "use_karras_sigmas": True}),
    ("DEISMultistepScheduler", {"solver_order": 1}),
    ("UniPCMultistepScheduler", {"solver_order": 1, "disable_corrector": list(range(20))}),
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
    ("EDMEulerScheduler", {}),
    ("EDMEulerScheduler", {"prediction_type": "v_prediction"}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
]


@torch.no_grad()
def plain_with_dash_steps(pipe: PixelPipeline, x: torch.Tensor) -> torch.Tensor:
    """Euler in sigma over the Dash times alone, in float64 around the network."""
    sch, unet = pipe.scheduler, pipe.unet
    sch.set_timesteps(PLAN.n_total)
    name, prediction = type(sch).__name__, getattr(sch.config, "prediction_type", "flow")
    times = [sch.timesteps[i] for i in PLAN.dash_indices]
    if name == "DDIMScheduler":
        sigmas = [((1 - sch.alphas_cumprod[t]) / sch.alphas_cumprod[t]).sqrt() for t in times]
        sigmas.append(torch.tensor(0.0))
    else:
        sigmas = [sch.sigmas[i] for i in (*PLAN.dash_indices, PLAN.n_total)]
    sigmas = [float(s) for s in sigmas]
    scaled = name in ("EulerDiscreteScheduler", "EDMEulerScheduler")
    x = x.double() * float(sch.init_noise_sigma if scaled else 1.0)
    if not scaled and not name.startswith("Flow"):
        x = x * (1 + sigmas[0] ** 2) ** 0.5  # alpha x_0 + sigma e, divided by alpha
    for t, s, s_next in zip(times, sigmas[:-1], sigmas[1:], strict=True):
        if name.startswith("Flow"):
            x = x + (s_next - s) * unet(x.float(), t).sample.double()
            continue
        if name == "EDMEulerScheduler":
            total = s**2 + 0.25
            raw = unet((x / total**0.5).float(), t).sample.double()
            sign = 1 if prediction == "epsilon" else -1
            clean = 0.25 / total * x + sign * 0.5 * s / total**0.5 * raw
            x = x + (s_next - s) * (x - clean) / s
            continue
        alpha = (1 + s**2) ** -0.5
        seen = x * alpha
        raw = unet(seen.float(), t).sample.double()
        if prediction == "v_prediction":
            raw = s * alpha * seen + alpha * raw
        elif prediction == "sample":
            raw = (seen - alpha * raw) / (s * alpha)
        x = x + (s_next - s) * raw
    if not scaled and not name.startswith("Flow"):
        x = x / (1 + sigmas[-1] ** 2) ** 0.5  # DEIS ends a little above zero
    return x.float()


@pytest.mark.parametrize(("name", "options"), DETERMINISTIC)
def test_a_zero_dot_is_plain_sampling_with_the_dash_steps(name, options) -> None:
    pipe = PixelPipeline(tiny_unet(), scheduler(name, **options))
    expected = plain_with_dash_steps(pipe, noise())
    with apply_morse(pipe, ZeroDot(), PLAN):
        ours = pipe(latents=noise(), num_inference_steps=20)
    scale = max(1.0, float(expected.abs().max()))
    assert float((ours - expected).abs().max()) <= 1e-5 * scale


HELD = [
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("UniPCMultistepScheduler", {}),
    ("DEISMultistepScheduler", {}),
    ("DDPMScheduler", {"clip_sample": False}),
    ("DDPMScheduler", {"clip_sample": False, "prediction_type": "v_prediction"}),
    ("LCMScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {"prediction_type": "v_prediction"}),
    ("TCDScheduler", {}),
]


@torch.no_grad()
def holding_the_noise(pipe: PixelPipeline, x: torch.Tensor, seed: int) -> torch.Tensor:
    """The scheduler's own loop with the last Dash step's noise estimate at every other step."""
    sch, generator = pipe.scheduler, torch.Generator().manual_seed(seed)
    sch.set_timesteps(20)
    torch.manual_seed(seed)
    x = x * sch.init_noise_sigma
    for i, t in enumerate(sch.timesteps):
        seen = sch.scale_model_input(x, t)
        a, b = coefficients(sch, i)
        if i in PLAN.dash_indices:
            held = a * seen + b * pipe.unet(seen, t).sample
        extra = (
            {}
            if "UniPC" in type(sch).__name__ or "DEIS" in type(sch).__name__
            else {"generator": generator}
        )
        x = sch.step((held - a * seen) / b, t, x, **extra).prev_sample
    return x


@pytest.mark.parametrize(("name", "options"), HELD)
def test_a_zero_dot_holds_the_estimate_under_noisy_and_multistep_solvers(name, options) -> None:
    pipe = PixelPipeline(tiny_unet(), scheduler(name, **options))
    expected = holding_the_noise(pipe, noise(), 3)
    torch.manual_seed(3)
    with apply_morse(pipe, ZeroDot(), PLAN):
        ours = pipe(
            latents=noise(), num_inference_steps=20, generator=torch.Generator().manual_seed(3)
        )
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_every_supported_scheduler_has_been_tried() -> None:
    assert {name for name, _ in DETERMINISTIC + HELD} == set(SUPPORTED)


@pytest.mark.parametrize(
    "name",
    [
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "PNDMScheduler",
    ],
)
def test_a_scheduler_that_calls_twice_or_repeats_a_time_is_refused_with_advice(name) -> None:
    pipe = PixelPipeline(tiny_unet(), scheduler(name))
    with pytest.raises(UnsupportedSchedulerError, match=r"swap it.*DPMSolverMultistep"):
        apply_morse(pipe, ZeroDot(), PLAN)
    assert not hasattr(pipe.unet, "_diffusers_hook")


def test_an_untested_scheduler_warns_and_runs(capsys) -> None:
    pipe = PixelPipeline(tiny_unet(), scheduler("IPNDMScheduler"))
    apply_morse(pipe, ZeroDot(), PLAN)
    assert "IPNDMScheduler has not been tested" in capsys.readouterr().err


def test_a_list_with_a_repeated_time_is_refused(pixel_pipe) -> None:
    pipe = PixelPipeline(tiny_unet(), ddim())
    pipe.scheduler.set_timesteps(4)
    pipe.scheduler.timesteps = torch.tensor([900, 900, 300, 100])
    apply_morse(pipe, ZeroDot(), MorsePlan.uniform(2, 2))
    with pytest.raises(UnsupportedSchedulerError, match="lists a time twice"):
        pipe.unet(noise(), pipe.scheduler.timesteps[0])


def test_ddim_plans_are_rounded_to_a_step_count_that_divides_its_training_steps() -> None:
    assert fit_plan(MorsePlan.uniform(7, 17), ddim()).n_total == 20
    solver = scheduler("DPMSolverMultistepScheduler")
    assert fit_plan(MorsePlan.uniform(7, 17), solver).n_total == 24


def test_removal_leaves_the_denoiser_as_it_was() -> None:
    pipe = PixelPipeline(tiny_unet(), ddim())
    before, names = {k: v.clone() for k, v in pipe.unet.state_dict().items()}, set(vars(pipe.unet))
    plain = pipe(latents=noise(), num_inference_steps=5)
    dot = MorseDot.build(pipe.unet, m=1, channels=(8,), lora_rank=4)
    with apply_morse(pipe, dot, MorsePlan.uniform(2, 3)) as handle:
        pipe(latents=noise(), num_inference_steps=5)
        assert handle.summary().steps("Dot") == 3
    assert set(vars(pipe.unet)) == names
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())
    assert torch.equal(pipe(latents=noise(), num_inference_steps=5), plain)


def test_state_is_clean_between_calls_of_other_lengths_and_batches() -> None:
    pipe = PixelPipeline(tiny_unet(), ddim())
    dot = MorseDot.build(pipe.unet, m=1, channels=(8,), lora_rank=4)
    torch.nn.init.normal_(dot.conv_out.weight, std=0.05)
    with apply_morse(pipe, dot, MorsePlan.uniform(3, 7)):
        first = pipe(latents=noise(), num_inference_steps=10)
        pipe(latents=noise(4), num_inference_steps=20)
        assert torch.equal(pipe(latents=noise(), num_inference_steps=10), first)


def test_a_run_that_was_broken_off_leaves_nothing_behind() -> None:
    pipe = PixelPipeline(tiny_unet(), ddim())
    with apply_morse(pipe, ZeroDot(), MorsePlan.uniform(2, 8)):
        first = pipe(latents=noise(), num_inference_steps=10)
        pipe.scheduler.set_timesteps(10)
        pipe.unet(noise(), pipe.scheduler.timesteps[0])
        pipe.unet(noise(), pipe.scheduler.timesteps[1])
        assert torch.equal(pipe(latents=noise(), num_inference_steps=10), first)


def test_calls_out_of_order_are_refused() -> None:
    pipe = PixelPipeline(tiny_unet(), ddim())
    apply_morse(pipe, ZeroDot(), MorsePlan.uniform(2, 8))
    pipe.scheduler.set_timesteps(10)
    times = pipe.scheduler.timesteps
    pipe.unet(noise(), times[0])
    with pytest.raises(StateError, match="called at time 499, the scheduler's step 1 is at 899"):
        pipe.unet(noise(), times[5])
    with pytest.raises(StateError, match="the batch changed"):
        pipe.unet(noise(4), times[1])
    with pytest.raises(StateError, match="in the middle of a run"):
        remove_morse(pipe)
    with pytest.raises(StateError, match="already on this denoiser"):
        apply_morse(pipe, ZeroDot(), MorsePlan.uniform(2, 8))
    remove_morse(pipe, force=True)
    apply_morse(pipe, ZeroDot(), MorsePlan.uniform(2, 8))
    with pytest.raises(StateError, match="not in the scheduler's list"):
        pipe.unet(noise(), 555)


def test_a_dot_step_without_a_dash_step_before_it_is_refused() -> None:
    pipe = PixelPipeline(tiny_unet(), ddim())
    handle = apply_morse(pipe, ZeroDot(), MorsePlan.uniform(2, 8))
    pipe.scheduler.set_timesteps(10)
    pipe.unet(noise(), pipe.scheduler.timesteps[0])
    handle.hook._run.last = None
    with pytest.raises(StateError, match="before any Dash step"):
        pipe.unet(noise(), pipe.scheduler.timesteps[1])


def test_removing_morse_where_there_is_none_warns(capsys) -> None:
    remove_morse(PixelPipeline(tiny_unet(), ddim()))
    assert "no Morse to remove" in capsys.readouterr().err


def test_another_accelerator_on_the_denoiser_is_refused() -> None:
    pipe = PixelPipeline(tiny_unet(), ddim())
    block = pipe.unet.down_blocks[0]
    block.forward = lambda *a, **k: None
    with pytest.raises(StateError, match="another accelerator"):
        apply_morse(pipe, ZeroDot(), PLAN)
    apply_morse(pipe, ZeroDot(), PLAN, allow_caches=True)


class BadDot(ZeroDot):
    def __call__(self, x_s, x_i, z_s, t_s, t_i, cond=None):
        return z_s * float("nan")


def test_a_residual_that_is_not_finite_is_named_or_replaced_by_the_dash(capsys) -> None:
    pipe = PixelPipeline(tiny_unet(), ddim())
    with (
        apply_morse(pipe, BadDot(), MorsePlan.uniform(2, 8)),
        pytest.raises(NumericsError, match=r"residual is not finite at step 1 in torch.float32"),
    ):
        pipe(latents=noise(), num_inference_steps=10)
    plain = pipe(latents=noise(), num_inference_steps=10)
    with apply_morse(pipe, BadDot(), MorsePlan.uniform(2, 8), on_nan="dash"):
        assert torch.equal(pipe(latents=noise(), num_inference_steps=10), plain)
    assert "this step runs the Dash instead" in capsys.readouterr().err


def test_a_dash_that_is_not_finite_is_named() -> None:
    pipe = PixelPipeline(tiny_unet(), ddim())
    pipe.unet.conv_out.bias.data[0] = float("inf")
    with (
        apply_morse(pipe, ZeroDot(), MorsePlan.uniform(2, 8)),
        pytest.raises(NumericsError, match="the Dash estimate is not finite at step 0"),
    ):
        pipe(latents=noise(), num_inference_steps=10)


def test_a_denoiser_that_is_not_there_is_refused() -> None:
    with pytest.raises(UnsupportedDenoiserError, match="neither a unet nor a transformer"):
        apply_morse(object(), ZeroDot(), PLAN)
