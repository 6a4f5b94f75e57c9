"""Commands, Python, configs and links of the README and of docs/ are what they say."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import torch
from dcd_tiny import fcn, save_weights, write_config, write_images

from af_dcd.cli import COMMANDS
from af_dcd.config import DistillConfig, TrainConfig
from af_dcd.method.presets import PRESETS
from effml_common.cli import main

PACKAGE = Path(__file__).parents[1]
README = PACKAGE / "README.md"
SETTINGS = PACKAGE / "docs" / "settings.md"

pytestmark = pytest.mark.skipif(not README.exists(), reason="the README is not beside these tests")


def blocks(page: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def test_the_commands_of_the_readme_run_one_after_the_other(tmp_path, monkeypatch, capsys) -> None:
    """On a tiny pair, at a crop that fits the method's own settings."""
    pytest.importorskip("mmseg")
    monkeypatch.chdir(tmp_path)
    data = write_images(tmp_path / "data", count=2, side=136)
    for name, width in (("my_student", 2), ("my_teacher", 4)):
        path = write_config(tmp_path / f"{name}.py", data, fcn(width), side=128)
        path.write_text(path.read_text().replace("max_iters=6, val_interval=6", "max_iters=2"))
    save_weights(tmp_path / "my_teacher.py", tmp_path / "teacher.pth")

    lines = [shlex.split(line) for line in blocks(README, "")[1].splitlines()]
    assert [line[1] for line in lines] == ["inspect", "train", "eval"]
    for _, *words in lines:
        device = ["--device", "cpu"] if words[0] != "inspect" else []
        code = main("af-dcd", "af-dcd", COMMANDS, [*words, *device])
        assert code == 0, capsys.readouterr().err
    assert "mIoU" in capsys.readouterr().out
    weights = torch.load("runs/mine/student.pth", weights_only=True)["state_dict"]
    assert not any(name.startswith(("afdcd", "teacher")) for name in weights)


def test_the_python_of_the_readme_distils(tmp_path, monkeypatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    sizes = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "strides": [4, 2]}
    sizes |= {"patch_sizes": [7, 3], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
    for name, width in (("b0", 8), ("b5", 16)):
        config = transformers.SegformerConfig(
            **sizes, hidden_sizes=[width, 2 * width], decoder_hidden_size=4 * width
        )
        model = transformers.SegformerForSemanticSegmentation(config)
        model.save_pretrained(tmp_path / "models" / name)

    # Only the size of the images is changed.
    (code,) = blocks(README, "python")
    assert len(code.splitlines()) <= 10
    scope: dict = {}
    exec(code.replace("512", "64"), scope)
    assert set(scope["result"].losses) == {"loss_kd", "loss_fd", "loss_ctr"}
    trained = [p for group in scope["optimizer"].param_groups for p in group["params"]]
    assert len(trained) == len(list(scope["student"].parameters())) + 6  # alignment and generator
    assert all(p.grad is not None for p in trained)


def test_the_hand_written_config_of_the_settings_trains(tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("mmseg")
    monkeypatch.chdir(tmp_path)
    data = write_images(tmp_path / "data", count=2, side=136)
    for name, width in (("my_student", 2), ("my_teacher", 4)):
        write_config(tmp_path / f"{name}.py", data, fcn(width), side=128)
    save_weights(tmp_path / "my_teacher.py", tmp_path / "teacher.pth")
    (config,) = (code for code in blocks(SETTINGS, "python") if "_base_" in code)
    (tmp_path / "distil.py").write_text(config)

    words = ["train", "--student", "distil.py", "--iters", "1", "--device", "cpu", "--out", "out"]
    assert main("af-dcd", "af-dcd", COMMANDS, words) == 0, capsys.readouterr().err
    assert "AfDCD" not in (tmp_path / "out/student.py").read_text()


def test_every_setting_and_preset_is_explained() -> None:
    first_column = re.findall(r"^\| (.+?) \|", SETTINGS.read_text(), re.MULTILINE)
    explained = set(re.findall(r"`(?:--)?([\w-]+)`", " ".join(first_column)))
    assert {field.name for field in dataclasses.fields(DistillConfig)} <= explained
    flags = {field.name.replace("_", "-") for field in dataclasses.fields(TrainConfig)}
    assert flags <= explained | {"lambda-kd", "lambda-fd", "lambda-ctr", "device"}
    assert set(PRESETS) <= explained


def test_the_table_of_presets_says_what_they_are() -> None:
    names = ("lambda_kd", "lambda_fd", "lambda_ctr")
    cells = [line.split(" | ") for line in SETTINGS.read_text().splitlines()]
    rows = {row[0].strip("| `"): row[1:4] for row in cells if row[0].strip("| `") in PRESETS}
    shown = {name: tuple(map(float, row)) for name, row in rows.items()}
    assert shown == {k: tuple(getattr(v, name) for name in names) for k, v in PRESETS.items()}
