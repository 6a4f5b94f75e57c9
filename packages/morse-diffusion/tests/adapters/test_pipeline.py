"""Whole tiny pipelines of diffusers' own classes, under guidance, with images, with other schedulers."""

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from morse_tiny import ddim, tiny_dit, tiny_flux, tiny_pixart, tiny_sd, tiny_sd3
from PIL import Image

from morse_diffusion.adapters.apply import apply_morse
from morse_diffusion.adapters.dot import MorseDot
from morse_diffusion.adapters.pipeline import MorsePipeline
from morse_diffusion.errors import GuidanceError, PlanError, UnsupportedDenoiserError
from morse_diffusion.method.sampler import ExtrapolationDot, ZeroDot
from morse_diffusion.method.schedule import MorsePlan

FIVE_OF_TWENTY = MorsePlan.uniform(5, 15)


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def latent(pipe, **kwargs) -> torch.Tensor:
    return pipe("a cat", generator=seed(), output_type="latent", **kwargs).images


def lively(dot: MorseDot) -> MorseDot:
    """A Dot whose last layer is not zero, so that it shows when it ran."""
    torch.manual_seed(1)
    torch.nn.init.normal_(dot.conv_out.weight, std=0.05)
    return dot


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_stable_diffusion_with_a_zero_dot_is_five_plain_steps(
    sd_pipe, guidance, prediction
) -> None:
    sd_pipe.scheduler = ddim(prediction_type=prediction)
    plain = latent(sd_pipe, num_inference_steps=5, guidance_scale=guidance)
    fast = MorsePipeline.from_pipe(sd_pipe, ZeroDot())
    ours = latent(fast, plan=FIVE_OF_TWENTY, guidance_scale=guidance)
    torch.testing.assert_close(ours, plain, atol=1e-4 * float(plain.abs().max()), rtol=0)


def test_guidance_rescale_is_part_of_the_estimate(sd_pipe) -> None:
    options = {"guidance_scale": 5.0, "guidance_rescale": 0.7}
    plain = latent(sd_pipe, num_inference_steps=5, **options)
    ours = latent(MorsePipeline.from_pipe(sd_pipe, ZeroDot()), plan=FIVE_OF_TWENTY, **options)
    torch.testing.assert_close(ours, plain, atol=1e-4 * float(plain.abs().max()), rtol=0)


def test_sdxl_with_a_zero_dot_is_five_plain_steps(sdxl_pipe) -> None:
    plain = latent(sdxl_pipe, num_inference_steps=5, guidance_scale=4.0)
    ours = latent(
        MorsePipeline.from_pipe(sdxl_pipe, ZeroDot()), plan=FIVE_OF_TWENTY, guidance_scale=4.0
    )
    torch.testing.assert_close(ours, plain, atol=1e-4 * float(plain.abs().max()), rtol=0)


@pytest.mark.parametrize("kind", ["sd_pipe", "sdxl_pipe"])
def test_a_learned_dot_runs_and_changes_the_result(kind, request) -> None:
    pipe = request.getfixturevalue(kind)
    dot = MorseDot.build(pipe.unet, m=1, channels=(8,), lora_rank=4, guidance=(2.0, 10.0))
    fast = MorsePipeline.from_pipe(pipe, dot, speed_ratio=4)
    held = latent(fast, dash_steps=2, dot_steps=8, guidance_scale=5.0)
    assert fast.summary().plan.pattern == "DddddDdddd"
    lively(dot).fold_()
    moved = latent(fast, dash_steps=2, dot_steps=8, guidance_scale=5.0)
    assert float((moved - held).abs().max()) > 1e-3
    assert torch.equal(moved, latent(fast, dash_steps=2, dot_steps=8, guidance_scale=5.0))


def image() -> Image.Image:
    return Image.new("RGB", (32, 32), (200, 30, 90))


def test_image_to_image_plans_over_the_steps_that_remain(sd_pipe) -> None:
    pipe = StableDiffusionImg2ImgPipeline(**sd_pipe.components, requires_safety_checker=False)
    pipe.scheduler = ddim()
    pipe.set_progress_bar_config(disable=True)
    with apply_morse(pipe, ExtrapolationDot(), MorsePlan.uniform(6, 14)) as handle:
        out = pipe("a cat", image=image(), strength=0.5, num_inference_steps=20, generator=seed())
    assert out.images[0].size == (32, 32)
    assert handle.summary().plan.pattern == "DddDddDddd"
    assert handle.summary().steps("Dash") == 3


