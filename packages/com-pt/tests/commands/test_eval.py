"""``com-pt eval``: every suite on a folder of its library."""

import json

import pytest
import torch
from com_pt_tiny import clip, llama, spec, vit
from PIL import Image

from com_pt.adapters.open_clip_models import save_clip
from com_pt.adapters.timm_models import save_timm
from com_pt.cli import COMMANDS
from com_pt.training.data.labelled import open_labelled
from com_pt.training.data.transforms import image_transform
from effml_common.cli import main

VIT = {"name": "vit_tiny_patch16_224", "img_size": 16, "patch_size": 4, "embed_dim": 32,
       "depth": 2, "num_heads": 2}  # fmt: skip


def judge(capsys, *words: object) -> dict[str, float]:
    assert main("com-pt", "com-pt", COMMANDS, ["eval", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def folders(tmp_path):
    """Class folders of red and green pictures: 20 to fit on and 12 to judge."""
    for part, count in (("train", 20), ("val", 12)):
        for i in range(count):
            name, colour = (("red", (200, 5 * i, 30)), ("green", (5 * i, 200, 30)))[i % 2]
            (tmp_path / part / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), colour).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def test_a_probe_is_fitted_on_the_features_of_a_clip_and_of_a_timm_model(
    folders, tmp_path, capsys
) -> None:
    save_clip(clip(32, size=16), spec(32, size=16), tmp_path / "clip")
    model = vit(32)
    save_timm(model, VIT, 5, tmp_path / "vit")
    parts = ["--data", folders / "val", "--train", folders / "train"]
    for name in ("clip", "vit"):
        found = judge(capsys, tmp_path / name, "--suite", "probe", *parts, "--batch-size", 5)
        assert found["linear probe top-1"] == 1
        assert found["linear probe decay"] > 0

    # The features of the timm model, by an independent way, and the regression of scikit-learn.
    linear_model = pytest.importorskip("sklearn.linear_model")
    model.reset_classifier(0)
    features, labels = [], []
    for part in ("train", "val"):
        data = open_labelled({part: str(folders / part)}, part, image_transform(16, None))
        with torch.no_grad():
            features.append(model(torch.stack([data.image(i) for i in range(len(data))])))
        labels.append(data.labels)
    mean, spread = features[0].mean(0), features[0].std(0, correction=0)
    train, test = ((part - mean) / spread for part in features)
    theirs = linear_model.LogisticRegression(C=1 / (2 * 0.3 * 20), tol=1e-9, max_iter=2000)
    theirs.fit(train.numpy(), labels[0].numpy())
    found = judge(capsys, tmp_path / "vit", "--suite", "probe", *parts, "--decay", 0.3)
    assert found["linear probe top-1"] == theirs.score(test.numpy(), labels[1].numpy())
    assert found["linear probe decay"] == 0.3


def test_top1_counts_what_timm_itself_predicts(folders, tmp_path, capsys) -> None:
    model = vit(32)
    save_timm(model, VIT, 5, tmp_path / "vit")
    data = open_labelled({"val": str(folders / "val")}, "val", image_transform(16, None))
    pictures = torch.stack([data.image(i) for i in range(len(data))])
    words = [tmp_path / "vit", "--suite", "top1", "--data", folders / "val"]
    (tmp_path / "classes.txt").write_text("blue\ngrey\nred\nwhite\ngreen\n")
    numbers = torch.tensor([4, 2])[data.labels]  # green and red
    hits = model(pictures).argmax(1) == numbers
    found = judge(capsys, *words, "--classes", tmp_path / "classes.txt")
    assert found == {"top-1": pytest.approx(float(hits.float().mean()))}

    # Without the names, two folders do not tell which of five classes they are.
    assert main("com-pt", "com-pt", COMMANDS, ["eval", *map(str, words)]) == 2
    assert "has 2 classes and the model 5; give --classes FILE" in capsys.readouterr().err


def test_batch_size_and_workers_change_nothing(folders, tmp_path, capsys) -> None:
    save_timm(vit(32, num_classes=2), VIT, 2, tmp_path / "vit")
    words = [tmp_path / "vit", "--suite", "top1", "--data", folders / "val"]
    expected = judge(capsys, *words)
    assert judge(capsys, *words, "--batch-size", 5, "--workers", 2) == expected


def test_a_suite_that_does_not_fit_the_model_is_refused(folders, tmp_path, capsys) -> None:
    save_timm(vit(32), VIT, 5, tmp_path / "vit")
    words = ["eval", str(tmp_path / "vit"), "--data", str(folders / "val")]
    assert main("com-pt", "com-pt", COMMANDS, words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: retrieval is for clip, and ")
    assert error.endswith(" is timm; choose another --suite")


def refusal(capsys, *words: object) -> str:
    assert main("com-pt", "com-pt", COMMANDS, ["eval", *map(str, words), "--device", "cpu"]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_tokens_without_an_embedding_are_refused_in_one_line(folders, tmp_path, capsys) -> None:
    (tmp_path / "text.txt").write_text("a red square, and a green one. " * 20)
    llama(vocab_size=64).save_pretrained(tmp_path / "llama")
    words = [tmp_path / "llama", "--suite", "perplexity", "--data", tmp_path / "text.txt"]
    error = refusal(capsys, *words, "--length", 16)
    assert error.startswith("error: the tokenizer bytes has 257 tokens and ")
    assert error.endswith("of 64; give --tokenizer with the one that it was trained with")

    # A CLIP of ten words.
    save_clip(clip(32, size=16), spec(32, size=16), tmp_path / "clip")
    (tmp_path / "classes.txt").write_text("red\ngreen\n")
    (tmp_path / "templates.txt").write_text("a {} square\n")
    lists = ["--classes", tmp_path / "classes.txt", "--templates", tmp_path / "templates.txt"]
    words = [tmp_path / "clip", "--suite", "zero-shot", "--data", folders / "val", *lists]
    assert "the tokenizer simple has 49408 tokens" in refusal(capsys, *words)


def test_a_language_model_is_judged_with_the_tokenizer_in_its_folder(tmp_path, capsys) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["a", "red", "green", "square", "<eos>", "<unk>"]
    level = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>")
    tokenizer = tokenizers.Tokenizer(level)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    (tmp_path / "text.txt").write_text("a red square a green square " * 20)
    model = tmp_path / "llama"
    llama().save_pretrained(model)
    tokenizer.save_pretrained(model)
    words = [model, "--suite", "perplexity", "--data", tmp_path / "text.txt", "--length", 16]
    found = judge(capsys, *words)
    assert found == judge(capsys, *words, "--tokenizer", model)
    assert found != judge(capsys, *words, "--tokenizer", "bytes")

    # A block of one token has nothing to predict.
    error = refusal(capsys, *words[:-1], 1)
    assert "length is 1, and a block's first token is not predicted; give 2 or more" in error


def test_a_member_that_was_trained_with_another_tokenizer_is_warned_about(tmp_path, capsys) -> None:
    (tmp_path / "text.txt").write_text("a red square, and a green one. " * 20)
    llama(vocab_size=300).save_pretrained(tmp_path / "B")
    (tmp_path / "run").mkdir()
    words = [tmp_path / "B", "--suite", "perplexity", "--data", tmp_path / "text.txt"]
    for trained, warnings in ((None, 0), ("bytes", 0), ("tokenizers/own", 1)):
        document = {"data": {} if trained is None else {"tokenizer": trained}}
        (tmp_path / "run" / "chain.json").write_text(json.dumps(document))
        words_of_run = [*map(str, words), "--length", "16", "--device", "cpu"]
        assert main("com-pt", "com-pt", COMMANDS, ["eval", *words_of_run]) == 0
        expected = "was trained with the tokenizer tokenizers/own and is judged with bytes"
        assert capsys.readouterr().err.count(expected) == warnings


def test_a_model_that_was_trained_on_other_pixels_is_warned_about(
    folders, tmp_path, capsys
) -> None:
    words = ["eval", tmp_path / "vit", "--suite", "top1", "--data", folders / "val"]
    words += ["--device", "cpu"]
    save_timm(vit(32, num_classes=2), VIT, 2, tmp_path / "vit")
    for mean, count in ((None, 0), ([0.5, 0.5, 0.5], 1)):
        file = tmp_path / "vit" / "config.json"
        document = json.loads(file.read_text())
        if mean:
            document["pretrained_cfg"]["mean"] = mean
        file.write_text(json.dumps(document))
        assert main("com-pt", "com-pt", COMMANDS, [*map(str, words)]) == 0
        expected = "was trained on pixels with mean 0.5, 0.5, 0.5, and here they get CLIP's"
        assert capsys.readouterr().err.count(expected) == count
