"""Commands, Python, links and file names of the README and of docs/ are what they say."""

import dataclasses
import importlib
import inspect
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline
from morse_commands import TRAIN, run_command
from PIL import Image

from effml_common.parsing import parse
from morse_diffusion import MorsePipeline, MorsePlan, apply_morse
from morse_diffusion.commands.plan import read_profile
from morse_diffusion.config import TrainDotConfig

PACKAGE = Path(__file__).parents[1]
README = PACKAGE / "README.md"
PAGES = [README, *sorted((PACKAGE / "docs").glob("*.md"))]

pytestmark = pytest.mark.skipif(not README.exists(), reason="the README is not beside these tests")


def blocks(page: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


STUDIES = {"study": "StudyConfig", "ablation": "AblationConfig"}


@pytest.mark.parametrize("study", STUDIES)
def test_the_commands_of_the_studies_are_accepted(study: str) -> None:
    if not (PACKAGE.parents[1] / "benchmarks").exists():
        pytest.skip("the package alone, outside of its repository")
    prefix = f"uv run python -m benchmarks.morse_diffusion.{study} "
    settings = getattr(
        importlib.import_module(f"benchmarks.morse_diffusion.{study}"), STUDIES[study]
    )
    lines = [
        line.removeprefix(prefix)
        for block in blocks(PACKAGE / "docs/results.md", "")
        for line in block.splitlines()
        if line.startswith(prefix)
    ]
    assert lines
    for words in lines:
        assert isinstance(parse(settings, shlex.split(words), prog=study), settings), words


def test_the_commands_of_the_readme_run_one_after_the_other_and_then_its_python(
    text_to_image, photos, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/my-pipeline").symlink_to(text_to_image)
    (tmp_path / "photos").symlink_to(photos)

    # A tiny Dot and N by hand: on networks as small as these a Dot step takes longer than a full one.
    small = {"train-dot": TRAIN, "bench": [], "sample": ["--speed-ratio", "4", "--n", "1"]}
    lines = [shlex.split(line) for line in blocks(README, "")[1].splitlines()]
    assert [line[1] for line in lines] == list(small)
    for _, verb, *words in lines:
        if verb != "bench":  # tests/commands/test_bench.py
            words += [*small[verb], "--device", "cpu"]
            assert run_command(verb, *words) == 0, capsys.readouterr().err
    with Image.open(tmp_path / "images/0000.png") as picture:
        assert picture.size == (32, 32)

    # Only the device and N are changed.
    monkeypatch.setattr(StableDiffusionPipeline, "to", lambda pipe, _: pipe)
    monkeypatch.setattr(MorsePipeline, "measure_speed_ratio", lambda *a, **k: 4.0)
    (code,) = blocks(README, "python")
    assert len(code.splitlines()) <= 10
    capsys.readouterr()
    exec(code, {})
    said = capsys.readouterr().out
    assert said.startswith("Morse: D")
    assert "Dot steps of" in said
    with Image.open(tmp_path / "bicycle.png") as picture:
        assert picture.size == (32, 32)


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_the_python_of_the_documentation_runs(page: Path) -> None:
    for code in blocks(page, "python"):
        names: dict[str, Any] = {}
        exec(code, names)
        assert names["plan"].dash_indices == (0, 1, 2, 4)


def test_the_comments_beside_the_plans_hold() -> None:
    (code,) = blocks(PACKAGE / "docs/settings.md", "python")
    names: dict[str, Any] = {}
    first, _, rest = code.partition("print(")
    exec(first, names)
    assert (names["plan"].dash_steps, names["plan"].dot_steps) == (7, 18)
    exec("print(" + rest.splitlines()[0] + "\n" + rest.splitlines()[1], names)
    assert names["plan"].pattern == "DDDdDdd"


def test_the_files_that_the_documentation_shows_can_be_read(tmp_path) -> None:
    caption, plan, profile = blocks(PACKAGE / "docs/formats.md", "json")
    assert set(json.loads(caption)) == {"file_name", "text"}
    read = MorsePlan.from_json(json.loads(plan))
    assert read.to_json() == json.loads(plan)
    (tmp_path / "profile.json").write_text(profile)
    times = read_profile(tmp_path / "profile.json")
    assert MorsePlan.from_latency(400, times).lsd <= 400 / 35.5


def test_every_setting_is_explained() -> None:
    first_column = re.findall(r"^\| (.+?) \|", (PACKAGE / "docs/settings.md").read_text(), re.M)
    explained = set(re.findall(r"`(\w+)", " ".join(first_column)))
    options = {
        name
        for name, parameter in inspect.signature(apply_morse).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert {field.name for field in dataclasses.fields(TrainDotConfig)} | options <= explained
