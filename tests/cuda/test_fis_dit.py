"""fis-dit's hot paths on a device without values: nothing in the wrong place, costs as committed."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from benchmarks.fis_dit.cuda import HUNYUAN, PATHS, SPARSE, TINY, WAN, HunyuanWaits, forward
from benchmarks.hot_paths import FakeKit, HotPath

from fis_dit.adapters.apply import apply_fis
from fis_dit.adapters.random_models import (
    Architecture,
    make_forward_inputs,
    make_random_transformer,
)
from tests.cuda.budgets import assert_within_budget, each
from tests.cuda.counter import Counter

HUNYUAN_WAITS = "transformer_hunyuan_video15.py:forward"


@pytest.mark.parametrize(
    "path", each(PATHS, slow=["one sparse forward of HunyuanVideo 1.5 without"])
)
def test_a_hot_path_stays_within_its_budget(path: HotPath) -> None:
    assert_within_budget("fis_dit", path)


@pytest.mark.parametrize("architecture", [WAN, HUNYUAN], ids=["wan", "hunyuan"])
@pytest.mark.parametrize("changes", [{}, {"sites": "attn"}], ids=["block", "attention"])
def test_index_tensors_are_on_the_blocks_device_and_copied_there_once(
    architecture: Architecture, changes: dict[str, Any]
) -> None:
    shapes = TINY[architecture.model]
    shapes = replace(shapes, settings={**shapes.settings, "num_layers": 3})
    with Counter("cuda:0", allow={HUNYUAN_WAITS: HunyuanWaits()}) as counter, torch.no_grad():
        model: Any = counter.module(lambda: make_random_transformer(shapes, torch.bfloat16))
        kit = FakeKit(counter)
        inputs = make_forward_inputs(
            shapes, model, lambda *shape: kit.randn(*shape, dtype=torch.bfloat16)
        )
        with apply_fis(model, replace(SPARSE, **changes)) as handle:
            with counter.counting() as first:
                model(**inputs)
            with counter.counting() as second:
                model(**inputs)
            plans = [hook.frame_index for hook in handle._attachments[0].geometry.sparse_hooks]
    assert len(plans) == 2
    assert {tensor.device for plan in plans for tensor in vars(plan).values()} == {counter.device}

    # Making them waits for the device, using them does not.
    made = ("neighbours.py:make_frame_index", "neighbours.py:positions")
    used = ("neighbours.py", "skipped_frames.py")
    assert any(place in line for line in first.copies for place in made)
    assert not any(file in line for line in (*second.copies, *second.waits) for file in used)


def test_a_sparse_forward_waits_no_more_than_a_dense_one() -> None:
    waits = []
    for config in (None, SPARSE):
        with Counter("cuda:0") as counter:
            step = forward(FakeKit(counter), True, WAN, config)
            step()
            with counter.counting() as cost:
                step()
            waits.append(dict(cost.waits))
    assert waits == [{}, {}]
