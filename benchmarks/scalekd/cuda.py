"""Hot paths of scalekd on a GPU: one update with the live and with a cached teacher, and its parts.

The pair is the paper's first, Swin-L to ResNet-50, 128 images of 224 x 224 in a process.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.hot_path_timing import main
from benchmarks.hot_paths import HotPath, Kit
from scalekd import ScaleKDTask, TeacherSplit
from scalekd.adapters.teacher import TeacherOut
from scalekd.training.cache import restore_teacher_out
from scalekd.training.recipe import load_recipe
from scalekd.training.trainer import create_optimizer, training_step

TEACHER = "swin_large_patch4_window7_224"
TINY_TEACHER: dict[str, Any] = {"img_size": 64, "window_size": 2, "embed_dim": 16}
TINY_TEACHER |= {"depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
CLASSES, KEPT_LOGITS = 1000, 100

# A rate that random images and random networks survive.
RECIPE = replace(load_recipe("traditional"), lr=1e-5)

# Waits of an update as it is today: is each term finite, is the sum, is the norm.
WAITS = {"trainer.py:training_step": True, "stopping.py:check_finite": 1.0}


class Pair(nn.Module):
    """A task with its teacher as a module, so that both are placed; compiled as ``train`` does it."""

    def __init__(self, task: ScaleKDTask) -> None:
        super().__init__()
        self.task, self.teacher = task, task.split.model

    def compile(self, *args: object, **options: object) -> None:
        """Compile student, projectors and tail."""
        self.task.split.compile()
        self.task.compile()


def make_teacher(tiny: bool) -> nn.Module:
    """The teacher, untrained."""
    if tiny:
        return timm.create_model("swin_tiny_patch4_window7_224", **TINY_TEACHER)
    return timm.create_model(TEACHER, num_classes=CLASSES)


def make_student(tiny: bool) -> nn.Module:
    """The student, untrained."""
    return timm.create_model("test_resnet" if tiny else "resnet50", num_classes=CLASSES)


def make_task(kit: Kit, tiny: bool) -> ScaleKDTask:
    """The full method between them, in training mode."""

    def make() -> Pair:
        task = ScaleKDTask(
            make_student(tiny),
            TeacherSplit.from_timm(make_teacher(tiny)),
            img_size=(64, 64) if tiny else (224, 224),
            device=torch.empty(0).device,
        )
        return Pair(task)

    pair = kit.module(make)
    assert isinstance(pair, Pair)
    return pair.task.train()


def make_batch(kit: Kit, tiny: bool) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    images, side = (4, 64) if tiny else (128, 224)
    return kit.randn(images, 3, side, side), kit.randint(CLASSES, images)


def optimizer_in_use(module: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer with the state that it has after the first update."""
    optimizer = create_optimizer(module, RECIPE)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


def update(kit: Kit, tiny: bool, amp: torch.dtype | None = torch.bfloat16) -> Callable[[], object]:
    """One update with the live teacher."""
    task, (x, y) = make_task(kit, tiny), make_batch(kit, tiny)
    optimizer = optimizer_in_use(task.inner())
    return lambda: training_step(task, [(x, y, None)], optimizer, amp=amp)


def cached_update(
    kit: Kit, tiny: bool, amp: torch.dtype | None = torch.bfloat16
) -> Callable[[], object]:
    """One update with what a cache holds of the teacher, as it lies on the device."""
    task, (x, y) = make_task(kit, tiny), make_batch(kit, tiny)
    optimizer = optimizer_in_use(task.inner())
    template, images = task.teach(x[:1]), len(x)
    kept = {
        "tokens": kit.randn(images, *template.tokens.shape[1:], dtype=torch.float16),
        "logits": kit.randn(images, KEPT_LOGITS),
        "classes": kit.randint(CLASSES, images, KEPT_LOGITS).int(),
        "mass": kit.randn(images) + 10,
    }

    def step() -> object:
        teacher: TeacherOut = restore_teacher_out(kept, template, CLASSES)
        return training_step(task, [(x, y, teacher)], optimizer, amp=amp)

    return step


def teacher_forward(kit: Kit, tiny: bool) -> Callable[[], object]:
    """The teacher over a batch, as a live teacher runs in every update."""
    model, (x, _) = kit.module(lambda: make_teacher(tiny)).eval(), make_batch(kit, tiny)

    def step() -> object:
        with torch.no_grad(), kit.autocast():
            return model(x)

    return step


def student_update(kit: Kit, tiny: bool) -> Callable[[], object]:
    """One update of the student by its labels alone: the least that a step can cost."""
    model, (x, y) = kit.module(lambda: make_student(tiny)).train(), make_batch(kit, tiny)
    optimizer = optimizer_in_use(model)

    def step() -> None:
        with kit.autocast():
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


# Updates run under bf16 autocast, which only the fake CPU has; tests/cuda/test_scalekd.py runs them on a
# device where a tensor in the wrong place raises.
PATHS = [
    HotPath(
        "one step, Swin-L to ResNet-50, batch 128, full method",
        update,
        fake="cpu",
        allow=WAITS,
    ),
    HotPath("one step with a cached teacher", cached_update, fake="cpu", allow=WAITS),
    HotPath("teacher forward alone", teacher_forward),
    HotPath("plain student step", student_update, fake="cpu"),
]

if __name__ == "__main__":
    main("scalekd", PATHS)
