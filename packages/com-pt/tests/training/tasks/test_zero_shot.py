"""Classes and templates of zero-shot classification, and ImageNet's own."""

import pytest
import torch
from com_pt_tiny import WORDS, clip
from PIL import Image

from com_pt.method.metrics import class_embeddings
from com_pt.training.data.tokenizers import make_tokenizer
from com_pt.training.embedding import encode_texts
from com_pt.training.streaming import Reading
from com_pt.training.tasks.clip import ClipTask
from com_pt.training.tasks.zero_shot import make_prompts, read_classes, read_labels, read_templates
from effml_common.errors import InputError

CPU = torch.device("cpu")


@pytest.mark.parametrize(("templates", "count"), [("openai", 80), ("simple", 7)])
def test_class_embeddings_are_those_of_open_clip_itself(templates, count) -> None:
    open_clip = pytest.importorskip("open_clip")
    model = clip(32, vocab=49408, length=16)
    names, ours = read_classes("imagenet")[:12], read_templates(templates)
    assert len(ours) == count
    theirs = {
        "openai": open_clip.OPENAI_IMAGENET_TEMPLATES,
        "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES,
    }[templates]
    tokenize = make_tokenizer({"context_length": 16})
    expected = open_clip.build_zero_shot_classifier(model, tokenize, names, theirs)
    prompts = encode_texts(model, make_prompts(names, ours), tokenize, Reading(CPU, batch=50))
    embeddings = class_embeddings(prompts, len(ours))
    torch.testing.assert_close(embeddings.T, expected, atol=1e-5, rtol=0)
    # The classes differ from one another by more than that.
    assert torch.cdist(embeddings, embeddings)[~torch.eye(12).bool()].min() > 1e-3


def test_imagenet_are_the_names_of_open_clip_in_the_order_of_the_wordnet_ids() -> None:
    names, labels = read_classes("imagenet"), read_labels("imagenet")
    assert len(names) == len(labels) == 1000
    assert labels == sorted(labels)
    known = {"n01440764": "tench", "n02123045": "tabby cat", "n07753592": "banana",
             "n02012849": "crane bird", "n03126707": "construction crane"}  # fmt: skip
    assert {label: names[labels.index(label)] for label in known} == known
    assert len(read_templates("imagenet")) == 80


def imagenet_folders(folder, names) -> str:
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (18, 10), (80 * number, 100, 200 - 60 * number)).save(
            folder / name / "0.png"
        )
    return str(folder)


def test_folders_named_for_wordnet_ids_are_classes_of_imagenet(tmp_path, monkeypatch) -> None:
    ids = ["n01440764", "n07753592", "n02123045"]
    images = imagenet_folders(tmp_path / "val", ids)
    zero_shot = {"images": images, "classes": "imagenet", "templates": "simple"}
    data = {"image_size": [8, 16], "context_length": 8, "zero_shot": zero_shot}
    task, model = ClipTask(data), clip(32, vocab=49408)
    held_out = task.open_zero_shot()
    assert held_out.labels.tolist() == [0, 281, 954]
    assert task.chance() == 1 / 1000

    # A text tower that knows nothing but the three ranks them as open_clip's classifier does.
    from open_clip import IMAGENET_CLASSNAMES, SIMPLE_IMAGENET_TEMPLATES, build_zero_shot_classifier

    tokenize = make_tokenizer(data)
    weights = build_zero_shot_classifier(
        model, tokenize, IMAGENET_CLASSNAMES, SIMPLE_IMAGENET_TEMPLATES, num_classes_per_batch=200
    )
    pictures = torch.stack([held_out.image(i) for i in range(3)])
    order = (model.encode_image(pictures, normalize=True) @ weights).argsort(1, descending=True)
    places = (order == held_out.labels[:, None]).int().argmax(1)
    seen = {}
    monkeypatch.setattr(
        "com_pt.training.tasks.clip.name_accuracies",
        lambda ranks, classes, prefix: seen.update(ranks=ranks, classes=classes) or {},
    )
    task.evaluate(model)
    assert seen["classes"] == 1000
    # Names that two classes share are embedded twice, and rounding orders them.
    assert (seen["ranks"] - places).abs().max() <= 2
    assert places.max() > 10


def test_folders_that_are_no_classes_of_imagenet_are_refused(tmp_path) -> None:
    images = imagenet_folders(tmp_path / "val", ["n01440764", "tench"])
    zero_shot = {"images": images, "classes": "imagenet", "templates": "imagenet"}
    task = ClipTask({"image_size": [8, 16], "tokenizer": WORDS, "zero_shot": zero_shot})
    with pytest.raises(InputError, match="tench: the label 'tench' is no class"):
        task.open_zero_shot()


def test_templates_come_from_lists_and_files_and_need_a_place_for_the_name(tmp_path) -> None:
    (tmp_path / "templates.txt").write_text("a {}\n\n{} of {}\n")
    templates = read_templates(str(tmp_path / "templates.txt"))
    assert make_prompts(["x", "y"], templates) == ["a x", "x of x", "a y", "y of y"]
    with pytest.raises(
        InputError, match=r"the template .a thing. has no place for a class; add \{\}"
    ):
        read_templates(["a thing"])
    with pytest.raises(InputError, match="no zero-shot templates; give at least one"):
        read_templates([])
