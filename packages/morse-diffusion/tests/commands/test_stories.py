"""What a user does, through the command line; commands run in this process to save the imports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, StableDiffusionPipeline
from morse_tiny import ddim, tiny_sd, tiny_unet
from PIL import Image

from effml_common.cli import main
from morse_diffusion import MorseDot, MorsePipeline
from morse_diffusion.adapters.sampling_methods import build_solver, crowded_times
from morse_diffusion.cli import COMMANDS

TRAIN = ["--m", "1", "--channels", "8", "--rank", "2", "--steps", "6", "--batch", "4"]
TRAIN += ["--lr", "1e-3", "--save-every", "3"]


def run(capsys, *words: object, code: int = 0) -> str:
    capsys.readouterr()
    # What is tested here is the same on a machine with a card.
    place = ("--device", "cpu") if words[0] in ("demo", "train-dot", "sample", "bench") else ()
    given = [str(word) for word in (words if "--device" in words else (*words, *place))]
    assert main("morse-diffusion", "morse-diffusion", COMMANDS, given) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    lines = []
    for i in range(48):
        values = (torch.rand((20, 24, 3), generator=generator) * 255).to(torch.uint8)
        Image.fromarray(values.numpy()).save(folder / f"{i:02d}.png")
        lines.append(json.dumps({"file_name": f"{i:02d}.png", "text": "abc"[i % 3]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def pixels(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pixels") / "pipe"
    DDPMPipeline(unet=tiny_unet(), scheduler=ddim()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_to_image(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sd") / "pipe"
    tiny_sd().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(pixels, photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "dot"
    words = [
        "train-dot",
        str(pixels),
        str(photos),
        *TRAIN,
        "--device",
        "cpu",
        "--out",
        str(out),
        "--quiet",
    ]
    assert main("morse-diffusion", "morse-diffusion", COMMANDS, words) == 0
    return out


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


def test_samples_are_written_with_the_summary_of_the_run(pixels, trained, tmp_path, capsys) -> None:
    out = tmp_path / "images"
    words = ["sample", pixels, trained, "--budget-lsd", 4, "--speed-ratio", 4, "--n", 3]
    told = json.loads(run(capsys, *words, "--out", out, "--json"))
    assert told["files"] == ["0000.png", "0001.png", "0002.png"]
    for name in told["files"]:
        with Image.open(out / name) as picture:
            assert picture.size == (16, 16)
    assert told["summary"]["dot_steps"] > 0
    first = [(out / name).read_bytes() for name in told["files"]]
    again = tmp_path / "again"
    run(capsys, *words, "--out", again)
    assert [(again / name).read_bytes() for name in told["files"]] == first


def test_bench_measures_every_method_or_says_that_the_dot_is_too_slow(
    pixels, trained, photos, tmp_path, capsys, monkeypatch
) -> None:
    from morse_diffusion.adapters.timing import StepTimes
    from morse_diffusion.commands import bench

    words = ["bench", pixels, trained, photos, "--budgets", 3, 5, "--samples", 48, "--json"]
    slow = StepTimes(dash=1.2, dot=1.0, cached=None)
    monkeypatch.setattr(bench, "measure_times", lambda *a, **k: slow)
    error = run(capsys, *words, "--out", tmp_path / "slow", code=2)
    assert "measured N = 1.20: the Dot is too slow" in error
    assert not (tmp_path / "slow").exists()
    fast = StepTimes(dash=4.0, dot=1.0, cached=None)
    monkeypatch.setattr(bench, "measure_times", lambda *a, **k: fast)
    told = json.loads(run(capsys, *words, "--early", 2, "--out", tmp_path / "fast"))
    names = {row["name"] for row in told["rows"]}
    assert names == {
        "DDIM", "DPM-Solver++ 2M", "UniPC", "extrapolation on DDIM", "Morse on DDIM", "Morse on 2M",
    }  # fmt: skip
    assert len(told["rows"]) == 12
    assert (tmp_path / "fast" / "run" / "quality.png").is_file()


def test_bench_crowds_the_full_steps_of_morse_alone() -> None:
    from morse_diffusion.commands.bench import chosen_methods
    from morse_diffusion.config import BenchConfig

    methods = chosen_methods(BenchConfig(pipe="p", dot="d", data="i", early=1.5))
    assert {method.name: method.early for method in methods if method.early > 1} == {
        "Morse on DDIM": 1.5, "Morse on 2M": 1.5,
    }  # fmt: skip


def test_inspect_describes_a_dot(trained, capsys) -> None:
    told = json.loads(run(capsys, "inspect", "--dot", trained, "--json"))
    assert (told["m"], told["channels"], told["lora_rank"]) == (1, [8], 2)


def test_plan_prints_the_pattern_of_a_budget(tmp_path, capsys) -> None:
    told = json.loads(run(capsys, "plan", "--budget-lsd", 10, "--n", 6, "--json"))
    assert told["pattern"].count("D") == 7
    profile = tmp_path / "profile.json"
    profile.write_text('{"t_dash": 9, "t_dot": 1, "t_sched": 1}')
    told = json.loads(run(capsys, "plan", "--budget-ms", 100, "--profile", profile, "--json"))
    assert told["N"] == 5
    told = json.loads(run(capsys, "plan", "--budget-lsd", 10, "--n", 6, "--early", 2, "--json"))
    # 25 steps, 7 of them Dash: floor(25 (j / 7)^2) = 0, 0, 2, 4, 8, 12, 18.
    assert told["dash_indices"] == [0, 1, 2, 4, 8, 12, 18]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "--budget-lsd", "0.5", "--n", "6"], "at least 1 LSD"),
        (["plan", "--budget-lsd", "10", "--n", "1"], "N is 1.0"),
        (["plan", "--budget-lsd", "10", "--n", "6", "--early", "0.5"], "early is 0.5"),
        (["plan", "--budget-lsd", "10"], "N is not given"),
        (["plan", "--budget-ms", "10"], "no profile given"),
        (["inspect"], "either a Dot or the published shape"),
        (["inspect", "--dot", "nowhere"], "holds no Dot"),
        (["train-dot", "nowhere", "nowhere"], "holds no diffusers pipeline"),
        (["train-dot", "a", "b", "--m", "2", "--channels", "8"], "do not fit m=2"),
        (["train-dot", "a", "b", "--gap-max", "0"], "gap_max must be in"),
        (["train-dot", "a", "b", "--guidance", "9", "2"], "guidance must be one scale or a range"),
        (["train-dot", "a", "b", "--batch", "0"], "batch must be 1 or more"),
        (["sample", "nowhere", "dot"], "holds no diffusers pipeline"),
        (["sample", "a", "b", "--budget-lsd", "0"], "budget_lsd is 0"),
        (["bench", "a", "b", "c", "--baselines", "magic"], "baseline ['magic'] is not known"),
        (["demo", "--samples", "4"], "samples must be 32 or more"),
    ],
)
def test_bad_input_gives_one_line_and_writes_nothing(
    words, said, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error = run(capsys, *words, code=2).removeprefix("device: cpu\n")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
    assert list(tmp_path.iterdir()) == []


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
    deep = ["--m", 3, "--channels", 8, 8, 8, "--rank", 2, "--steps", 2, "--batch", 4]
    error = run(capsys, "train-dot", pixels, photos, *deep, "--out", tmp_path / "y", code=2)
    assert "a side of 16 cannot be halved 3 times" in error


def test_a_device_that_is_not_there_is_refused(pixels, trained, capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    error = run(capsys, "sample", pixels, trained, "--device", "cuda", code=2)
    assert error.startswith("error: device cuda is not there")
    assert error.count("\n") == 1


def test_training_says_where_it_runs(pixels, photos, tmp_path, capsys) -> None:
    one_step = [*TRAIN, "--steps", 1, "--device", "cpu", "--out", tmp_path / "dot"]
    words = ["train-dot", pixels, photos, *one_step]
    assert main("morse-diffusion", "morse-diffusion", COMMANDS, [str(w) for w in words]) == 0
    assert capsys.readouterr().err.startswith("device: cpu\n")


@pytest.mark.parametrize("command", ["demo", "train-dot", "sample", "bench"])
def test_every_command_that_computes_takes_a_device(command, pixels, photos, capsys) -> None:
    places = {"demo": (), "train-dot": (pixels, photos), "sample": (pixels, "dot")}
    words = [command, *places.get(command, (pixels, "dot", photos)), "--device", "gpu"]
    assert run(capsys, *words, code=2) == (
        "error: device 'gpu' is unknown; use auto (cuda, else cpu), cpu, cuda, cuda:N, mps or xpu\n"
    )


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


@pytest.mark.slow
def test_the_demo_writes_its_report(tmp_path) -> None:
    out = tmp_path / "demo"
    code = "from morse_diffusion.cli import main; main()"
    done = subprocess.run(
        [
            sys.executable, "-c", code, "demo", "--samples", "64", "--budgets", "5", "10",
            "--out", str(out), "--json",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["rows"]) == 11
    assert {"report.html", "quality.png", "samples.png"} <= {
        p.name for p in (out / "run").iterdir()
    }


def test_a_respaced_run_takes_the_schedule_s_own_times_when_it_crowds_nothing() -> None:
    scheduler = build_solver("ddim", ddim().config)
    scheduler.set_timesteps(10)
    assert crowded_times(10, 1.0, 1000) == scheduler.timesteps.tolist()
    # 1000 (1 - (j / 4)^1.5) - 1 for j = 0 to 3.
    assert crowded_times(4, 1.5, 1000) == [999, 874, 645, 349]
