"""Where the commands compute, and that every metric is float32 wherever that is."""

import pytest
import torch
from com_pt_tiny import clip, features

import com_pt.method.metrics as evaluation
from com_pt.adapters.accelerator import make_accelerator
from com_pt.adapters.grow import grow
from com_pt.cli import COMMANDS
from effml_common.cli import main
from effml_common.errors import ConfigError

COMPUTING = {
    "demo": [],
    "grow": ["small", "ViT-B-16"],
    "train": ["cc3m-vit-tsbl"],
    "individual": ["cc3m-vit-tsbl", "--member", "S"],
    "eval": ["model", "--data", "captions.tsv"],
}


@pytest.mark.parametrize("command", COMPUTING)
def test_a_device_that_is_not_there_is_one_line(command, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = [command, *COMPUTING[command], "--device", "cuda:7"]
    assert main("com-pt", "com-pt", COMMANDS, words) == 2
    message = "error: device cuda:7 is not there (torch finds no cuda device); use cpu"
    assert capsys.readouterr().err.splitlines() == [message]
    assert list(tmp_path.iterdir()) == []


def test_a_run_computes_on_the_device_asked_for_whatever_the_last_one_had() -> None:
    for precision, name in (("fp32", "meta"), ("bf16", "cpu"), ("fp32", "meta"), ("fp32", "cpu")):
        accelerator = make_accelerator(precision, torch.device(name))
        assert accelerator.device == torch.device(name)
        assert accelerator.num_processes == 1


def test_a_launch_for_another_kind_of_device_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    make_accelerator("fp32", torch.device("cpu"))
    # Among several processes accelerate chooses the card, here none.
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="launched for cpu, not xpu:0; add --device cpu"):
        make_accelerator("fp32", torch.device("xpu:0"))


def test_half_precision_with_a_scaler_needs_more_than_a_cpu() -> None:
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        make_accelerator("fp16", torch.device("cpu"))


def test_metrics_are_float32_within_an_autocast() -> None:
    model = clip(32)
    images, tokens = torch.randn(6, 3, 8, 16), torch.randint(1, 9, (6, 8))
    exact = evaluation.encode_images(model, images)
    with torch.autocast("cpu", torch.bfloat16):
        pictures = evaluation.encode_images(model, images)
        words = evaluation.encode_texts(model, tokens)
        products = evaluation.similarities(pictures, words)
    # The forward pass is in bfloat16, what follows is not.
    assert not torch.equal(pictures, exact)
    assert {t.dtype for t in (pictures, words, products)} == {torch.float32}
    torch.testing.assert_close(pictures.norm(dim=1), torch.ones(6), atol=1e-6, rtol=0)
    assert torch.equal(products, pictures @ words.T)


def test_ranking_in_chunks_is_ranking_at_once(monkeypatch) -> None:
    images, texts = torch.randn(7, 4), torch.randn(15, 4)
    owner = torch.arange(15) // 2 % 7
    whole = evaluation.retrieval_metrics(images, texts, owner)
    monkeypatch.setattr(
        evaluation, "SIMILARITIES_AT_ONCE", 32
    )  # two images, or four texts, at once
    assert evaluation.retrieval_metrics(images, texts, owner) == pytest.approx(whole)


@pytest.mark.parametrize("mode", ["embed", "official", "lossless"])
def test_growth_needs_no_device_of_its_own(mode) -> None:
    """A default device must not matter: every helper tensor stands beside the weights."""
    grown = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        small, large = clip(32), clip(64)
        with torch.device(device):
            grow(small, large, mode)
        grown.append(features(large))
    for name, value in grown[0].items():
        torch.testing.assert_close(grown[1][name], value, atol=0, rtol=0)
