"""What training a pair costs, counted from shapes: multiply-accumulates (MAC) and weights."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from scalekd.adapters.models import count_parameters
from scalekd.adapters.pairing import dry_run
from scalekd.adapters.student import StudentTap
from scalekd.adapters.task import ScaleKDTask
from scalekd.adapters.teacher import TeacherSplit
from scalekd.method.parameter_perception import Projectors

FLOPS_PER_GMAC = 2e9  # a multiply-accumulate is two operations


def describe_cost(task: ScaleKDTask) -> str:
    """One sentence on the cost of training, for the start of a run: nothing is wrapped yet."""
    trainable: Any = task.trainable_module
    assert trainable.projectors is not None
    sizes = task.images.student_size, task.images.teacher_size
    cost = count_costs(task.split, trainable.tap, trainable.projectors, *sizes)
    return (
        f"about {cost['training GMAC per image']:.3g} GMAC per image and step, "
        f"{cost['times the student alone']:g} times the student alone "
        f"({cost['student alone GMAC per image']:.3g}); "
        f"projectors: {count_parameters(trainable.projectors) / 1e6:.1f}M"
    )


def count_costs(
    split: TeacherSplit,
    tap: StudentTap,
    projectors: Projectors,
    student_size: tuple[int, int],
    teacher_size: tuple[int, int],
) -> dict[str, float]:
    """Count giga multiply-accumulates per image, forward, and of a training step.

    A step counts three forward passes for what is trained, two for the frozen tail, one for the trunk.

    Args:
        split: Teacher; the meta device works.
        tap: Student.
        projectors: Built for the two.
        student_size: (h, w) of the student's images.
        teacher_size: (h, w) of the teacher's images.
    """
    # One forward pass of each part. Those of the projectors hold the passes through the tail.
    shapes = dry_run(split, tap, student_size, teacher_size)
    out = shapes.teacher

    def tail(tokens: torch.Tensor) -> torch.Tensor:
        return split.tail(tokens, out.context)

    passes = {
        "teacher": lambda: split.forward(shapes.teacher_image),
        "student": lambda: tap(shapes.student_image),
        "projectors and tail": lambda: projectors(shapes.s3, shapes.s4, out.tokens, tail),
        "tail": lambda: tail(out.split),
    }

    # With gradients on: the counter's hooks want a graph wherever a parameter does.
    gmac = {}
    for module in (tap, projectors):
        module.eval()
    for name, run_part in passes.items():
        with torch.enable_grad(), FlopCounterMode(display=False) as counter:
            run_part()
        gmac[name] = counter.get_total_flops() / FLOPS_PER_GMAC
    for module in (tap, projectors):
        module.train()

    # A whole step, and the student's own for comparison.
    tails = len(projectors.shape.views) * gmac["tail"] if projectors.shape.tpp else 0.0
    own, student = gmac["projectors and tail"] - tails, gmac["student"]
    step = gmac["teacher"] + 3 * own + 2 * tails + 3 * student
    return {
        "teacher GMAC": round(gmac["teacher"], 2),
        "student GMAC": round(student, 2),
        "projectors GMAC": round(own, 2),
        "tail passes GMAC": round(tails, 2),
        "training GMAC per image": round(step, 1),
        "student alone GMAC per image": round(3 * student, 1),
        "times the student alone": round(step / (3 * student), 1),
    }
