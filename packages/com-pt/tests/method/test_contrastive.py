"""The loss in blocks against open_clip's own: values, gradients, processes and memory."""

import math
import os
import subprocess
import sys
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import distributed

from com_pt.method import contrastive
from com_pt.method.losses import multi_caption_clip_loss

CAPTIONS, WIDTH = 3, 8
MODES = [*product((False, True), (False, True))]  # local_loss, gather_with_grad


def batch_of(images: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    image = F.normalize(torch.randn(images, WIDTH, generator=generator, dtype=dtype), dim=-1)
    text = F.normalize(
        torch.randn(images, CAPTIONS, WIDTH, generator=generator, dtype=dtype), dim=-1
    )
    return image, text, torch.tensor(7.0, dtype=dtype), torch.tensor(-0.5, dtype=dtype)


def open_clips(image, text, scale, bias, **settings) -> torch.Tensor:
    """The mean of open_clip's loss over caption sets, each on the whole matrix of logits."""
    from open_clip.loss import ClipLoss

    loss = ClipLoss(**settings)
    sets = [loss(image, text[:, k], scale, logit_bias=bias) for k in range(text.shape[1])]
    return torch.stack(sets).mean()


def value_and_gradients(loss, inputs: tuple[torch.Tensor, ...], **settings) -> list[torch.Tensor]:
    leaves = [value.clone().requires_grad_() for value in inputs]
    value = loss(*leaves, **settings)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]  # pyright: ignore


@pytest.mark.parametrize("elements", [1, 20, 1 << 24])  # blocks of one row, of two, of all
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_blocks_have_open_clips_loss_and_gradient(elements, dtype, monkeypatch) -> None:
    monkeypatch.setattr(contrastive, "BLOCK_ELEMENTS", elements)
    inputs = batch_of(9, dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-6
    ours = value_and_gradients(multi_caption_clip_loss, inputs)
    local = value_and_gradients(multi_caption_clip_loss, inputs, local_loss=True)
    theirs = value_and_gradients(open_clips, inputs)
    for one, other, expected in zip(ours, local, theirs, strict=True):
        torch.testing.assert_close(one, expected, atol=tolerance, rtol=1e-5)
        torch.testing.assert_close(other, expected, atol=tolerance, rtol=1e-5)


def test_a_scale_of_a_hundred_does_not_overflow() -> None:
    image, text, _, _ = batch_of(9, torch.float32)
    inputs = (
        image,
        text,
        torch.tensor(100.0),
    )  # CLIP's largest; exp(100) is more than float32 holds
    ours = value_and_gradients(multi_caption_clip_loss, inputs)
    theirs = value_and_gradients(lambda *leaves: open_clips(*leaves, None), inputs)
    for one, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, expected, atol=1e-4, rtol=1e-4)


def test_an_autocast_changes_neither_the_loss_nor_its_gradients() -> None:
    inputs = batch_of(10, torch.float32)
    expected = value_and_gradients(multi_caption_clip_loss, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradients(multi_caption_clip_loss, inputs)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


CHILD = """
import sys; sys.path[:0] = [{here!r}]
from test_contrastive import compare_with_open_clip
compare_with_open_clip(int(sys.argv[1]), {folder!r})
"""


def compare_with_open_clip(rank: int, folder: str) -> None:
    """Both losses on this process's half, in every mode; ours in blocks of two rows."""
    torch.set_num_threads(1)
    contrastive.BLOCK_ELEMENTS = 20
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    image, text, scale, bias = batch_of(10, torch.float64)
    half = slice(5 * rank, 5 * rank + 5)
    inputs = (image[half], text[half], scale, bias)
    results = {}
    for local, with_grad in MODES:
        settings = {"local_loss": local, "gather_with_grad": with_grad}
        ours = value_and_gradients(multi_caption_clip_loss, inputs, **settings)
        theirs = value_and_gradients(open_clips, inputs, **settings, rank=rank, world_size=2)
        results[local, with_grad] = (ours, theirs)
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_open_clips_gradient_in_every_mode(tmp_path) -> None:
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(here=str(Path(__file__).parent), folder=str(tmp_path)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, str(script), str(rank)], env=environment)
        for rank in (0, 1)
    ]
    assert [process.wait(timeout=300) for process in ranks] == [0, 0]
    of_ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for results, mode in product(of_ranks, MODES):
        for one, expected in zip(*results[mode], strict=True):
            torch.testing.assert_close(one, expected, atol=1e-12, rtol=0)

    # With gradients gathered, what DDP averages is what one process computes on the whole batch.
    whole = value_and_gradients(multi_caption_clip_loss, batch_of(10, torch.float64))
    for local in (False, True):
        of_image = torch.cat([results[local, True][0][1] for results in of_ranks]) / 2
        torch.testing.assert_close(of_image, whole[1], atol=1e-12, rtol=0)
        losses = torch.stack([results[local, True][0][0] for results in of_ranks])
        torch.testing.assert_close(losses.mean(), whole[0], atol=1e-12, rtol=0)
    # Without, the gradient is another one: the modes do differ.
    of_mode = [of_ranks[0][mode][0][1] for mode in MODES]
    assert all(not torch.allclose(a, b) for a, b in pairwise(of_mode[:3]))
    assert math.isfinite(float(whole[0]))
