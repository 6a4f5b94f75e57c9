"""On a processor that multiplies bfloat16 faster, both methods find about what they find in float32."""

import pytest
import torch

from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.simulation import fresh_learnables, simulated_logits, simulated_weights
from sliderquant.config import SliderConfig
from sliderquant.method.calibration import calibrate

WINDOWS = [[0, 1], [1, 2]]


def error_of(model, tokens, **settings) -> float:
    """Mean squared error of the logits of the calibrated model."""
    decoder = TransformersDecoder(model)
    config = SliderConfig(group_size=8, nsamples=16, seqlen=12, batch_size=2, **settings)
    learnables = fresh_learnables(decoder, config, torch.float32)
    calibrate(decoder, tokens, WINDOWS, learnables, config)
    wanted = simulated_logits(decoder, None)(tokens)
    found = simulated_logits(decoder, simulated_weights(decoder, learnables))(tokens)
    assert found.dtype == torch.float32
    return (found - wanted).square().mean().item()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("method", ["compensated", "slider"])
def test_the_error_is_that_of_float32(name, method, tiny, monkeypatch) -> None:
    # One rounding that falls to the other side moves a single error by a tenth or two.
    settings = {"wbits": 3, "method": method}
    draws = 6
    if method == "slider":
        settings |= {"epochs": 4, "lr_lora": 1e-3}
        draws = 1
    generator = torch.Generator().manual_seed(2)
    words = tiny(name).get_input_embeddings().num_embeddings
    texts = torch.randint(1, words, (draws, 16, 12), generator=generator)
    in_float32 = sum(error_of(tiny(name), tokens, **settings) for tokens in texts)

    asked = []
    able = {"avx512_bf16": True}
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: asked.append(1) or able, raising=False
    )
    in_bfloat16 = sum(error_of(tiny(name), tokens, **settings) for tokens in texts)
    assert asked
    assert in_bfloat16 != in_float32
    assert in_bfloat16 == pytest.approx(in_float32, rel=0.1)
