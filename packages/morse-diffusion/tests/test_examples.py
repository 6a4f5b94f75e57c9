"""The examples run as they are written, on tiny models, and come out as they say."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline
from morse_tiny import SCHEDULE, tiny_dit, tiny_sd
from PIL import Image

from morse_diffusion import MorseDot

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = {
    "check_that_a_dot_earns_its_cost",
    "sample_stable_diffusion_within_a_budget",
    "speed_up_ddim_without_training",
    "train_dot_for_dit",
    "train_dot_for_stable_diffusion",
}
Run = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.skipif(
    not EXAMPLES.exists(), reason="the examples are not beside these tests"
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run an example in an empty folder, on the CPU; its global names come back."""

    def run(name: str, *words: Any) -> dict[str, Any]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        return runpy.run_path(str(EXAMPLES / f"{name}.py"))

    return run


def size_of(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as image:
        return image.size


def test_every_example_is_short_and_tested_here() -> None:
    lines = {path.stem: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert set(lines) == SCRIPTS
    assert max(lines.values()) <= 60


def test_a_dot_is_trained_for_a_pipeline_with_pndm_and_then_samples(
    run, photos, tmp_path, capsys
) -> None:
    pipe = tiny_sd()
    pipe.scheduler = PNDMScheduler(skip_prk_steps=True, **SCHEDULE)
    pipe.save_pretrained(tmp_path / "sd")
    names = run("train_dot_for_stable_diffusion", "sd", photos, "dot", 3, 4)
    assert 0 < names["residual_left"] < 2
    assert "48 latents of [4, 16, 16]" in capsys.readouterr().out

    # The folder holds the trained weights, for this UNet, and what they were trained for.
    unet = StableDiffusionPipeline.from_pretrained(tmp_path / "sd").unet
    dot = MorseDot.from_pretrained(tmp_path / "dot", dash=unet)
    trained = names["dot"].state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in dot.state_dict().items())
    assert float(trained["conv_out.weight"].abs().max()) > 0  # it starts at zero
    config = json.loads((tmp_path / "dot/config.json").read_text())
    assert (config["guidance"], config["training"]["family"]) == ([2.0, 10.0], "vp")

    # With N = 6, 5 LSD pay for 4 Dash and 6 Dot steps; the image is another one than without Morse.
    names = run("sample_stable_diffusion_within_a_budget", "sd", "dot", 5, "abc", 6)
    summary = names["summary"]
    assert summary.plan.lsd <= 5
    assert (summary.steps("Dash"), summary.steps("Dot")) == (4, 6)
    assert size_of(tmp_path / "plain.png") == size_of(tmp_path / "morse.png") == (32, 32)
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "morse.png").read_bytes()


def test_extrapolation_calls_the_network_as_often_as_plain_sampling(
    run, text_to_image, tmp_path, capsys
) -> None:
    names = run("speed_up_ddim_without_training", text_to_image, 4, "abc")
    # 10 steps, 4 of them full: floor(10 (j / 4)^1.5) = 0, 1.2, 3.5, 6.5.
    assert capsys.readouterr().out.startswith("DDdDddDddd: 4 calls of the UNet")
    assert names["summary"].steps("Dash") == 4
    assert all(0 < error < 1 for error in names["errors"].values())
    for name in ("plain", "extrapolated", "reference"):
        assert size_of(tmp_path / f"{name}.png") == (32, 32)


def test_the_rows_of_the_check_have_equal_cost_and_a_distance_each(
    run, pixels, trained, photos, capsys
) -> None:
    names = run("check_that_a_dot_earns_its_cost", pixels, trained, photos, 4, 40, 4)
    plan = names["plan"]
    assert plan.lsd <= 4
    assert names["rows"]["full steps alone"][1].dash_steps == 4
    assert names["rows"]["extrapolation"][1].dash_steps == 4
    assert names["early"].lsd == plan.lsd
    assert names["early"].pattern != plan.pattern

    # Every filling gives other images; a Dot of six updates is no better than none.
    distances = names["distances"]
    assert set(distances) == set(names["rows"])
    assert all(np.isfinite(distance) and distance > 0 for distance in distances.values())
    assert len(set(distances.values())) == len(distances)
    assert capsys.readouterr().out.count(" LSD  Frechet distance ") == len(distances)


def test_a_dot_learns_from_latents_of_ones_own_and_runs_on_a_dit(run, tmp_path) -> None:
    pipe, _, _ = tiny_dit()
    pipe.save_pretrained(tmp_path / "dit")
    generator = np.random.default_rng(0)
    latents = generator.normal(size=(12, 4, 16, 16)).astype(np.float32)
    np.savez(tmp_path / "latents.npz", latents=latents, labels=np.arange(12) % 3)

    names = run("train_dot_for_dit", "dit", "latents.npz", "dot", 3, 4)
    assert 0 < names["residual_left"] < 2
    assert names["summary"].plan.pattern == "Dd" * 8
    assert (names["summary"].steps("Dash"), names["summary"].steps("Dot")) == (8, 8)
    assert size_of(tmp_path / "class-0.png") == size_of(tmp_path / "class-1.png") == (32, 32)
    config = json.loads((tmp_path / "dot/config.json").read_text())
    assert config["dash_class"] == "DiTTransformer2DModel"
