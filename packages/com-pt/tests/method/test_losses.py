"""The losses against their formulas and open_clip's own."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import distributed

from com_pt.method.losses import (
    InverseFeatureLoss,
    feature_distance,
    multi_caption_clip_loss,
    weight_from_alpha,
)
from effml_common.errors import ConfigError, InputError


def units(*shape: int, seed: int = 0) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(values, dim=-1)


def test_the_feature_loss_is_the_released_mse_of_unit_vectors() -> None:
    v, t = units(6, 16).requires_grad_(), units(6, 3, 16, seed=1).requires_grad_()
    old_v, old_t = units(6, 16, seed=2), units(6, 3, 16, seed=3)
    alpha, d = 62.5, 16
    # (1 / BD) sum |v - v'|^2 + (1 / BKD) sum |t - t'|^2, times alpha
    image = ((v - old_v) ** 2).sum() / (6 * d)
    text = ((t - old_t) ** 2).sum() / (6 * 3 * d)
    loss = InverseFeatureLoss({"image": (d, d), "text": (d, d)}, weight_from_alpha(alpha, d))
    ours = loss({"image": v, "text": t}, {"image": old_v, "text": old_t})
    torch.testing.assert_close(ours.double(), alpha * (image + text), atol=1e-5, rtol=1e-5)
    mean = InverseFeatureLoss(
        {"image": (d, d), "text": (d, d)}, weight_from_alpha(alpha, d), "mean"
    )
    halved = mean({"image": v, "text": t}, {"image": old_v, "text": old_t})
    assert float(halved.detach()) == pytest.approx(float(ours.detach()) / 2)
    assert weight_from_alpha(500, 512) == pytest.approx(1.953, abs=1e-3)


def test_equal_features_cost_nothing_and_length_does_not_matter() -> None:
    v = units(4, 8)
    assert float(feature_distance(3 * v, v)) == pytest.approx(0, abs=1e-6)
    assert float(feature_distance(v, -v)) == pytest.approx(2)


def test_only_the_successor_and_the_projector_get_gradients() -> None:
    loss = InverseFeatureLoss({"pooled": (12, 8)})
    student = torch.randn(5, 12, requires_grad=True)
    teacher = torch.randn(5, 8, requires_grad=True)
    loss({"pooled": loss.project("pooled", student)}, {"pooled": teacher}).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert loss.projectors["pooled"].weight.grad is not None


def test_unequal_widths_without_a_projector_are_refused() -> None:
    with pytest.raises(ValueError, match=r"feature widths differ.*projector"):
        InverseFeatureLoss({"image": (12, 8)}, projector=False)
    with pytest.raises(ConfigError):
        InverseFeatureLoss({"image": (12, 8)}, projector=False)
    with pytest.raises(InputError, match=r"\(2, 3\) and \(2, 4\) differ"):
        feature_distance(torch.zeros(2, 3), torch.zeros(2, 4))


def test_a_cap_keeps_the_feature_loss_at_the_task_loss() -> None:
    v, old = units(4, 8), units(4, 8, seed=1)
    loss = InverseFeatureLoss({"image": (8, 8)}, 1000.0, cap="scale")
    task = torch.tensor(0.5, requires_grad=True)
    value = loss({"image": v.requires_grad_()}, {"image": old}, task)
    assert float(value.detach()) == pytest.approx(0.5)
    value.backward()
    assert task.grad is None
    assert v.grad is not None
    small = InverseFeatureLoss({"image": (8, 8)}, 1e-3, cap="scale")
    plain = InverseFeatureLoss({"image": (8, 8)}, 1e-3)
    assert torch.equal(
        small({"image": v}, {"image": old}, task), plain({"image": v}, {"image": old})
    )


def test_one_caption_is_open_clips_loss() -> None:
    from open_clip.loss import ClipLoss

    v, t = units(7, 8).float(), units(7, 1, 8, seed=1).float()
    scale = torch.tensor(math.exp(2.0))
    expected = ClipLoss()(v, t[:, 0], scale)
    torch.testing.assert_close(multi_caption_clip_loss(v, t, scale), expected)


def test_several_captions_are_the_mean_over_sets_whose_negatives_are_of_other_images() -> None:
    v, t, scale = units(5, 8), units(5, 3, 8, seed=1), torch.tensor(10.0, dtype=torch.float64)
    total = 0.0
    for k in range(3):
        for i in range(5):
            rows = [float(10 * v[i] @ t[j, k]) for j in range(5)]
            columns = [float(10 * v[j] @ t[i, k]) for j in range(5)]
            for logits in (rows, columns):
                total += math.log(sum(map(math.exp, logits))) - logits[i]
    ours = float(multi_caption_clip_loss(v, t, scale))
    assert ours == pytest.approx(total / (2 * 3 * 5), rel=1e-5)
    order = torch.tensor([2, 0, 1])
    assert float(multi_caption_clip_loss(v, t[:, order], scale)) == pytest.approx(ours, rel=1e-6)


def test_texts_that_do_not_pair_with_images_are_refused() -> None:
    with pytest.raises(InputError, match=r"\(4, 2, 8\) texts for \(3, 8\) images"):
        multi_caption_clip_loss(units(3, 8), units(4, 2, 8), torch.tensor(1.0))


CHILD = """
import sys; sys.path[:0] = [{here!r}]
from test_losses import scale_on_a_half
scale_on_a_half(int(sys.argv[1]), {folder!r})
"""


def scaled_gradient(rows: slice) -> torch.Tensor:
    """The gradient of a feature loss that is scaled down, on some of eight samples."""
    student, teacher = units(8, 16).float()[rows], units(8, 16, seed=1).float()[rows]
    loss = InverseFeatureLoss({"image": (16, 16)}, weight=30.0, cap="scale")
    task_loss = torch.arange(8.0)[rows].mean()
    student.requires_grad_()
    loss({"image": student}, {"image": teacher}, task_loss).backward()
    assert student.grad is not None
    return student.grad


def scale_on_a_half(rank: int, folder: str) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    torch.save(scaled_gradient(slice(4 * rank, 4 * rank + 4)), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_scale_the_feature_loss_as_one_does(tmp_path) -> None:
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(here=str(Path(__file__).parent), folder=str(tmp_path)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script)]
    ranks = [subprocess.Popen([*command, str(rank)], env=environment) for rank in (0, 1)]
    assert [process.wait(timeout=300) for process in ranks] == [0, 0]
    halves = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    # DDP averages over processes.
    torch.testing.assert_close(torch.cat(halves) / 2, scaled_gradient(slice(0, 8)))
