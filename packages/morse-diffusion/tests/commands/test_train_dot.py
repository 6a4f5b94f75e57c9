"""``train-dot``: a Dot from a folder of images, resumed and launched as the README says."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusionPipeline
from morse_commands import TRAIN, run, run_command
from safetensors.torch import load_file

from morse_diffusion import MorseDot, MorsePipeline


def test_a_dot_for_a_pixel_pipeline_is_one_command_and_its_report_is_complete(trained) -> None:
    config = json.loads((trained / "config.json").read_text())
    assert config["training"]["family"] == "vp"
    assert config["training"]["updates"] == 6
    report = json.loads((trained / "run" / "report.json").read_text())
    assert report["rows"][0]["metrics"]["residual left"]["n"] == 1
    assert (trained / "run" / "checkpoints" / "step-6").is_dir()
    assert "gap_max: 1.0" in (trained / "run" / "config.yaml").read_text()


def test_a_dot_for_stable_diffusion_is_one_command_and_two_changed_lines(
    text_to_image, photos, tmp_path, capsys
) -> None:
    out = tmp_path / "dot"
    run(
        capsys, "train-dot", text_to_image, photos, *TRAIN, "--guidance", 2, 8, "--out", out,
    )  # fmt: skip
    pipe = StableDiffusionPipeline.from_pretrained(text_to_image)
    pipe.set_progress_bar_config(disable=True)
    # The two lines.
    dot = MorseDot.from_pretrained(str(out), dash=pipe.unet)
    pipe = MorsePipeline.from_pipe(pipe, dot=dot, speed_ratio=4)
    images = pipe("a", budget_lsd=4, guidance_scale=5.0).images
    assert images[0].size == (32, 32)
    assert pipe.summary().steps("Dot") > 0
    assert (out / "run" / "cache" / "latents.safetensors").is_file()
    assert json.loads((out / "config.json").read_text())["guidance"] == [2.0, 8.0]


def test_folders_that_do_not_suit_are_refused(pixels, trained, photos, tmp_path, capsys) -> None:
    empty, broken, odd = (tmp_path / name for name in ("empty", "broken", "odd"))
    for folder in (empty, broken, odd):
        folder.mkdir()
    assert "holds no image" in run(capsys, "train-dot", pixels, empty, *TRAIN, code=2)
    for i in range(4):
        (broken / f"{i}.png").write_bytes(b"no image")
    assert "4 of 4 images cannot be read" in run(
        capsys, "train-dot", pixels, broken, *TRAIN, code=2
    )
    few = ["train-dot", pixels, photos, *TRAIN, "--batch", 64]
    assert "48 training samples are fewer" in run(capsys, *few, "--out", tmp_path / "x", code=2)
    again = ["train-dot", pixels, photos, *TRAIN, "--out", trained]
    assert "holds config.json of an earlier run" in run(capsys, *again, code=2)
    # An interrupted run is not begun anew: its checkpoints would later be taken for the new run's.
    (tmp_path / "cut" / "run" / "checkpoints").mkdir(parents=True)
    again[-1] = tmp_path / "cut"
    assert "holds run/checkpoints of an earlier run" in run(capsys, *again, code=2)
    deep = ["--m", 3, "--channels", 8, 8, 8, "--rank", 2, "--steps", 2, "--batch", 4]
    error = run(capsys, "train-dot", pixels, photos, *deep, "--out", tmp_path / "y", code=2)
    assert "a side of 16 cannot be halved 3 times" in error


def test_training_says_where_it_runs(pixels, photos, tmp_path, capsys) -> None:
    one_step = [*TRAIN, "--steps", 1, "--device", "cpu", "--out", tmp_path / "dot"]
    assert run_command("train-dot", pixels, photos, *one_step) == 0
    assert capsys.readouterr().err.startswith("device: cpu\n")


@pytest.mark.slow
def test_nothing_here_needs_peft(pixels, trained) -> None:
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "from diffusers import DDPMPipeline\n"
        "from morse_diffusion import MorseDot\n"
        f"pipe = DDPMPipeline.from_pretrained({str(pixels)!r})\n"
        f"MorseDot.from_pretrained({str(trained)!r}, pipe.unet).fold_()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


CHANGED = {
    "--rank": 4,
    "--lr": "2e-3",
    "--batch": 8,
    "--seed": 1,
    "--gap-max": 0.5,
    "--ema": 0.9,
    "--clip": 2,
    "--precision": "bf16",
    "--rollout": 0.5,
}


@pytest.fixture(scope="module")
def finished(pixels, photos, tmp_path_factory):
    """A run of 6 updates that may be resumed; nothing in these tests changes it."""
    out = tmp_path_factory.mktemp("finished") / "dot"
    words = ["train-dot", pixels, photos, *TRAIN, "--device", "cpu", "--out", out, "--quiet"]
    assert run_command(*words) == 0
    return out


@pytest.mark.parametrize("name", CHANGED)
def test_a_run_is_not_resumed_with_settings_that_change_its_result(
    name, pixels, photos, finished, capsys
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    words = ["train-dot", pixels, photos, *TRAIN, "--out", finished, "--resume", "auto", "--quiet"]
    error = run(capsys, *words, name, CHANGED[name], code=2)
    _, _, line = error.rpartition("error: ")  # after the bar that diffusers draws while it loads
    assert line.count("\n") == 1
    setting = name.removeprefix("--").replace("-", "_")
    assert f"was made with {setting} " in line
    assert "resume with the same settings, or choose another --out" in line
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


def test_where_a_run_computes_and_what_it_says_may_change_when_it_is_resumed(
    pixels, photos, tmp_path, capsys
) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for picture in photos.iterdir():
        (moved / picture.name).write_bytes(picture.read_bytes())
    out, straight = tmp_path / "dot", tmp_path / "straight"
    run(capsys, "train-dot", pixels, photos, *TRAIN, "--out", out)
    free = ["--log-every", 1, "--save-every", 2, "--checkpointing", "--steps", 8]
    run(capsys, "train-dot", pixels, moved, *TRAIN, *free, "--out", out, "--resume", "auto")
    # More steps of a constant learning rate: the same Dot as without the stop.
    run(capsys, "train-dot", pixels, photos, *TRAIN, "--steps", 8, "--out", straight)
    name = "adapter_model.safetensors"
    ours, theirs = load_file(out / name), load_file(straight / name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_more_steps_of_a_falling_learning_rate_are_another_run(
    pixels, photos, tmp_path, capsys
) -> None:
    words = ["train-dot", pixels, photos, *TRAIN, "--cosine", "--out", tmp_path / "dot"]
    run(capsys, *words, "--steps", 2)
    error = run(capsys, *words, "--steps", 4, "--resume", "auto", code=2)
    assert "was made with steps 2, not 4" in error


LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]


@pytest.mark.slow
def test_accelerate_launches_the_package_by_its_name() -> None:
    words = ["-m", "morse_diffusion", "plan", "--budget-lsd", "10", "--n", "6", "--json"]
    done = subprocess.run([*LAUNCH, "--num_processes", "1", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pattern"].startswith("Ddd")


@pytest.mark.slow
def test_accelerate_trains_with_two_processes(pixels, photos, tmp_path) -> None:
    words = ["train-dot", pixels, photos, *TRAIN, "--device", "cpu", "--out", "dot"]
    done = subprocess.run(
        [*LAUNCH, "--num_processes", "2", "-m", "morse_diffusion", *map(str, words)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("device: cpu") == 1  # rank 0 alone speaks
    assert json.loads((tmp_path / "dot" / "config.json").read_text())["training"]["updates"] == 6
