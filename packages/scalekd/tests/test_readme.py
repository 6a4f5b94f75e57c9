"""Commands, Python and links of the README and of docs/ are what they say."""

import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from scalekd_runs import make_photos, scalekd

from scalekd.cli import COMMANDS
from scalekd.config import ScaleKDConfig, TrainConfig
from scalekd.training.recipe import load_recipe

PACKAGE = Path(__file__).parents[1]
README = PACKAGE / "README.md"
PAGES = [README, *sorted((PACKAGE / "docs").glob("*.md"))]
SETTINGS = PACKAGE / "docs" / "settings.md"
RECIPES = ("traditional", "adv-r50", "adv-vit", "adv-mixer", "mbv1")

pytestmark = pytest.mark.skipif(not README.exists(), reason="the README is not beside these tests")


def blocks(page: Path, kind: str) -> list[str]:
    found = re.findall(rf"^( *)```{kind}\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [re.sub(f"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


def command_lines(page: Path) -> list[str]:
    """Every command in a block, launched or not, and every one in backticks that has a setting."""
    text = "\n".join(blocks(page, "")).replace("\\\n", " ")
    lines = [re.sub(r"^torchrun .*? -m scalekd ", "scalekd ", line) for line in text.splitlines()]
    lines += re.findall(r"`(scalekd \w+ [^`]+)`", page.read_text())
    return [line for line in lines if line.startswith("scalekd ")]


def test_the_flags_that_the_documentation_names_exist() -> None:
    fields = {
        field.name for command in COMMANDS for field in dataclasses.fields(_settings(command))
    }
    fields |= {"json", "quiet", "debug", "help"}
    for page in PAGES:
        for flag in re.findall(r"`--([\w-]+)", page.read_text()):
            if page.name == "results.md" and flag in ("report", "phases"):
                continue  # of the study
            assert flag.removeprefix("no-").replace("-", "_") in fields, flag


def _settings(command):
    module, _, name = command.config.partition(":")
    return getattr(importlib.import_module(module), name)


def test_the_commands_of_the_readme_run_one_after_the_other(tmp_path, monkeypatch, capsys) -> None:
    """With tiny models in place of the large ones, and fewer updates."""
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "photos")
    teacher = timm.create_model("test_vit", num_classes=12)
    save_file(teacher.state_dict(), tmp_path / "swin.safetensors")
    names = {"resnet18": "test_resnet", "swin_base_patch4_window7_224": "test_vit"}
    quick = {
        "inspect": ["--img-size", "160"],
        "train": ["--img-size", "64", "--epochs", "1", "--batch-size", "12", "--workers", "0",
                  "--device", "cpu"],
    }  # fmt: skip

    lines = [shlex.split(line) for line in command_lines(README) if "published" not in line]
    verbs = [line[1] for line in lines]
    assert verbs[:3] == ["inspect", "train", "export"]
    for _, verb, *words in lines[:3]:
        words = [names.get(word, word) for word in words]
        code = scalekd(verb, *words, *quick.get(verb, []))
        assert code == 0, capsys.readouterr().err

    # The student is there twice, and nothing else is in its file.
    exported, trained = load_file("student.safetensors"), load_file("run/student.safetensors")
    assert all(torch.equal(value, exported[name]) for name, value in trained.items())
    fresh = timm.create_model("test_resnet", num_classes=12)
    assert set(exported) == set(fresh.state_dict())


def test_the_python_of_the_readme_trains_and_saves_the_student_alone(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(README, "python")
    assert len(code.splitlines()) <= 10
    scope: dict = {}
    exec(code, scope)
    assert all(p.grad is not None for p in scope["student"].parameters())
    loaded = timm.create_model("resnet18", num_classes=12, checkpoint_path="student.pth")
    assert set(loaded.state_dict()) == set(scope["student"].state_dict())


def test_the_python_of_formats_loads_a_student(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    student = timm.create_model("resnet18", num_classes=12)
    save_file(student.state_dict(), tmp_path / "run/student.safetensors")
    (code,) = blocks(PACKAGE / "docs/formats.md", "python")
    scope: dict = {}
    exec(code, scope)
    assert torch.equal(scope["model"].fc.weight, student.fc.weight)


def test_every_setting_is_explained_with_its_default() -> None:
    rows = [line.split(" | ") for line in SETTINGS.read_text().splitlines() if line[:1] == "|"]
    explained = set(re.findall(r"`(\w+)`", " ".join(row[0] for row in rows)))
    fields = {*dataclasses.fields(ScaleKDConfig), *dataclasses.fields(TrainConfig)}
    assert {field.name for field in fields} <= explained

    # Defaults that are a plain number.
    defaults = {field.name: field.default for field in fields}
    for name, value, *_ in (row for row in rows if len(row) == 3):
        if re.fullmatch(r"\| `\w+`", name) and re.fullmatch(r"[\d.]+", value):
            assert float(value) == defaults[name.strip("| `")], name


def test_the_table_of_recipes_holds_their_numbers() -> None:
    for name in RECIPES:
        recipe = load_recipe(name)
        pattern = rf"^\| `{name}` \| .*? \| (\d+), (\d+) \| \w+, (\S+), (\S+) \|"
        match = re.search(pattern, SETTINGS.read_text(), re.MULTILINE)
        assert match
        assert (recipe.epochs, recipe.batch_size) == tuple(map(int, match.groups()[:2]))
        assert (recipe.lr, recipe.weight_decay) == tuple(map(float, match.groups()[2:]))
