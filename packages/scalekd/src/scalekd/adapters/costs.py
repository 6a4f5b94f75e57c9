"""What training a pair costs, counted from shapes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from scalekd.adapters.pairing import dry_run
from scalekd.adapters.student import StudentTap
from scalekd.adapters.task import ScaleKDTask
from scalekd.adapters.teacher import TeacherSplit
from scalekd.method.parameter_perception import Projectors


def costs(
    split: TeacherSplit,
    tap: StudentTap,
    projectors: Projectors,
    size: tuple[int, int],
    teacher_size: tuple[int, int],
) -> dict[str, float]:
    """Giga multiply-accumulates per image, forward, and a training step beside the student alone.

    A step counts three forward passes for what is trained, two for the frozen tail, one for the trunk.
    """
    out, _, s3, s4 = dry_run(split, tap, size, teacher_size)
    x = torch.zeros(1, 3, *size, device=s3.device, dtype=s3.dtype)
    seen = torch.zeros(1, 3, *teacher_size, device=s3.device, dtype=s3.dtype)

    def tail(tokens: torch.Tensor) -> torch.Tensor:
        return split.tail(tokens, out.context)

    for module in (tap, projectors):
        module.eval()
    whole = _giga(lambda: split.forward(seen))
    student = _giga(lambda: tap(x))
    both = _giga(lambda: projectors(s3, s4, out.tokens, tail))
    once = _giga(lambda: tail(out.split))
    through = len(projectors.shape.views) * once if projectors.shape.tpp else 0.0
    for module in (tap, projectors):
        module.train()
    step = whole + 3 * (both - through) + 2 * through + 3 * student
    return {
        "teacher GMAC": round(whole, 2),
        "student GMAC": round(student, 2),
        "projectors GMAC": round(both - through, 2),
        "tail passes GMAC": round(through, 2),
        "training GMAC per image": round(step, 1),
        "student alone GMAC per image": round(3 * student, 1),
        "times the student alone": round(step / (3 * student), 1),
    }


def cost_line(task: ScaleKDTask) -> str:
    """One sentence on the cost of training, for the start of a run."""
    trainable = task.inner()
    assert trainable.projectors is not None
    cost = costs(task.split, trainable.tap, trainable.projectors, task.size, task.teacher_size)
    return (
        f"about {cost['training GMAC per image']:.3g} GMAC per image and step, "
        f"{cost['times the student alone']:g} times the student alone "
        f"({cost['student alone GMAC per image']:.3g}); "
        f"projectors: {count_parameters(trainable.projectors) / 1e6:.1f}M"
    )


def _giga(call: Callable[[], Any]) -> float:
    # With gradients on: the counter's hooks want a graph wherever a parameter does.
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 2e9


def count_parameters(module: nn.Module) -> int:
    """Number of weights of a network, buffers aside."""
    return sum(p.numel() for p in module.parameters())
