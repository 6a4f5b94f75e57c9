"""The examples of the README run as they are written."""

import json
import re
from pathlib import Path

import pytest
import torch

from effml_common.parsing import parse

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def blocks() -> list[str]:
    if not README.exists():
        pytest.skip("the README is not beside these tests")
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_settings_class_parses(blocks) -> None:
    made = {"__name__": __name__}
    exec(blocks[0], made)
    config = parse(
        made["ShrinkConfig"], ["m", "--texts", "a", "b", "--group-size", "none"], prog="my-tool"
    )
    assert (config.model, config.texts, config.group_size) == ("m", ("a", "b"), None)


def test_the_training_loop_saves_and_resumes(blocks, tmp_path) -> None:
    def run(steps: int) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.AdamW(model.parameters())
        update = (
            "loss = model(torch.randn(4, 2)).square().mean(); optimizer.zero_grad(); "
            "loss.backward(); optimizer.step(); grad_norm = None; position = step"
        )
        names = {"root": tmp_path / "ck", "run_dir": tmp_path, "steps": steps, "torch": torch}
        names |= {"model": model, "optimizer": optimizer, "scheduler": None}
        exec(blocks[1].replace("        ...\n", f"        {update}\n"), names)
        return model.weight.detach()

    run(100)
    resumed, lines = run(150), (tmp_path / "metrics.jsonl").read_text()
    for folder in (tmp_path / "ck").iterdir():
        folder.rename(tmp_path / folder.name)
    assert torch.equal(run(150), resumed)
    assert (tmp_path / "metrics.jsonl").read_text() == lines


def test_the_report_is_written(blocks, tmp_path) -> None:
    exec(blocks[2], {"run_dir": tmp_path})
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["claims"][0]["holds"] == "yes"
    assert (tmp_path / "report.html").exists()
