"""The CLIP task."""

import pytest
from com_pt_tiny import clip_chain, clip_data, spec, task_of

from com_pt.training.chain import parse_chain
from com_pt.training.run import run_chain
from com_pt.training.tasks.clip import ClipTask
from effml_common.errors import ConfigError


def test_sizes_of_data_come_from_the_models_and_must_agree_with_them(pictures) -> None:
    data = {k: v for k, v in clip_data(pictures).items() if "size" not in k and "length" not in k}
    task = ClipTask(data)
    task.adopt({"A": spec(32), "B": spec(64)})
    image, tokens = task[0]
    assert image.shape == (3, 8, 16)
    assert tokens.shape == (2, 8)
    with pytest.raises(
        ConfigError, match=r"image_size of A is .8, 16. and the data are made for 224"
    ):
        ClipTask({**data, "image_size": 224}).adopt({"A": spec(32)})
    with pytest.raises(ConfigError, match="context_length of B is 9 and the data are made for 8"):
        ClipTask(data).adopt({"B": spec(64, length=9), "A": spec(32)})
    with pytest.raises(ConfigError, match="vocab_size of A is 8 and the tokenizer has 9 tokens"):
        ClipTask(data).adopt({"A": spec(32, vocab=8)})


def test_the_tokens_of_clip_itself_must_have_embeddings(pictures) -> None:
    from open_clip import SimpleTokenizer

    tokens = SimpleTokenizer().vocab_size
    data = clip_data(pictures, tokenizer="simple")
    ClipTask(data).adopt({"A": spec(32, vocab=tokens)})
    message = f"vocab_size of B is {tokens - 1} and the tokenizer has {tokens} tokens; raise it or"
    with pytest.raises(ConfigError, match=message):
        ClipTask(data).adopt({"A": spec(32, vocab=tokens), "B": spec(32, vocab=tokens - 1)})


def test_zero_shot_classification_uses_all_templates(pictures) -> None:
    from com_pt.training.tasks.clip import ClipTask

    rows = "\n".join(f"{i}.png,{['red', 'green', 'blue'][i % 3]}" for i in range(48))
    (pictures / "val.csv").write_text(f"path,class\n{rows}\n")
    settings = {"images": str(pictures / "val.csv"), "classes": ["red", "green", "blue"],
                "templates": ["a {} square", "a picture of a {} square"]}  # fmt: skip
    document = clip_chain(pictures, 32, epochs=10, lr=3e-3)
    document["data"]["zero_shot"] = settings

    members = run_chain(parse_chain(document), pictures / "out")
    assert members[0].metrics["zero-shot top-1"] > 0.9
    assert ClipTask(document["data"]).chance() == pytest.approx(1 / 3)


def test_the_logit_scale_stays_within_its_bounds(pictures, tmp_path) -> None:
    task = task_of(pictures)
    model = task.build(spec(32))
    for value, kept in ((-3.0, 0.0), (9.0, 4.60517), (2.0, 2.0)):
        model.logit_scale.data.fill_(value)  # pyright: ignore
        task.after_step(model)
        assert float(model.logit_scale.detach()) == pytest.approx(kept)  # pyright: ignore
