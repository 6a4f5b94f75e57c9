"""Where the commands compute."""

import pytest
import torch

from com_pt.cli import COMMANDS
from effml_common.cli import main

COMPUTING = {
    "demo": [],
    "grow": ["small", "ViT-B-16"],
    "train": ["cc3m-vit-tsbl"],
    "individual": ["cc3m-vit-tsbl", "--member", "S"],
    "eval": ["model", "--data", "captions.tsv"],
    "finetune": ["model", "--train", "train.csv", "--data", "val.csv"],
}


@pytest.mark.parametrize("command", COMPUTING)
def test_a_device_that_is_not_there_is_one_line(command, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = [command, *COMPUTING[command], "--device", "cuda:7"]
    assert main("com-pt", "com-pt", COMMANDS, words) == 2
    message = "error: device cuda:7 is not there (torch finds no cuda device); use cpu"
    assert capsys.readouterr().err.splitlines() == [message]
    assert list(tmp_path.iterdir()) == []
