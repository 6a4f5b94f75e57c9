"""``com-pt train`` from one file, judged, and stopped by a signal."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from com_pt_tiny import WORDS, clip_chain

from com_pt.cli import COMMANDS
from effml_common.cli import main


def call(*words: str) -> int:
    return main("com-pt", "com-pt", COMMANDS, list(words))


def test_a_chain_trains_from_one_file_and_its_members_are_judged(
    pictures, tmp_path, capsys
) -> None:
    document = clip_chain(pictures, 32, 64, epochs=6, lr=3e-3)
    document["data"]["val"] = str(pictures / "captions.tsv")
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(document))
    out = tmp_path / "out"
    assert call("plan", str(tmp_path / "chain.yaml"), "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert call("train", str(tmp_path / "chain.yaml"), "--out", str(out), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in report["rows"]] == ["W32", "W64"]
    assert call("cost", str(out), "--json") == 0
    spent = json.loads(capsys.readouterr().out)
    assert spent["W64"]["GMAC"] == spent["W64"]["planned GMAC"]
    assert spent["whole run"]["GMAC"] == pytest.approx(48 * plan["chain_macs_per_sample"] / 1e9)
    assert str(tmp_path) not in (out / "run" / "report.json").read_text()
    tokenizer = _hf_tokenizer(tmp_path / "words")
    if tokenizer is not None:
        words = [str(out / "W64"), "--data", str(pictures / "captions.tsv")]
        assert call("eval", *words, "--tokenizer", str(tokenizer), "--json") == 0
        assert json.loads(capsys.readouterr().out)["image to text R@10"] > 0
    assert call("individual", str(tmp_path / "chain.yaml"), "--member", "W65") == 2
    assert "use one of W32, W64" in capsys.readouterr().err


def _hf_tokenizer(folder: Path) -> Path | None:
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {"pad": 0, **{word: i for i, word in enumerate(WORDS, 1)}, "end": 8}
    made = Tokenizer(models.WordLevel(ids, unk_token="end"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="pad", eos_token="end")
    fast.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_signal_stops_after_a_clean_save_and_the_run_goes_on(pictures, tmp_path) -> None:
    document = clip_chain(pictures, 32, epochs=400)
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(document))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "com_pt", "train", str(tmp_path / "chain.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, "--out", str(out)], env=environment,
                          stderr=subprocess.PIPE, text=True) as process:  # fmt: skip
        metrics = out / "run" / "stage-1-W32" / "metrics.jsonl"
        end = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") > 3):
            assert time.monotonic() < end, "it did not start"
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert "run again with --resume auto" in error
    assert len(list((out / "run/stage-1-W32/checkpoints").glob("step-*"))) == 1
