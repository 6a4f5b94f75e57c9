"""``com-pt grow``: checkpoints and folders."""

import json
import os

import torch
from com_pt_tiny import clip, features, spec, vit

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
    assert "is refused: it holds posix.mkdir, which is no plain data" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["32.json", "evil.pt"]