def test_sdxl_image_to_image_with_a_zero_dot_is_plain_sampling(
    sdxl_pipe,
) -> None:
    parts = {k: v for k, v in sdxl_pipe.components.items() if v is not None}
    pipe = StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    pipe.scheduler = ddim()
    pipe.set_progress_bar_config(disable=True)
    options = {"image": image(), "strength": 0.5, "guidance_scale": 3.0}
    plain = latent(pipe, num_inference_steps=10, **options)
    with apply_morse(pipe, ZeroDot(), MorsePlan.uniform(10, 10)):
        ours = latent(pipe, num_inference_steps=20, **options)
    # 10 of 20 steps remain, every other one Dash: the 5 that remain of 10.
    torch.testing.assert_close(ours, plain, atol=1e-4 * float(plain.abs().max()), rtol=0)


@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting_runs_with_and_without_mask_channels(channels) -> None:
    base = tiny_sd(inputs=channels)
    pipe = StableDiffusionInpaintPipeline(**base.components, requires_safety_checker=False)
    pipe.scheduler = ddim(prediction_type="v_prediction")
    pipe.set_progress_bar_config(disable=True)
    inputs = {"image": image(), "mask_image": Image.new("L", (32, 32), 255), "generator": seed()}
    dot = lively(MorseDot.build(pipe.unet, m=1, channels=(8,), lora_rank=4))
    with apply_morse(pipe, dot, MorsePlan.uniform(2, 8)) as handle:
        pipe("a cat", num_inference_steps=10, height=32, width=32, strength=1.0, **inputs)
    assert (handle.summary().steps("Dash"), handle.summary().steps("Dot")) == (2, 8)


def test_a_latent_consistency_model_runs_without_a_doubled_batch() -> None:
    pipe = tiny_sd(time_cond_proj_dim=16)
    pipe.scheduler = LCMScheduler()
    dot = lively(MorseDot.build(pipe.unet, m=1, channels=(8,), lora_rank=4))
    fast = MorsePipeline.from_pipe(pipe, dot)
    out = latent(fast, plan=MorsePlan(4, (0,)), guidance_scale=7.5)
    assert bool(out.isfinite().all())
    assert fast.summary().plan.pattern == "Dddd"


def test_a_budget_is_measured_then_planned_and_told(sd_pipe, capsys) -> None:
    fast = MorsePipeline.from_pipe(sd_pipe, ZeroDot())
    sd_pipe.scheduler = DPMSolverMultistepScheduler.from_config(sd_pipe.scheduler.config)
    before = torch.random.get_rng_state()
    latent(fast, budget_lsd=6)
    assert torch.equal(torch.random.get_rng_state(), before)  # measuring spends no random number
    summary = fast.summary()
    assert "measured N =" in capsys.readouterr().err
    assert summary.steps("Dash") + summary.steps("Dot") == len(summary.plan.pattern)
    assert summary.to_json()["effective_lsd"] < 8
    assert "Dash steps of" in str(summary)


def test_full_steps_can_be_crowded_at_the_noisy_start(sd_pipe) -> None:
    fast = MorsePipeline.from_pipe(sd_pipe, ZeroDot(), early=1.5, speed_ratio=5)
    latent(fast, dash_steps=4, dot_steps=4)  # floor(8 (j / 4)^1.5) = 0, 1, 2.8, 5.2
    assert fast.summary().plan.pattern == "DDDddDdd"


def test_every_other_attribute_is_the_pipelines_own(sd_pipe) -> None:
    fast = MorsePipeline.from_pipe(sd_pipe, ZeroDot())
    assert fast.unet is sd_pipe.unet
    assert fast.vae is sd_pipe.vae
    assert not hasattr(sd_pipe.unet, "_diffusers_hook")


