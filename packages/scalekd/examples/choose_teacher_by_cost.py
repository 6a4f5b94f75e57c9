"""See what several teachers would cost before you download one of them.

    python choose_teacher_by_cost.py [STUDENT SIZE TEACHER ...]

Everything is computed from shapes on torch's meta device: no weights, no images, and no memory for the
networks. GMAC are 10^9 multiply-accumulates for an image in a training step, backward pass included.
"""

import sys

import timm
import torch

from scalekd import ScaleKDConfig, StudentTap, TeacherSplit, plan_pair
from scalekd.adapters.costs import count_costs
from scalekd.method.parameter_perception import Projectors

student_name = sys.argv[1] if len(sys.argv) > 1 else "resnet50"
size = int(sys.argv[2]) if len(sys.argv) > 2 else 224
teachers = sys.argv[3:] or [
    "swin_tiny_patch4_window7_224",
    "swin_base_patch4_window7_224",
    "swin_large_patch4_window7_224",
    "convnext_base",
]

images = (size, size)
costs = {}
for name in teachers:
    with torch.device("meta"):
        student = StudentTap(timm.create_model(student_name))
        options = {"img_size": size} if hasattr(timm.create_model(name), "patch_embed") else {}
        teacher = TeacherSplit.from_timm(timm.create_model(name, **options))
    plan = plan_pair(teacher, student, ScaleKDConfig(), images, images)
    with torch.device("meta"):
        projectors = Projectors(plan.shape)
    costs[name] = count_costs(teacher, student, projectors, images, images)

    weights = sum(p.numel() for p in projectors.parameters())
    step, times = costs[name]["training GMAC per image"], costs[name]["times the student alone"]
    print(
        f"{name}: {step:g} GMAC, {times:g} times the student alone; projectors with "
        f"{weights / 1e6:.0f}M weights, {plan.shape.heads[0]} and {plan.shape.heads[1]} heads, "
        f"tau {plan.shape.tau:g}" + (", a pair of the paper" if plan.preset else "")
    )
