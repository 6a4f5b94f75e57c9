"""One update as a function: what it computes, and that it changes nothing when a value is bad."""

import copy

import pytest
import torch
from scalekd_tiny import CLASSES, STUDENTS, tiny_teacher
from torch import nn

from effml_common.errors import NonFiniteError
from scalekd import ScaleKDTask
from scalekd.training.trainer import training_step


def tiny_task() -> ScaleKDTask:
    torch.manual_seed(0)
    task = ScaleKDTask(STUDENTS["vit"](), tiny_teacher(), img_size=(32, 32))
    return task.train()


def batch(images: int = 6) -> tuple[torch.Tensor, torch.Tensor, None]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(images, 3, 32, 32, generator=generator)
    return x, torch.randint(CLASSES, (images,), generator=generator), None


def test_a_step_is_the_gradient_the_clipping_and_the_optimizer() -> None:
    task = tiny_task()
    twin = copy.deepcopy(task.trainable_module)
    optimizer = torch.optim.SGD(task.inner().parameters(), lr=0.1)
    result = training_step(task, [batch()], optimizer, clip=0.5)

    # The same by hand, on the networks as they were.
    x, y, _ = batch()
    task.trainable_module = twin
    task(x, y)["loss"].backward()
    by_hand = list(twin.parameters())
    norm = nn.utils.clip_grad_norm_(by_hand, 0.5)
    torch.optim.SGD(by_hand, lr=0.1).step()
    assert norm > 0.5
    assert torch.equal(norm, result["grad_norm"])
    updated = optimizer.param_groups[0]["params"]
    assert all(torch.equal(a, b) for a, b in zip(updated, by_hand, strict=True))


def test_a_known_pass_of_the_teacher_gives_the_same_step() -> None:
    losses = []
    for known in (False, True):
        task = tiny_task()
        optimizer = torch.optim.SGD(task.inner().parameters(), lr=0.1)
        x, y, _ = batch()
        teacher = task.teach(x) if known else None
        losses.append(training_step(task, [(x, y, teacher)], optimizer)["loss"])
    assert torch.equal(*losses)


def test_a_bad_value_changes_nothing() -> None:
    task = tiny_task()
    before = copy.deepcopy(task.inner().student.state_dict())
    optimizer = torch.optim.SGD(task.inner().parameters(), lr=0.1)
    x, y, _ = batch()
    with pytest.raises(NonFiniteError, match="task_loss"):
        training_step(task, [(x * float("nan"), y, None)], optimizer, step=3)
    after = task.inner().student.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
