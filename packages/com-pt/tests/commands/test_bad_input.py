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
        (
            ["eval", "x", "--data", "a.tar", "--images", "y"],
            "images is y, but none of the data are",
        ),
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data: captions.csv", "data is 'captions.csv'; give settings such as"),
        ("data:", "data is None; give settings such as"),
        ("workers: -1", "workers is -1; give 0 or more"),
        ("stages: [S]", "a stage is 'S'; give settings such as"),
    ],
)
def test_a_wrong_chain_file_is_one_line(change, message, tmp_path, capsys) -> None:
    stages = "" if change.startswith("stages") else "stages: [{name: S, model: ViT-B-16}]\n"
    (tmp_path / "chain.yaml").write_text(f"task: clip\n{stages}{change}\n")
    assert call("plan", str(tmp_path / "chain.yaml")) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_judged_is_told_to_be_a_folder(tmp_path, capsys) -> None:
    """``eval`` has no flag that names the model of a checkpoint file; only ``grow`` has."""
    file = tmp_path / "model.pt"
    file.write_bytes(b"")
    assert main("com-pt", "com-pt", COMMANDS, ["eval", str(file), "--data", str(file)]) == 2
    assert "does not tell its model; give the folder of a model" in capsys.readouterr().err
