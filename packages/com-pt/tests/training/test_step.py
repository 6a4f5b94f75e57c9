"""One update of a stage."""

import pytest
import torch
from com_pt_tiny import spec, task_of

from com_pt.adapters.accelerator import make_accelerator
from com_pt.training.stage_model import StageModel
from com_pt.training.step import accumulate, split_batch, sum_losses


def gradients(task, batch, micro: int, teacher=None):
    torch.manual_seed(1)
    from com_pt.method.losses import InverseFeatureLoss

    model = task.build(spec(32)).double()
    loss = InverseFeatureLoss({"image": (32, 24), "text": (32, 24)}).double()
    stage = StageModel(task, model, loss)
    parts = split_batch(batch, micro)
    targets = split_batch(teacher, micro)
    total, _ = accumulate(stage, stage, parts, targets, make_accelerator("fp32"))
    return float(total), {n: p.grad for n, p in stage.named_parameters() if p.grad is not None}


def test_micro_batches_have_the_gradient_of_the_whole_contrastive_batch(pictures) -> None:
    task = task_of(pictures)
    images, ids = task.collate([task[i] for i in range(8)])
    batch = (images.double(), ids)
    teacher = {"image": torch.randn(8, 24).double(), "text": torch.randn(8, 2, 24).double()}
    whole, one = gradients(task, batch, 1, teacher)
    parts, other = gradients(task, batch, 4, teacher)
    assert parts == pytest.approx(whole, abs=1e-6)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=1e-6, rtol=1e-4)
    # Not what averaging the losses of small batches would give.
    stage = StageModel(task, task.build(spec(32)).double(), None)
    small = [
        float(sum_losses(stage, stage(part), {})[0].detach()) for part in split_batch(batch, 4)
    ]
    assert sum(small) / 4 < whole - 0.5
