"""What a user does, from the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from com_pt_tiny import WORDS, clip, clip_chain, features, spec, vit

from com_pt.cli import COMMANDS
from effml_common.cli import main


def call(*words: str) -> int:
    return main("com-pt", "com-pt", COMMANDS, list(words))


def test_growing_a_checkpoint_is_one_command(tmp_path, capsys) -> None:
    """A training checkpoint as open_clip writes it: weights below state_dict, with a module prefix."""
    small = clip(32)
    state = {f"module.{name}": value for name, value in small.state_dict().items()}
    checkpoint = {"epoch": 3, "name": "run", "state_dict": state}
    torch.save(checkpoint, tmp_path / "epoch_3.pt")
    for width in (32, 64):
        (tmp_path / f"{width}.json").write_text(json.dumps(spec(width)))
    words = [str(tmp_path / "epoch_3.pt"), str(tmp_path / "64.json")]
    words += ["--small-model", str(tmp_path / "32.json"), "--out", str(tmp_path / "grown")]
    assert call("grow", *words, "--mode", "lossless", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["outputs on random inputs"]["image"]["largest difference"] < 1e-5
    import open_clip

    large = open_clip.create_model(f"local-dir:{tmp_path / 'grown'}").eval()
    ours, theirs = features(small), features(large)
    assert all(torch.allclose(ours[k], theirs[k], atol=1e-5) for k in ours)
    assert call("grow", *words) == 2  # the folder is there
    assert "choose another --out" in capsys.readouterr().err


def test_growing_a_timm_folder_is_one_command(tmp_path, capsys) -> None:
    from com_pt.adapters.timm_models import load_timm, save_timm

    settings = {"name": "vit_tiny_patch16_224", "img_size": 16, "patch_size": 4, "depth": 2}
    save_timm(vit(32), {**settings, "embed_dim": 32, "num_heads": 2}, 5, tmp_path / "small")
    (tmp_path / "large.json").write_text(json.dumps({**settings, "embed_dim": 48, "num_heads": 3}))
    words = [str(tmp_path / "small"), str(tmp_path / "large.json"), "--out", str(tmp_path / "out")]
    assert call("grow", *words, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert 0.4 < told["inherited"] < 0.5
    assert load_timm(tmp_path / "out").num_classes == 5


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("should-not-be-there",))


def test_a_checkpoint_that_holds_code_is_refused_and_not_run(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Payload()}, "evil.pt")
    (tmp_path / "32.json").write_text(json.dumps(spec(32)))
    assert call("grow", "evil.pt", "32.json", "--small-model", "32.json", "--out", "out") == 2
    assert "is refused as 32.json" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["32.json", "evil.pt"]


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


def test_zero_shot_classification_uses_all_templates(pictures) -> None:
    from com_pt.training.tasks.clip import ClipTask

    rows = "\n".join(f"{i}.png,{['red', 'green', 'blue'][i % 3]}" for i in range(48))
    (pictures / "val.csv").write_text(f"path,class\n{rows}\n")
    settings = {"images": str(pictures / "val.csv"), "classes": ["red", "green", "blue"],
                "templates": ["a {} square", "a picture of a {} square"]}  # fmt: skip
    document = clip_chain(pictures, 32, epochs=10, lr=3e-3)
    document["data"]["zero_shot"] = settings
    from com_pt.training.chain import parse_chain
    from com_pt.training.run import run_chain

    members = run_chain(parse_chain(document), pictures / "out")
    assert members[0].metrics["zero-shot top-1"] > 0.9
    assert ClipTask(document["data"]).chance() == pytest.approx(1 / 3)


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


def test_inspect_describes_a_model_without_weights(capsys) -> None:
    assert call("inspect", "compt-ViT-S-16", "--captions", "7", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["forward GMAC"] == pytest.approx(16.43, abs=0.01)
    assert told["parameters"] == pytest.approx((21.86 + 40.49) * 1e6, rel=1e-3)


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


def test_the_demo_compares_arms_and_draws_them(tmp_path, monkeypatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    from com_pt.config import DemoConfig
    from com_pt.demo.data import DigitPairs
    from com_pt.demo.report import demo

    small = DigitPairs({"held_out": 60})
    monkeypatch.setattr("com_pt.demo.report.DigitPairs", lambda data: small)
    report = demo(DemoConfig(steps=20, out=str(tmp_path / "out")))
    names = [row.name for row in report.rows]
    assert {"T alone", "S lossless + feature", "B embed", "chain of T, S, B"} <= set(names)
    chain = next(row for row in report.rows if row.name == "chain of T, S, B")
    assert chain.metrics["family ratio"][0] > 1
    assert (tmp_path / "out" / "run" / "report.html").exists()
    import open_clip

    member = tmp_path / "out/run/cells/B_embed-1/run/B"
    assert type(open_clip.create_model(f"local-dir:{member}")).__name__ == "CLIP"
