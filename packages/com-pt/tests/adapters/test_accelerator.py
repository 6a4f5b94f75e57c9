"""accelerate's engine: where it computes, and what it refuses."""

import pytest
import torch
from com_pt_tiny import clip_chain

from com_pt.adapters.accelerator import make_accelerator, resolve_precision, tf32_products
from com_pt.training.chain import parse_chain
from com_pt.training.run import run_chain
from effml_common.errors import ConfigError


def test_half_precision_training_without_a_gpu_is_refused(pictures, tmp_path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="fp16 needs a GPU; use bf16 or fp32"):
        run_chain(parse_chain(clip_chain(pictures, 32, precision="fp16")), tmp_path / "out")


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


def test_auto_is_bf16_on_a_card_that_has_it_and_fp32_elsewhere(monkeypatch) -> None:
    assert make_accelerator("auto", torch.device("cpu")).mixed_precision == "no"
    for has_it, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has_it=has_it: has_it)
        assert resolve_precision("auto", "cuda") == precision
    assert resolve_precision("fp32", "cuda") == "fp32"
    assert resolve_precision("auto", "mps") == "fp32"


def test_tf32_is_on_for_cards_and_while_they_train_only() -> None:
    before = torch.get_float32_matmul_precision()
    with tf32_products(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == before
    with tf32_products(torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before == "highest"
