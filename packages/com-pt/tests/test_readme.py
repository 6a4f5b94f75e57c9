"""Commands, Python, chain files and links of the README and of docs/ are what they say."""

import dataclasses
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from com_pt_tiny import clip, spec
from safetensors.torch import load_file

from com_pt.cli import COMMANDS
from com_pt.method_config import ChainConfig, StageConfig
from com_pt.training.chain import parse_chain
from com_pt.training.plan import plan_chain
from com_pt.training.run import run_chain
from com_pt.training.tasks.causal_lm import CausalLMTask
from com_pt.training.tasks.classify import ClassifyTask
from com_pt.training.tasks.clip import ClipTask
from effml_common.cli import main

PACKAGE = Path(__file__).parents[1]
README = PACKAGE / "README.md"
SETTINGS = PACKAGE / "docs" / "settings.md"

pytestmark = pytest.mark.skipif(not README.exists(), reason="the README is not beside these tests")


def blocks(page: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def test_the_commands_of_the_readme_run_one_after_the_other(pictures, monkeypatch, capsys) -> None:
    """With tiny models below the same names, and fewer updates."""
    monkeypatch.chdir(pictures)
    monkeypatch.setattr("com_pt.adapters.open_clip_models.OWN_CONFIGS", pictures)
    wide = {"vocab": 49408, "length": 77}
    for name, width in (("compt-ViT-S-16", 32), ("compt-ViT-B-16", 64)):
        (pictures / f"{name}.json").write_text(json.dumps(spec(width, **wide)))
    (pictures / "logs").mkdir()
    torch.save({"state_dict": clip(32, **wide).state_dict()}, "logs/epoch_32.pt")
    chain = yaml.safe_load(blocks(README, "yaml")[0])
    chain |= {"individual_epochs": 2, "batch_size": 16}
    (pictures / "chain.yaml").write_text(yaml.safe_dump(chain))

    lines = [shlex.split(line) for line in blocks(README, "")[1].splitlines()]
    assert [line[1] for line in lines] == ["demo", "grow", "plan", "train", "eval"]
    for part in ("train", "val"):
        shutil.copy("captions.tsv", f"{part}.tsv")
    for _, *words in lines[1:]:
        device = ["--device", "cpu"] if words[0] != "plan" else []
        code = main("com-pt", "com-pt", COMMANDS, [*words, *device])
        assert code == 0, capsys.readouterr().err
    assert load_file("grown/open_clip_model.safetensors")["visual.proj"].shape == (64, 32)
    assert "image to text R@1" in capsys.readouterr().out


def test_the_python_of_the_readme_grows_a_model(monkeypatch, capsys) -> None:
    # The same models, without their trained weights from the network.
    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False: make(name))
    (code,) = blocks(README, "python")
    assert len(code.splitlines()) <= 10
    scope: dict = {}
    exec(code, scope)

    x = torch.randn(1, 3, 224, 224)
    small, large = scope["small"].eval(), scope["large"].eval()
    with torch.no_grad():
        assert (small(x) - large(x)).abs().max() < 1e-5
    assert capsys.readouterr().out.startswith("1.0 []")


@pytest.mark.parametrize("page", [README, SETTINGS], ids=lambda page: page.name)
def test_the_chain_file_is_accepted_and_costs_less_than_its_members(page: Path) -> None:
    chain = parse_chain(yaml.safe_load(blocks(page, "yaml")[0]))
    epochs = [chain.epochs_of(i) for i in range(len(chain.stages))]
    assert epochs == ([32, 7] if page == README else [32, 7, 4])
    assert plan_chain(chain).ratio > (2 if page == README else 3)


def test_a_task_of_ones_own_trains_a_chain(tmp_path, monkeypatch) -> None:
    (code,) = blocks(SETTINGS, "python")
    task = code[code.index("class Autoencode") :]
    assert len(task.splitlines()) < 40
    (tmp_path / "mytask.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    stages = [{"name": f"W{n}", "model": n} for n in (4, 6)]
    document = {"task": "mytask:Autoencode", "stages": stages, "epochs": 20, "batch_size": 32,
                "lr": 1e-2, "warmup_steps": 2}  # fmt: skip
    members = run_chain(parse_chain(document), tmp_path / "out")
    assert [m.steps for m in members] == [160, 160]
    lines = (tmp_path / "out/run/stage-2-W6/metrics.jsonl").read_text().splitlines()
    assert '"feature"' in lines[0]
    sys.path.remove(str(tmp_path))
    sys.modules.pop("mytask")


def test_every_setting_is_explained() -> None:
    # Names stand in the first column of a table, or in the second beside a task.
    rows = [line.split(" | ") for line in SETTINGS.read_text().splitlines() if line[:1] == "|"]
    explained = set(re.findall(r"`(\w+)`", " ".join(" ".join(row[:2]) for row in rows)))
    fields = {*dataclasses.fields(StageConfig), *dataclasses.fields(ChainConfig)}
    assert {field.name for field in fields} <= explained
    assert ClipTask.settings | ClassifyTask.settings | CausalLMTask.settings <= explained
