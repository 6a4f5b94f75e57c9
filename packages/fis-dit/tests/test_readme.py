"""Commands, Python and links of the README and of docs/ are what they say."""

import dataclasses
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from diffusers import WanPipeline
from fis_dit_pipelines import SIZE, call
from PIL import Image

from effml_common.cli import parse
from fis_dit.cli import COMMANDS
from fis_dit.config import FISConfig

PACKAGE = Path(__file__).parents[1]
README = PACKAGE / "README.md"
PAGES = [README, *sorted((PACKAGE / "docs").glob("*.md"))]

pytestmark = pytest.mark.skipif(not README.exists(), reason="the README is not beside these tests")


def blocks(page: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def command_lines(page: Path) -> list[str]:
    """Every command in a block, and every one in backticks that has a setting."""
    lines = [line for block in blocks(page, "") for line in block.splitlines()]
    return [
        line
        for line in [*lines, *re.findall(r"`(fis-dit \w+ [^`]+)`", page.read_text())]
        if line.startswith("fis-dit ")
    ]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_readme_is_short() -> None:
    text = README.read_text()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    assert 500 <= len(prose.split()) <= 700
    assert len(text.split()) <= 800


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_line_is_accepted_by_its_parser(page: Path) -> None:
    lines = command_lines(page)
    assert lines or page.name in ("method.md", "formats.md")
    for line in lines:
        _, verb, *words = shlex.split(line.replace("MODEL", "model"))
        command = next(command for command in COMMANDS if command.name == verb)
        module, _, name = command.config.partition(":")
        settings = getattr(importlib.import_module(module), name)
        words = [word for word in words if word != "--json"]
        assert isinstance(parse(settings, words, prog=f"fis-dit {verb}"), settings), line


def test_the_table_of_commands_is_complete() -> None:
    rows = re.findall(r"^\| `fis-dit (\w+)` \|", README.read_text(), re.MULTILINE)
    assert rows == [command.name for command in COMMANDS]


def test_the_commands_of_the_readme_run_one_after_the_other(
    wan_directory, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    wan_directory.rename(tmp_path / "models/wan")
    (tmp_path / "prompts.txt").write_text("a fox in snow\n")
    small = {"--height": "16", "--width": "16", "--num-frames": "21", "--target-speedup": "1.01"}
    lines = [shlex.split(line) for line in blocks(README, "")[1].splitlines()]
    assert [line[1] for line in lines] == ["inspect", "plan", "generate"]
    for _, verb, *words in lines:
        for flag in set(small) & set(words):
            words[words.index(flag) + 1] = small[flag]
        words += SIZE if "--height" not in words else ()
        words += ("--dtype", "float32", "--out", "clips") if verb == "generate" else ()
        words += ("--device", "cpu") if verb != "inspect" else ()
        assert call(verb, *words) == 0, capsys.readouterr().err
    assert FISConfig.from_json((tmp_path / "plan.json").read_text()).layers == 4
    for name in ("fis.gif", "dense.gif"):
        with Image.open(tmp_path / "clips" / name) as clip:
            assert clip.size == (16, 16)


def test_the_python_of_the_readme_makes_a_sparse_video(
    wan_directory, tmp_path, monkeypatch, capsys
) -> None:
    pytest.importorskip("imageio_ffmpeg")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    wan_directory.rename(tmp_path / "models/wan")

    # Only the device and the size of the clip are changed.
    original: Any = WanPipeline.__call__
    small = {"height": 16, "width": 16, "num_frames": 21}
    monkeypatch.setattr(WanPipeline, "__call__", lambda *a, **k: original(*a, **k, **small))
    (code,) = blocks(README, "python")
    assert len(code.splitlines()) <= 10
    exec(code.replace('"cuda"', '"cpu"'), {})

    assert "'anchors': [[0, 2, 4, 5], [0, 1, 3, 5]]" in capsys.readouterr().out
    assert (tmp_path / "fox.mp4").stat().st_size > 100


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_the_python_of_the_documentation_runs(page: Path) -> None:
    for code in blocks(page, "python"):
        exec(code, {})


def test_every_setting_is_explained() -> None:
    first_column = re.findall(r"^\| (.+?) \|", (PACKAGE / "docs/settings.md").read_text(), re.M)
    explained = set(re.findall(r"`(\w+)`", " ".join(first_column)))
    assert {field.name for field in dataclasses.fields(FISConfig)} <= explained


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_file_names_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text())
    for link in links:
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if (
            not target.resolve().is_relative_to(PACKAGE)
            and not (PACKAGE.parents[1] / ".git").exists()
        ):
            continue  # the package alone, outside of its repository
        assert target.exists(), link
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE))

    # Modules are named relative to src/fis_dit.
    for name in re.findall(
        r"`((?:method|adapters|commands|demo)/[\w/]*(?:\.py)?)`", page.read_text()
    ):
        assert (PACKAGE / "src/fis_dit" / name).exists(), name
