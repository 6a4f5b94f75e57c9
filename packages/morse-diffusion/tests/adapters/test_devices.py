"""Where a Dot computes: it follows its Dash, also under offloading, and training goes where it is told.

"meta" stands for a second device; the tests marked cuda need a card.
"""

import copy
import pickle
import subprocess
import sys

import accelerate
import pytest
import torch
from diffusers import DDPMPipeline, DPMSolverMultistepScheduler
from morse_tiny import ddim, tiny_sd, tiny_unet
from PIL import Image

from effml_common.errors import InputError
from morse_diffusion.adapters.apply import apply_morse
from morse_diffusion.adapters.dot import MorseDot
from morse_diffusion.adapters.pipeline import MorsePipeline
from morse_diffusion.adapters.pixels import PixelPipeline
from morse_diffusion.errors import UnsupportedDenoiserError
from morse_diffusion.method.sampler import ExtrapolationDot, ZeroDot
from morse_diffusion.method.schedule import MorsePlan
from morse_diffusion.training import accelerator as accelerator_module
from morse_diffusion.training.accelerator import accelerator_on

META = torch.device("meta")
PLAN = MorsePlan.uniform(2, 4)


def tiny_dot(unet) -> MorseDot:
    """A Dot whose last layer is not zero, so that it shows when it ran."""
    dot = MorseDot.build(unet, m=1, channels=(8,), lora_rank=4, guidance=(2.0, 10.0))
    torch.manual_seed(1)
    torch.nn.init.normal_(dot.conv_out.weight, std=0.05)
    return dot


def latent(pipe, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    call = {"generator": generator, "output_type": "latent", "guidance_scale": 5.0, **options}
    return pipe("a cat", **call).images.cpu()


def test_a_folded_dot_follows_its_dash_to_another_device() -> None:
    unet = tiny_unet()
    dot = tiny_dot(unet)
    dot.prepare(unet, ddim())
    dot.follow(unet.to(META), META)
    weights = [*dot.parameters(), *(p for c in dot._folded.values() for p in c.parameters())]
    assert {weight.device for weight in weights} == {META}


def test_a_run_takes_the_dot_to_where_it_runs(sd_pipe) -> None:
    places = []

    class Following(ZeroDot):
        def follow(self, denoiser, device) -> None:
            places.append((denoiser, device))

    fast = MorsePipeline.from_pipe(sd_pipe, Following())
    for _ in range(2):
        latent(fast, plan=PLAN)
    assert places == [(sd_pipe.unet, torch.device("cpu"))] * 2


def test_a_dot_of_one_copy_of_a_dash_runs_on_the_copy_that_samples(sd_pipe) -> None:
    dot = tiny_dot(tiny_sd().unet.to(torch.float64))
    fast = MorsePipeline.from_pipe(sd_pipe, dot)
    latent(fast, plan=PLAN)
    assert dot.dash is sd_pipe.unet
    assert next(dot.parameters()).dtype == torch.float32


def test_an_offloading_pipeline_is_accelerated_at_every_call(sd_pipe) -> None:
    dot = tiny_dot(sd_pipe.unet)
    plain = latent(MorsePipeline.from_pipe(sd_pipe, dot), plan=PLAN)
    sd_pipe.enable_model_cpu_offload(device="cpu")
    with apply_morse(sd_pipe, dot, PLAN) as handle:
        for _ in range(2):  # diffusers takes its own hooks off and on again after each
            assert torch.equal(latent(sd_pipe, num_inference_steps=6), plain)
            assert handle.summary().steps("Dot") == 4
            assert not dot._folded  # the Dot left the device with its Dash
    assert torch.equal(latent(MorsePipeline.from_pipe(sd_pipe, dot), plan=PLAN), plain)
    sd_pipe.remove_all_hooks()
    assert not hasattr(sd_pipe.unet, "_diffusers_hook")
    assert sd_pipe.unet.forward.__func__ is type(sd_pipe.unet).forward


def test_offloading_switched_on_under_morse_keeps_it(sd_pipe) -> None:
    with apply_morse(sd_pipe, ZeroDot(), PLAN) as handle:
        sd_pipe.enable_model_cpu_offload(device="cpu")
        latent(sd_pipe, num_inference_steps=6)
        assert handle.summary().steps("Dot") == 4
    assert hasattr(sd_pipe.unet, "_hf_hook")
    sd_pipe.remove_all_hooks()
    assert sd_pipe.unet.forward.__func__ is type(sd_pipe.unet).forward


def test_a_dash_that_is_offloaded_layer_by_layer_is_refused(sd_pipe, tmp_path) -> None:
    dot = tiny_dot(sd_pipe.unet)
    dot.save_pretrained(str(tmp_path))
    accelerate.cpu_offload(sd_pipe.unet, torch.device("cpu"))
    for attempt in (
        lambda: latent(MorsePipeline.from_pipe(sd_pipe, dot), plan=PLAN),
        lambda: MorseDot.from_pretrained(str(tmp_path), sd_pipe.unet),
        lambda: MorseDot.build(sd_pipe.unet),
    ):
        with pytest.raises(UnsupportedDenoiserError, match="enable_model_cpu_offload"):
            attempt()


def test_methods_that_return_the_pipeline_return_the_wrapper(sd_pipe) -> None:
    fast = MorsePipeline.from_pipe(sd_pipe, ZeroDot())
    assert fast.to("cpu") is fast
    assert fast.to(torch.float64).unet.dtype == torch.float64
    pixels = PixelPipeline(tiny_unet(), ddim())
    wrapped = MorsePipeline.from_pipe(pixels, ZeroDot())
    assert wrapped.to("cpu") is wrapped
    assert fast.progress_bar(range(2)) is not fast


def test_attributes_are_set_on_the_pipeline(sd_pipe) -> None:
    fast = MorsePipeline.from_pipe(sd_pipe, ZeroDot())
    fast.scheduler = DPMSolverMultistepScheduler.from_config(sd_pipe.scheduler.config)
    assert isinstance(sd_pipe.scheduler, DPMSolverMultistepScheduler)
    assert "scheduler" not in vars(fast)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda fast: pickle.loads(pickle.dumps(fast))]
)
def test_a_wrapper_can_be_copied(copied, sd_pipe) -> None:
    fast = MorsePipeline.from_pipe(sd_pipe, tiny_dot(sd_pipe.unet), speed_ratio=4)
    twin = copied(fast)
    assert torch.equal(latent(twin, plan=PLAN), latent(fast, plan=PLAN))
    with pytest.raises(AttributeError, match="_no_such_thing"):
        _ = twin._no_such_thing


