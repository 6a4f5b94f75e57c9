"""``com-pt finetune``: from digits 0 to 4 to digits 5 to 9, and what the result loads as."""

import json
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from com_pt_tiny import clip, spec, vit
from PIL import Image

from com_pt.adapters.files import load_any
from com_pt.adapters.open_clip_models import build_clip, save_clip
from com_pt.adapters.timm_models import save_timm
from com_pt.cli import COMMANDS
from com_pt.training.data.transforms import image_transform
from effml_common.cli import main

VIT = {"name": "vit_tiny_patch16_224", "img_size": 16, "patch_size": 4, "embed_dim": 32,
       "depth": 2, "num_heads": 2}  # fmt: skip
QUICK = ["--batch-size", "16", "--device", "cpu", "--json"]


def call(*words: object) -> int:
    return main("com-pt", "com-pt", COMMANDS, [str(word) for word in words])


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Digits 0 to 4 as tensors, and digits 5 to 9 as class folders: 200 to train on, 400 held out."""
    datasets = pytest.importorskip("sklearn.datasets")
    loaded = datasets.load_digits()
    folder, transform = tmp_path_factory.mktemp("digits"), image_transform(16, None)
    known, labels, counts = [], [], dict.fromkeys(range(5, 10), 0)
    for pixels, label in zip(loaded.images, loaded.target, strict=True):
        picture = Image.fromarray((pixels * 15.9).astype("uint8")).convert("RGB")
        if label < 5:
            known.append(transform(picture))
            labels.append(int(label))
        elif counts[label] < 120:
            part = "train" if counts[label] < 40 else "val"
            path = folder / part / f"digit {label}" / f"{counts[label]}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
            counts[label] += 1
    return folder, torch.stack(known), torch.tensor(labels)


@pytest.fixture(scope="module")
def pretrained(digits):
    """A tiny ViT that tells digits 0 to 4 from one another."""
    folder, images, labels = digits
    torch.manual_seed(0)
    model = vit(32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for epoch in range(20):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    save_timm(model.eval(), VIT, 5, folder / "pretrained")
    return folder / "pretrained"


def tuned(capsys, source, digits, out, *flags: object) -> float:
    """Held-out accuracy after fine-tuning."""
    folder = digits[0]
    words = ["finetune", source, "--train", folder / "train", "--data", folder / "val"]
    assert call(*words, "--out", out, "--no-flip", "--crop", 1, "--lr", "2e-3", *flags, *QUICK) == 0
    [row] = json.loads(capsys.readouterr().out)["rows"]
    return row["metrics"]["top-1"]["mean"]


def test_fine_tuning_beats_a_new_head_on_frozen_features(
    pretrained, digits, tmp_path, capsys
) -> None:
    # Seeds 0 to 2 gave 0.56, 0.60 and 0.66, frozen 0.41 to 0.42, and from fresh weights 0.31 to 0.33.
    whole = tuned(capsys, pretrained, digits, tmp_path / "whole", "--epochs", 8, "--seed", 1)
    head = tuned(
        capsys, pretrained, digits, tmp_path / "head", "--epochs", 8, "--seed", 1, "--freeze"
    )
    assert whole > 0.45
    assert whole > head + 0.05
    assert head > 0.25

    # The frozen model has kept its weights, but for the head.
    before = load_any(str(pretrained)).model.state_dict()
    after = load_any(str(tmp_path / "head" / "model")).model.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["head.weight", "head.bias"]

    # eval finds what the report says, and timm loads the folder.
    words = ["eval", tmp_path / "whole" / "model", "--suite", "top1", "--data", digits[0] / "val"]
    assert call(*words, "--json", "--device", "cpu") == 0
    assert json.loads(capsys.readouterr().out)["top-1"] == whole
    import timm

    loaded = timm.create_model(f"local-dir:{tmp_path / 'whole' / 'model'}", pretrained=True)
    assert loaded.num_classes == 5
    names = (tmp_path / "whole" / "model" / "classes.txt").read_text().splitlines()
    assert names == [f"digit {number}" for number in range(5, 10)]


def test_the_image_tower_of_a_clip_is_fine_tuned_and_read_back(digits, tmp_path, capsys) -> None:
    save_clip(clip(32, size=16), spec(32, size=16), tmp_path / "clip")
    accuracy = tuned(capsys, tmp_path / "clip", digits, tmp_path / "out", "--epochs", 3)
    folder = tmp_path / "out" / "model"
    words = ["eval", folder, "--suite", "top1", "--data", digits[0] / "val", "--device", "cpu"]
    assert call(*words, "--json") == 0
    assert json.loads(capsys.readouterr().out)["top-1"] == accuracy

    # Tower and head moved; the report names no absolute path.
    before = load_any(str(tmp_path / "clip")).model.visual
    after = load_any(str(folder)).model
    assert after.head.weight.abs().max() > 0
    assert not torch.equal(before.conv1.weight, after.tower.conv1.weight)
    assert str(tmp_path) not in (tmp_path / "out" / "run" / "report.json").read_text()
    assert call("eval", folder, "--data", digits[0] / "val") == 2
    assert "is classifier; choose another --suite" in capsys.readouterr().err


def test_a_run_that_is_stopped_goes_on_to_the_same_weights(
    digits, pretrained, tmp_path, capsys, monkeypatch
) -> None:
    flags = ["--epochs", "1", "--seed", "3"]
    expected = tuned(capsys, pretrained, digits, tmp_path / "whole", *flags)
    folder = digits[0]
    words = ["finetune", pretrained, "--train", folder / "train", "--data", folder / "val",
             "--no-flip", "--crop", 1, "--lr", "2e-3", *flags, *QUICK,
             "--out", tmp_path / "broken"]  # fmt: skip

    # A signal after the fifth update.
    from com_pt.training import trainer

    step = trainer.train_step

    def stop_after_five(*arguments, **settings):
        if settings["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", stop_after_five)
        assert call(*words) == 143
    assert "run again with --resume auto" in capsys.readouterr().err
    assert not (tmp_path / "broken" / "model").exists()

    # Not without being asked, and then to the same bits.
    assert call(*words) == 2
    assert "add --resume auto" in capsys.readouterr().err
    assert call(*words, "--resume", "auto") == 0
    [row] = json.loads(capsys.readouterr().out)["rows"]
    assert row["metrics"]["top-1"]["mean"] == expected
    whole, broken = (load_any(str(tmp_path / n / "model")).model for n in ("whole", "broken"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, broken.state_dict()[name]), name


def test_the_head_begins_at_zero_and_the_tower_as_it_was(pretrained, digits) -> None:
    from com_pt.training.tasks.finetune import FinetuneTask

    task = FinetuneTask({"train": str(digits[0] / "train"), "image_size": 16})
    model = task.build({"path": str(pretrained)})
    images = torch.randn(3, 3, 16, 16)
    assert torch.equal(model(images), torch.zeros(3, 5))
    original = load_any(str(pretrained)).model
    assert torch.equal(model.forward_features(images), original.forward_features(images))  # pyright: ignore
    assert task.chance() is None
    assert FinetuneTask({**task.data, "val": str(digits[0] / "val")}).chance() == 1 / 5


def test_smoothing_and_mirroring_are_what_their_flags_say(pretrained, digits) -> None:
    from com_pt.training.tasks.finetune import FinetuneTask

    data = {"train": str(digits[0] / "train"), "image_size": 16, "crop_scale": [1.0, 1.0]}
    logits, labels = torch.randn(4, 5), torch.tensor([0, 3, 1, 4])
    loss = FinetuneTask({**data, "smoothing": 0.2}).loss({"logits": logits, "labels": labels})
    target = 0.8 * F.one_hot(labels, 5) + 0.2 / 5
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss["cross entropy"], expected)

    # In 40 draws a picture and its mirror image appear; without --flip the picture alone.
    mirrored = FinetuneTask(data)
    plain = FinetuneTask({**data, "flip": False})
    picture = plain[0][0]
    draws = [mirrored[0][0] for _ in range(40)]
    for expected in (picture, picture.flip(2)):
        assert any(torch.allclose(draw, expected, atol=1e-5) for draw in draws)
    assert all(torch.equal(plain[0][0], picture) for _ in range(40))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "there are no data to train on; give --train"),
        (["--train", "x"], "there are no data to judge on; give --data"),
        (["--train", "x", "--data", "x", "--crop", "0"], "crop is 0.0; give more than 0"),
        (["--train", "x", "--data", "x", "--smoothing", "1"], "smoothing is 1.0; give"),
        (["--train", "x", "--data", "x", "--device", "cpu"], "nothing is no model"),
    ],
)
def test_what_cannot_be_fine_tuned_is_one_line(
    flags, message, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("finetune", "nothing", *flags) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_frozen_batch_norms_keep_their_statistics(digits, tmp_path, capsys) -> None:
    """A CLIP whose image tower is a ResNet, trained and judged in between."""
    settings = spec(32, [1, 1, 1, 1], size=32, embed=32)
    settings["vision_cfg"] |= {"width": 8, "patch_size": None}
    model = build_clip(settings)
    save_clip(model, settings, tmp_path / "clip")
    tuned(capsys, tmp_path / "clip", digits, tmp_path / "out", "--epochs", 1, "--freeze")
    before = load_any(str(tmp_path / "clip")).model.visual.state_dict()  # pyright: ignore
    after = load_any(str(tmp_path / "out" / "model")).model.tower.state_dict()  # pyright: ignore
    assert "bn1.running_mean" in before
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_models_without_patches_or_with_two_heads_are_refused_in_one_line(
    digits, tmp_path, capsys
) -> None:
    import timm

    for name, message in (
        ("test_resnet", "test_resnet has no patches; use a vision transformer, such as a ViT"),
        ("deit_tiny_distilled_patch16_224", "VisionTransformerDistilled, is not one linear layer"),
    ):
        model = timm.create_model(name, num_classes=5)
        timm.models.save_for_hf(model, tmp_path / name, safe_serialization=True)
        parts = ["--train", digits[0] / "train", "--data", digits[0] / "val", "--device", "cpu"]
        assert call("finetune", tmp_path / name, *parts, "--out", tmp_path / "out") == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert call("inspect", "test_resnet", "--family", "timm") == 2
    assert "test_resnet has no patches" in capsys.readouterr().err.splitlines()[-1]
    for suite in ("probe", "top1"):
        words = ["eval", tmp_path / "test_resnet", "--suite", suite, "--data", digits[0] / "val"]
        assert call(*words, "--train", digits[0] / "train", "--device", "cpu") == 2
        assert "test_resnet has no patches" in capsys.readouterr().err.splitlines()[-1]
