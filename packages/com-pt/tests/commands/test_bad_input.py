"""What cannot be used is refused in one line that says what is wrong and what to do."""

import pytest

from com_pt.cli import COMMANDS
from effml_common.cli import main


def call(*words: str) -> int:
    return main("com-pt", "com-pt", COMMANDS, list(words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "no-such-chain"], "cannot be read as YAML"),
        (["grow", "nothing", "ViT-B-16"], "is no model"),
        (["grow", "nothing", "ViT-B-16", "--mode", "bigger"], 'Parser key "mode"'),
        (["cost", "nothing"], "holds no finished stage"),
        (["eval", "nothing"], "no data to judge on; give --data"),
        (["eval", "x", "--suite", "zero-shot", "--data", "a"], "give --classes and --templates"),
        (["inspect", "compt-ViT-Z-16"], "no CLIP model compt-ViT-Z-16; did you mean compt-ViT-"),
        (["individual", "cc3m-vit-tsbl"], "give --member"),
        (["train", "cc3m-vit-tsbl", "--out", "x"], "no train data are given"),
        (["demo", "--steps", "1"], "steps is 1; give 20 or more"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    words, message, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert list(tmp_path.iterdir()) == []