def test_a_measured_speed_ratio_is_that_of_its_device(sd_pipe) -> None:
    fast = MorsePipeline.from_pipe(sd_pipe, ZeroDot())
    sd_pipe.scheduler = DPMSolverMultistepScheduler.from_config(sd_pipe.scheduler.config)
    measured = fast.measure_speed_ratio("a cat", output_type="latent")
    assert fast._known_ratio == measured
    sd_pipe.to(META)
    assert fast._known_ratio is None


def test_extrapolation_forgets_the_estimates_of_another_device() -> None:
    dot, there, here = ExtrapolationDot(), torch.ones(1, device=META), torch.ones(1)
    dot(there, there, there, 900.0, 800.0)
    assert torch.equal(dot(here, here, here, 700.0, 600.0), torch.zeros(1))


def test_training_computes_where_it_is_told(monkeypatch) -> None:
    # One process may train more than once, in another precision or elsewhere.
    for precision, place in (("no", "cpu"), ("bf16", "meta"), ("no", "cpu")):
        accelerator = accelerator_on(torch.device(place), precision)
        assert (accelerator.device.type, accelerator.mixed_precision) == (place, precision)

    class Elsewhere:
        device = torch.device("cuda", 1)

        def __init__(self, **_) -> None:
            pass

    monkeypatch.setattr(accelerator_module, "Accelerator", Elsewhere)
    with pytest.raises(InputError, match="launched for cuda, not cpu; add --device cuda"):
        accelerator_on(torch.device("cpu"))


@pytest.mark.cuda
def test_on_a_card_morse_samples_as_on_the_cpu(sd_pipe) -> None:
    dot = tiny_dot(sd_pipe.unet)
    fast = MorsePipeline.from_pipe(sd_pipe, dot)
    here = latent(fast, plan=PLAN)
    fast = fast.to("cuda")
    assert isinstance(fast, MorsePipeline)
    there = latent(fast, plan=PLAN)
    assert fast.summary().steps("Dot") == 4
    assert next(dot.parameters()).is_cuda
    torch.testing.assert_close(there, here, atol=2e-2 * float(here.abs().max()), rtol=0)
    back = latent(fast.to("cpu"), plan=PLAN)
    assert torch.equal(back, here)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_card_an_offloading_pipeline_is_accelerated(dtype, sd_pipe) -> None:
    dot = tiny_dot(sd_pipe.unet)
    here = latent(MorsePipeline.from_pipe(sd_pipe, dot), plan=PLAN)
    sd_pipe.to(dtype).enable_model_cpu_offload()
    fast = MorsePipeline.from_pipe(sd_pipe, dot)
    for _ in range(2):
        there = latent(fast, plan=PLAN)
        assert fast.summary().steps("Dot") == 4
        assert not next(dot.parameters()).is_cuda
    assert bool(there.isfinite().all())
    if dtype == torch.float32:
        torch.testing.assert_close(there, here, atol=2e-2 * float(here.abs().max()), rtol=0)


@pytest.mark.cuda
def test_on_a_card_the_budget_is_measured_there(sd_pipe, capsys) -> None:
    sd_pipe.scheduler = DPMSolverMultistepScheduler.from_config(sd_pipe.scheduler.config)
    fast = MorsePipeline.from_pipe(sd_pipe, ZeroDot()).to("cuda")
    latent(fast, budget_lsd=4)
    assert "measured N =" in capsys.readouterr().err


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_on_a_card_a_dot_is_trained_and_samples(precision, tmp_path) -> None:
    DDPMPipeline(unet=tiny_unet(), scheduler=ddim()).save_pretrained(tmp_path / "pipe")
    (tmp_path / "photos").mkdir()
    for i in range(8):
        Image.new("RGB", (16, 16), (30 * i, 90, 0)).save(tmp_path / "photos" / f"{i}.png")
    train = "train-dot pipe photos --m 1 --channels 8 --rank 2 --steps 3 --batch 4 --out dot"
    sample = "sample pipe dot --budget-lsd 4 --speed-ratio 4 --n 2 --out images"
    for command in (f"{train} --precision {precision}", sample):
        code = "from morse_diffusion.cli import main; main()"
        words = [sys.executable, "-c", code, *command.split()]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "device: cuda:0 (" in done.stderr
    assert (tmp_path / "images" / "0001.png").is_file()
