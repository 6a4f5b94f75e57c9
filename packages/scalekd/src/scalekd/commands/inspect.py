"""The ``inspect`` command: what a pair would be, from shapes alone."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from effml_common.report import Summary
from scalekd.adapters.costs import count_costs
from scalekd.adapters.models import build, count_parameters
from scalekd.adapters.pairing import Plan, plan_pair
from scalekd.adapters.student import StudentTap
from scalekd.adapters.teacher import TeacherSplit
from scalekd.config import InspectConfig, PairConfig
from scalekd.method.parameter_perception import MimicShape, Projectors

VIT = '{"class_token": false, "global_pool": "avg", "fc_norm": false}'
EVA = "eva_large_patch14_196"
SWIN = "swin_large_patch4_window7_224"
# (teacher, student, student arguments, pixels)
PUBLISHED: tuple[tuple[str, str, str, int], ...] = (
    (SWIN, "resnet50", "", 224),
    (SWIN, "mobilenetv1_100", "", 224),
    (SWIN, "convnext_tiny", "", 224),
    (SWIN, "swin_tiny_patch4_window7_224", "", 224),
    (SWIN, "mixer_s16_224", "", 224),
    (SWIN, "mixer_b16_224", "", 224),
    (SWIN, "vit_small_patch16_224", VIT, 224),
    (SWIN, "vit_base_patch16_224", VIT, 224),
    ("swin_base_patch4_window7_224", "resnet50", "", 224),
    ("swin_small_patch4_window7_224", "resnet50", "", 224),
    (EVA, "resnet50", "", 224),
    (EVA, "mixer_b14_224", "", 224),
    (EVA, "vit_base_patch16_224", VIT[:-1] + ', "patch_size": 14}', 224),
    (EVA, "eva02_small_patch14_336", "", 336),
)
LARGEST_PLAIN_COUNT = 99_999  # counts above are shown in millions


@dataclass(frozen=True)
class PublishedPairs:
    """Every pair of the paper, one row each."""

    pairs: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """All that is known of each pair."""
        return {"pairs": self.pairs}

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table("teacher", "student", "heads", "tau", "weights", "projectors M", "cost")
        for pair in self.pairs:
            weights = sorted(set(pair["summed weights"].values()), reverse=True)
            values = (pair["teacher"], pair["student"], pair["heads"], pair["tau"], weights)
            millions = f"{pair['projector parameters'] / 1e6:.1f}"
            table.add_row(*map(_cell, values), millions, f"{pair['times the student alone']}x")
        return table


def inspect(config: InspectConfig) -> Summary | PublishedPairs:
    """Describe a pair, or all that the paper has, without weights or data.

    Raises:
        InputError: If timm knows no such model, or the pair does not fit.
    """
    if not config.published:
        values = describe_pair(config)
        return Summary(values, shown={name: _cell(value) for name, value in values.items()})

    pairs = []
    for teacher, student, extra, size in PUBLISHED:
        pair = replace(config, teacher=teacher, student=student, student_args=extra, img_size=size)
        pairs.append(describe_pair(pair))
    return PublishedPairs(pairs)


def describe_pair(config: PairConfig, with_cost: bool = True) -> dict[str, Any]:
    """Return shapes, tail, projectors, weights and, if wanted, cost of one pair, by name.

    Raises:
        InputError: If timm knows no such model, or the pair does not fit.
    """
    # The pair as training would plan it.
    size = (config.img_size, config.img_size)
    split, tap = build_without_weights(config)
    plan = plan_pair(split, tap, config, size, size)
    with torch.device("meta"):
        projectors = Projectors(plan.shape).eval()

    values = {
        "teacher": config.teacher,
        "student": config.student,
        "image": f"{config.img_size}x{config.img_size}",
        **_describe_plan(plan, split),
        "teacher parameters": count_parameters(split.model),
        "student parameters": count_parameters(tap),
        "projector parameters": count_parameters(projectors),
        **{f"projector {n}": count_parameters(m) for n, m in projectors.named_children()},
    }
    return values | count_costs(split, tap, projectors, size, size) if with_cost else values


def build_without_weights(config: PairConfig) -> tuple[TeacherSplit, StudentTap]:
    """Build both networks on the meta device: shapes without values."""
    common = {"num_classes": config.num_classes, "img_size": config.img_size}
    with torch.device("meta"):
        teacher = build(config.teacher, extra=config.teacher_args, **common)
        student = build(config.student, extra=config.student_args, **common)
    split = TeacherSplit.from_timm(
        teacher, tail_blocks=config.tail_blocks, prefix=config.tpp_prefix
    )
    return split, StudentTap(student)


def sum_weights(shape: MimicShape) -> dict[str, float]:
    """Return the weights as the released code has them: for sums over tokens."""
    tokens = shape.final[1][0] * shape.final[1][1]
    return {f"{s}_{v}": round(w / tokens, 4) for (s, v), w in shape.weights.items()}


def _describe_plan(plan: Plan, split: TeacherSplit) -> dict[str, Any]:
    shape = plan.shape
    tail = " + ".join(_name_in(split.model, module) for module in split.modules)

    return {
        "pair of the paper": plan.preset,
        "S3": _describe_map(shape.student[0]),
        "S4": _describe_map(shape.student[1]),
        "tail": tail,
        "tail input": _describe_map(shape.split),
        "tail output": _describe_map(shape.final),
        "prefix tokens": split.prefix_tokens,
        "heads": list(shape.heads),
        "tau": shape.tau,
        "stem norm": shape.stem_norm,
        "weights": {f"{s}_{v}": round(w, 3) for (s, v), w in shape.weights.items()},
        "summed weights": sum_weights(shape),
        "logit term": f"alpha {plan.kd_alpha:g}, T {plan.kd_t:g}",
    }


def _describe_map(shape: tuple[int, tuple[int, int]]) -> str:
    return f"{shape[0]} channels on {shape[1][0]}x{shape[1][1]}"


def _name_in(model: nn.Module, wanted: nn.Module) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "module")


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v:g}" for k, v in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and value > LARGEST_PLAIN_COUNT:
        return f"{value / 1e6:.2f}M"
    return str(value)
