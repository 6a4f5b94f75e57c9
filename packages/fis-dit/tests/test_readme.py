"""Commands, Python and links of the README and of docs/ are what they say."""

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from diffusers import WanPipeline
from fis_dit_pipelines import SIZE, call
from PIL import Image

from fis_dit.config import FISConfig

PACKAGE = Path(__file__).parents[1]
README = PACKAGE / "README.md"

pytestmark = pytest.mark.skipif(not README.exists(), reason="the README is not beside these tests")


def blocks(page: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


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


def test_the_python_of_the_settings_page_makes_the_setting_that_it_describes() -> None:
    names: dict[str, Any] = {}
    (code,) = blocks(PACKAGE / "docs/settings.md", "python")
    exec(code, names)
    assert names["setting"] == FISConfig.from_preset("quality", dense_tail=4)
    assert names["setting"].dense_tail == 4
    assert names["setting"] != FISConfig.from_preset("quality")


def test_every_setting_is_explained() -> None:
    first_column = re.findall(r"^\| (.+?) \|", (PACKAGE / "docs/settings.md").read_text(), re.M)
    explained = set(re.findall(r"`(\w+)`", " ".join(first_column)))
    assert {field.name for field in dataclasses.fields(FISConfig)} <= explained
