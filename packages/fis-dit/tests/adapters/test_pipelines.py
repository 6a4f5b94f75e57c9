"""Whole pipelines of tiny random components, dense and frame-sparse."""

from typing import Any

import numpy as np
import pytest
import torch
from fis_dit_pipelines import CLIP, MAKERS, make_wan_a14b, make_wan_i2v

from effml_common.errors import InputError
from fis_dit.adapters.apply import apply_fis
from fis_dit.adapters.pipelines import ClipRequest, run_pipeline
from fis_dit.config import FISConfig

CONFIG = FISConfig(dense_head=1, dense_tail=1)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("guidance", [1.0, pytest.param(3.0, marks=pytest.mark.slow)])
def test_a_pipeline_runs_end_to_end_and_is_itself_again(
    name: str, guidance: float, image, ftfy
) -> None:
    pipe = MAKERS[name]()
    pipe.set_progress_bar_config(disable=True)
    request = ClipRequest(
        prompt="a cat",
        clip=CLIP,
        steps=4,
        guidance=guidance,
        image=image if name == "wan-i2v" else None,
    )

    def run() -> np.ndarray:
        return np.asarray(run_pipeline(pipe, request))

    dense = run()
    config = FISConfig(dense_head=1, dense_tail=1, dense_steps=(-1,), num_inference_steps=4)
    with apply_fis(pipe, config) as handle:
        sparse = run()
        told = handle.summary()
        assert np.array_equal(run(), sparse)  # the steps are counted from 0 again
    assert np.array_equal(run(), dense)
    assert sparse.shape == dense.shape == (21, 16, 16, 3)
    assert not np.array_equal(sparse, dense)
    assert set(told) == (
        {"transformer", "transformer_2"} if name == "wan-a14b" else {"transformer"}
    )
    for transformer in told.values():
        assert transformer["frames"] == 6
        assert transformer["anchors"][0] == [0, 2, 4, 5]


def test_a_missing_ftfy_is_named(image, monkeypatch) -> None:
    from diffusers.pipelines.wan import pipeline_wan_i2v

    monkeypatch.delattr(pipeline_wan_i2v, "ftfy", raising=False)
    pipe = make_wan_i2v()
    with pytest.raises(InputError, match="pip install ftfy"):
        run_pipeline(pipe, ClipRequest(prompt="a cat", clip=CLIP, steps=1, image=image))


def test_both_wan_transformers_know_the_global_step() -> None:
    pipe = make_wan_a14b()
    pipe.set_progress_bar_config(disable=True)
    with apply_fis(pipe, CONFIG) as handle:
        run_pipeline(pipe, ClipRequest(prompt="a cat", clip=CLIP, steps=4))
        told = handle.summary()
    assert told["transformer_2"]["last_step"] == 3
    steps = [told[name]["forwards"] for name in ("transformer", "transformer_2")]
    assert steps[0] > 0
    assert sum(steps) == 4


def clip_of(pipe: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return np.asarray(run_pipeline(pipe, ClipRequest(prompt="a cat", clip=CLIP, steps=4)))


@pytest.mark.cuda
def test_a_pipeline_on_a_card_makes_the_clip_of_the_cpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    pipe = make_wan_a14b()
    with apply_fis(pipe, CONFIG):
        expected = clip_of(pipe)
        pipe.to("cuda")  # moved after it was made sparse
        np.testing.assert_allclose(clip_of(pipe), expected, atol=1e-2)


@pytest.mark.cuda
@pytest.mark.parametrize("applied", ["before", "after"])
@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
@pytest.mark.parametrize("keys", ["anchor", "full"])
def test_an_offloaded_pipeline_on_a_card_makes_the_same_clip(
    how: str, applied: str, keys: str, monkeypatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    config = FISConfig(dense_head=1, dense_tail=1, kv=keys)
    pipe = make_wan_a14b()
    with apply_fis(pipe, config):
        expected = clip_of(pipe)
    if applied == "after":
        getattr(pipe, how)()
    with apply_fis(pipe, config):
        if applied == "before":
            getattr(pipe, how)()
        for _ in range(2):
            np.testing.assert_allclose(clip_of(pipe), expected, atol=1e-2)