@pytest.mark.parametrize(
    "steps",
    [
        {},
        {"budget_lsd": 5, "num_inference_steps": 20},
        {"dash_steps": 5},
        {"plan": FIVE_OF_TWENTY, "budget_lsd": 5},
    ],
)
def test_anything_but_one_way_to_give_the_budget_is_refused(sd_pipe, steps) -> None:
    with pytest.raises(PlanError, match="give one of budget_lsd"):
        MorsePipeline.from_pipe(sd_pipe, ZeroDot())("a cat", **steps)


def test_a_total_alone_makes_a_third_of_the_steps_dash(sd_pipe) -> None:
    fast = MorsePipeline.from_pipe(sd_pipe, ZeroDot())
    latent(fast, num_inference_steps=20)
    assert fast.summary().steps("Dash") == 7


def test_a_run_without_a_dot_step_says_so(sd_pipe, capsys) -> None:
    fast = MorsePipeline.from_pipe(sd_pipe, ZeroDot())
    latent(fast, dash_steps=4, dot_steps=0)
    fast.summary()
    assert "made no Dot step" in capsys.readouterr().err


def test_a_scale_that_the_dot_was_not_trained_on_warns(sd_pipe, capsys) -> None:
    dot = MorseDot.build(sd_pipe.unet, m=1, channels=(8,), lora_rank=4, guidance=(2.0, 4.0))
    latent(MorsePipeline.from_pipe(sd_pipe, dot), plan=MorsePlan(4, (0,)), guidance_scale=7.5)
    assert "guidance scale 7.5, but the Dot was trained on 2 to 4" in capsys.readouterr().err


def test_controlnet_features_are_refused(sd_pipe) -> None:
    apply_morse(sd_pipe, ZeroDot(), FIVE_OF_TWENTY)
    sd_pipe.scheduler.set_timesteps(20)
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 32)
    with pytest.raises(UnsupportedDenoiserError, match="ControlNet"):
        sd_pipe.unet(x, 999, encoder_hidden_states=text, mid_block_additional_residual=x)


TRANSFORMERS = {"dit": tiny_dit, "pixart": tiny_pixart, "sd3": tiny_sd3, "flux": tiny_flux}


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_transformers_run_with_zero_and_learned_dots(kind) -> None:
    pipe, inputs, options = TRANSFORMERS[kind]()

    def run(dot, plan) -> torch.Tensor:
        with apply_morse(pipe, dot, plan, **options) as handle:
            out = pipe(num_inference_steps=plan.n_total, generator=seed(), **inputs)
        assert handle.summary().steps("Dot") == plan.dot_steps
        return torch.as_tensor(out[0])

    if kind in ("sd3", "flux"):  # five steps of their own would stand at other sigmas
        # Flux hands its scheduler a list that ends at 1/n.
        whole = {"sigmas": [1 - i / 20 for i in range(20)]}
        pipe.scheduler.set_timesteps(**(whole if kind == "flux" else {"num_inference_steps": 20}))
        steps = {"sigmas": [float(pipe.scheduler.sigmas[i]) for i in FIVE_OF_TWENTY.dash_indices]}
    else:
        steps = {"num_inference_steps": 5}
    plain = torch.as_tensor(pipe(generator=seed(), **steps, **inputs)[0])
    zero = run(ZeroDot(), FIVE_OF_TWENTY)
    torch.testing.assert_close(zero, plain, atol=2e-4 * float(plain.abs().max()), rtol=0)
    dot = MorseDot.build(pipe.transformer, m=1, channels=(8,), lora_rank=2)
    held = run(ZeroDot(), MorsePlan.uniform(2, 2))
    torch.testing.assert_close(run(dot, MorsePlan.uniform(2, 2)), held, atol=1e-5, rtol=1e-5)
    lively(dot)
    live = run(dot, MorsePlan.uniform(2, 2))
    assert bool(live.isfinite().all())
    assert float((live - held).abs().max()) > 1e-5


def test_guidance_that_a_pipeline_hides_has_to_be_given() -> None:
    pipe, inputs, _ = tiny_dit()
    with (
        apply_morse(pipe, ZeroDot(), FIVE_OF_TWENTY),
        pytest.raises(GuidanceError, match="does not show its scale"),
    ):
        pipe(num_inference_steps=20, generator=seed(), **inputs)
