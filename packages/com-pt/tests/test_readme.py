"""The examples of the README run as they are written."""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from com_pt.method.cost import transformer_macs
from com_pt.training.chain import parse_chain
from com_pt.training.plan import plan_chain
from com_pt.training.run import run_chain

README = Path(__file__).parents[1] / "README.md"


def blocks(kind: str) -> list[str]:
    if not README.exists():
        pytest.skip("the README is not beside these tests")
    return re.findall(rf"```{kind}\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_python_of_the_first_screen_grows_a_model(capsys) -> None:
    scope: dict = {}
    exec(blocks("python")[0], scope)
    x = torch.randn(1, 3, 32, 32)
    small, large = scope["small"].eval(), scope["large"].eval()
    with torch.no_grad():
        assert (small(x) - large(x)).abs().max() < 1e-5
    assert capsys.readouterr().out.startswith("1.0 []")


def test_the_chain_file_is_accepted_and_costs_what_it_says() -> None:
    chain = parse_chain(yaml.safe_load(blocks("yaml")[0]))
    assert [chain.epochs_of(i) for i in range(3)] == [32, 7, 4]
    assert plan_chain(chain).ratio > 3
    assert transformer_macs(2, 3, 1) == 12 * 4 * 3 + 2 * 9 * 2


def test_a_task_of_ones_own_trains_a_chain(tmp_path, monkeypatch) -> None:
    code = blocks("python")[1]
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
