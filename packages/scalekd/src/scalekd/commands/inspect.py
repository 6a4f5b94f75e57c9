"""The ``inspect`` command: what a pair would be, from shapes alone."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from scalekd.adapters.costs import costs, count_parameters
from scalekd.adapters.models import build
from scalekd.adapters.pairing import dry_run, plan_of
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


@dataclass(frozen=True)
class Facts:
    """Named facts about a pair, or a list of pairs, as a table or as JSON."""

    rows: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """The facts of one pair, or all under ``pairs``."""
        return self.rows[0] if len(self.rows) == 1 else {"pairs": self.rows}

    def __rich__(self) -> Any:
        from rich.table import Table

        if len(self.rows) == 1:
            table = Table("", "", show_header=False)
            for name, value in self.rows[0].items():
                table.add_row(name, _words(value))
            return table
        table = Table(*("teacher", "student", "heads", "tau", "weights", "projectors M", "cost"))
        for row in self.rows:
            weights = sorted(set(row["summed weights"].values()), reverse=True)
            cells = (row["teacher"], row["student"], row["heads"], row["tau"], weights)
            size = f"{row['projector parameters'] / 1e6:.1f}"
            table.add_row(*map(_words, cells), size, f"{row['times the student alone']}x")
        return table


def inspect(config: InspectConfig) -> Facts:
    """Describe a pair, or all that the paper has, without weights or data.

    Raises:
        InputError: If timm knows no such model, or the pair does not fit.
    """
    if not config.published:
        return Facts([facts_of(config)])
    rows = []
    for teacher, student, extra, size in PUBLISHED:
        pair = replace(config, teacher=teacher, student=student, student_args=extra, img_size=size)
        rows.append(facts_of(pair))
    return Facts(rows)


def meta_pair(config: PairConfig) -> tuple[TeacherSplit, StudentTap]:
    """Both networks on the meta device: shapes without weights."""
    with torch.device("meta"):
        teacher = build(
            config.teacher,
            num_classes=config.num_classes,
            img_size=config.img_size,
            extra=config.teacher_args,
        )
        student = build(
            config.student,
            num_classes=config.num_classes,
            img_size=config.img_size,
            extra=config.student_args,
        )
    split = TeacherSplit.from_timm(
        teacher, tail_blocks=config.tail_blocks, prefix=config.tpp_prefix
    )
    return split, StudentTap(student)


def facts_of(config: PairConfig, with_cost: bool = True) -> dict[str, Any]:
    """Shapes, tail, projectors, weights and, if wanted, cost of one pair."""
    split, tap = meta_pair(config)
    size = (config.img_size, config.img_size)
    out, logits, s3, s4 = dry_run(split, tap, size, size)
    plan = plan_of(split, tap, config, out, logits, (s3, s4))
    shape = plan.shape
    with torch.device("meta"):
        projectors = Projectors(shape).eval()
    facts = {
        "teacher": config.teacher,
        "student": config.student,
        "image": f"{config.img_size}x{config.img_size}",
        "pair of the paper": plan.preset,
        "S3": _map(shape.student[0]),
        "S4": _map(shape.student[1]),
        "tail": " + ".join(_where(split.model, m) for m in split.modules),
        "tail input": _map(shape.split),
        "tail output": _map(shape.final),
        "prefix tokens": split.prefix_tokens,
        "heads": list(shape.heads),
        "tau": shape.tau,
        "stem norm": shape.stem_norm,
        "weights": {f"{s}_{v}": round(w, 3) for (s, v), w in shape.weights.items()},
        "summed weights": summed(shape),
        "logit term": f"alpha {plan.kd_alpha:g}, T {plan.kd_t:g}",
        "teacher parameters": count_parameters(split.model),
        "student parameters": count_parameters(tap),
        "projector parameters": count_parameters(projectors),
        **{f"projector {n}": count_parameters(m) for n, m in projectors.named_children()},
    }
    return facts | costs(split, tap, projectors, size, size) if with_cost else facts


def summed(shape: MimicShape) -> dict[str, float]:
    """The weights as the released code has them: for sums over tokens."""
    tokens = shape.final[1][0] * shape.final[1][1]
    return {f"{s}_{v}": round(w / tokens, 4) for (s, v), w in shape.weights.items()}


def _map(shape: tuple[int, tuple[int, int]]) -> str:
    return f"{shape[0]} channels on {shape[1][0]}x{shape[1][1]}"


def _where(model: nn.Module, module: nn.Module) -> str:
    return next((name for name, each in model.named_modules() if each is module), "module")


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v:g}" for k, v in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and value > 99_999:
        return f"{value / 1e6:.2f}M"
    return str(value)
