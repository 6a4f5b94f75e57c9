"""The examples run as they are written, on tiny models, and come out as they say."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from com_pt_tiny import WORDS, clip, features, llama, spec

from com_pt.adapters.open_clip_models import save_clip

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = {
    "grow_clip_vit_b_from_vit_s",
    "train_clip_family_from_captions",
    "train_llama_from_a_smaller_llama",
    "train_timm_vits_as_a_chain",
}
Run = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.skipif(
    not EXAMPLES.exists(), reason="the examples are not beside these tests"
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run an example in the folder of the test, on the CPU; its global names come back."""

    def run(name: str, *words: Any) -> dict[str, Any]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        return runpy.run_path(str(EXAMPLES / f"{name}.py"))

    return run


def test_every_example_is_short_and_tested_here() -> None:
    lines = {path.stem: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert set(lines) == SCRIPTS
    assert max(lines.values()) <= 60


@pytest.mark.parametrize("text", [32, 48])
def test_the_grown_clip_has_the_embeddings_of_the_small_one(run, tmp_path, text) -> None:
    small = clip(32)
    save_clip(small, spec(32), tmp_path / "small")
    # A text tower at a ratio that is not whole needs another eps, which the folder must keep.
    settings = spec(64, 4, text=text, text_layers=4)
    (tmp_path / f"grown-text-{text}.json").write_text(json.dumps(settings))

    names = run("grow_clip_vit_b_from_vit_s", "small", f"grown-text-{text}.json")
    assert max(names["moved"].values()) < 1e-5
    assert names["report"].layers["visual.transformer.resblocks"] == [0, 0, 1, 1]

    import open_clip

    large = open_clip.create_model(f"local-dir:{tmp_path / 'grown'}").eval()
    expected, loaded = features(small), features(large)
    assert all(torch.allclose(expected[name], loaded[name], atol=1e-5) for name in expected)


def test_the_clip_family_learns_its_captions(run, pictures, capsys) -> None:
    data = {"tokenizer": WORDS, "captions": 2}
    stages = [{"name": "S", "model": spec(32)}, {"name": "B", "model": spec(64)}]
    document = {"task": "clip", "data": data, "stages": stages, "batch_size": 8, "lr": 3e-3}
    document |= {"individual_epochs": 10}
    (pictures / "chain.yaml").write_text(yaml.safe_dump(document))

    names = run("train_clip_family_from_captions", "captions.tsv", "chain.yaml", "runs/clip")
    assert [member.steps for member in names["members"]] == [60, 12]
    assert names["embedding"].shape == (1, 32)
    assert f"{names['plan'].ratio:.2f} times as much" in capsys.readouterr().out

    # The larger member tells the colours apart: each picture is nearest to its own caption.
    task_data = {**names["chain"].data, "image_size": [8, 16], "context_length": 8}
    from com_pt.training.data.captions import CaptionData

    held_out = CaptionData.open(task_data, "train", captions=None)
    images = torch.stack([held_out.image(i) for i in range(3)])
    texts = held_out.tokenize([held_out.texts[i][0] for i in range(3)])
    with torch.no_grad():
        similar = names["model"].encode_image(images) @ names["model"].encode_text(texts).T
    assert similar.argmax(1).tolist() == [0, 1, 2]

    # A second call has nothing left to train.
    again = run("train_clip_family_from_captions", "captions.tsv", "chain.yaml", "runs/clip")
    assert again["members"] == names["members"]


@pytest.mark.slow
def test_the_timm_chain_classifies_and_its_later_member_starts_ahead(run, pictures) -> None:
    rows = "\n".join(f"{i}.png,{i % 3}" for i in range(48))
    (pictures / "labels.csv").write_text(f"path,label\n{rows}\n")
    sizes = (10, 8, 16, 8, 16, 32)
    names = run("train_timm_vits_as_a_chain", "labels.csv", "labels.csv", 3, *sizes)

    first, second = names["members"]
    assert (first.steps, second.steps) == (60, 12)
    assert first.metrics["top-1"] > 0.9
    assert second.metrics["top-1"] > 0.9
    assert second.start["top-1"] == pytest.approx(first.metrics["top-1"])  # lossless
    assert names["largest"].embed_dim == 32
    assert names["largest"].num_classes == 3


def test_the_larger_llama_goes_on_from_the_loss_of_the_small_one(run, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["[end]", "a", "b", "c", "d"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[end]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[end]")
    fast.save_pretrained(tmp_path / "small")
    small = llama(16)
    small.save_pretrained(tmp_path / "small")
    (tmp_path / "text.txt").write_text("a b c d " * 64)

    names = run("train_llama_from_a_smaller_llama", "small", "text.txt", 100, 8, 16)
    with torch.no_grad():
        before = small(input_ids=names["blocks"][:8], labels=names["blocks"][:8]).loss
    assert names["losses"][0] == pytest.approx(float(before), abs=1e-4)
    assert names["losses"][-1] < 0.5 * names["losses"][0]
    assert names["report"].layers["model.layers"] == [0, 0, 1, 1]

    large = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "large-llama")
    assert large.config.hidden_size == 32
    assert large.config.rms_norm_eps == pytest.approx(small.config.rms_norm_eps / 2)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "large-llama")("a c")
