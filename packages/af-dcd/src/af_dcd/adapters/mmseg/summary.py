"""What a pair is and costs, without data: shapes and operations on meta tensors, or one dry step."""

import copy
from typing import Any

import torch
from mmengine.config import Config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from af_dcd.adapters.mmseg.config_builder import without_downloads
from af_dcd.adapters.mmseg.feature_recorder import meta_copy, run_heads
from af_dcd.adapters.mmseg.shims import build_model, quiet
from af_dcd.method.contrast import BLOCK_BYTES
from af_dcd.method.distillation import contrast_shape
from effml_common.report import Row

FORWARDS_PER_STEP = 3  # of what is trained: the backward pass counts as two
BYTES_PER_WEIGHT = 12  # float32 weight, gradient and momentum
BYTES_PER_FLOAT32 = 4
DRY_RUN_IMAGES = 2  # batch normalisation cannot average one


def summarize_pair(config: Config) -> dict[str, Any]:
    """Describe the pair of a distilling config; see ``inspect``.

    Raises:
        InputError: If the two models and the settings do not fit together.
    """
    model = build_model(without_downloads(config.model))
    return {
        "crop": list(model.crop),
        **_tapped_maps(model),
        **_term_weights(model),
        **_step_cost(model),
        **_memory(model),
    }


def _tapped_maps(model: Any) -> dict[str, Any]:
    student_tap, teacher_tap = (
        ":".join(word for word in (tap.kind, tap.path, tap.entry) if word) for tap in model.taps
    )
    shapes = {name: list(shape[1:]) for name, shape in model.tapped_shapes.items()}
    return {
        "student tap": student_tap, "student map": shapes["student"],
        "teacher tap": teacher_tap, "teacher map": shapes["teacher"],
        "score map": shapes["scores"],
    }  # fmt: skip


def _term_weights(model: Any) -> dict[str, Any]:
    names = ("lambda_kd", "lambda_fd", "lambda_ctr", "fd_reduction", "mask", "contrast")
    weights = {name: getattr(model.distill, name) for name in names}
    if model.distill.fd_reduction == "sum":
        c, h, w = model.tapped_shapes["teacher"][1:]
        weights["lambda_fd on the mean error"] = round(model.distill.lambda_fd * c * h * w, 3)
    return weights


def _step_cost(model: Any) -> dict[str, Any]:
    """Count giga multiply-accumulates, and set a step beside one of logits distillation."""
    student = _count_gmac(meta_copy(model), model.crop)
    teacher = _count_gmac(meta_copy(model.teacher.model), model.crop)
    branch = _count_branch_gmac(model)
    kd_step = FORWARDS_PER_STEP * student + teacher
    step = kd_step + FORWARDS_PER_STEP * branch
    return {
        "GMAC a crop: student forward": student,
        "GMAC a crop: teacher forward": teacher,
        "GMAC a crop: branch forward": branch,
        "GMAC a crop: step (backward counted as two forwards)": round(step, 1),
        "step against a step of logits KD": round(step / kd_step, 2),
    }


def _count_gmac(meta_model: nn.Module, crop: tuple[int, int]) -> float:
    """Count giga multiply-accumulates of one image up to the class scores."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), quiet():
        run_heads(meta_model, torch.zeros(1, 3, *crop, device="meta"))
    return _giga_multiply_accumulates(counter)


def _count_branch_gmac(model: Any) -> float:
    if not hasattr(model, "afdcd"):
        return 0.0
    generation = copy.deepcopy(model.afdcd.generation).to("meta")
    student_map = model.tapped_shapes["student"][1:]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        generation(torch.zeros(1, *student_map, device="meta"))
    return _giga_multiply_accumulates(counter)


def _giga_multiply_accumulates(counter: FlopCounterMode) -> float:
    return round(counter.get_total_flops() / 2e9, 2)  # two operations each


def _memory(model: Any) -> dict[str, Any]:
    branch = _count_weights(getattr(model, "afdcd", None))
    naive = _difference_bytes(model)
    return {
        "weights of the student": _count_weights(model) - branch,
        "weights of the branch (dropped at the end)": branch,
        "bytes of the branch with gradient and momentum": BYTES_PER_WEIGHT * branch,
        "bytes of pairwise differences a crop: naive": naive,
        "bytes of pairwise differences: chunked": min(naive, BLOCK_BYTES),
    }


def _difference_bytes(model: Any) -> int:
    """Count the bytes of the [patches, k, k, d] differences of a crop in float32."""
    if model.distill.lambda_ctr == 0:
        return 0
    patches, k, d = contrast_shape(model.tapped_shapes["teacher"][1:], model.distill)
    return BYTES_PER_FLOAT32 * patches * k * k * d


def _count_weights(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def dry_run(config: Config, device: torch.device) -> list[Row]:
    """Run a batch of noise through both models: the size of every weighted term, a row each.

    Raises:
        InputError: If the two models and the settings do not fit together.
    """
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    # Noise, in the form that mmseg's segmenters take.
    model = build_model(config.model).to(device)
    classes = model.decode_head.num_classes if hasattr(model.decode_head, "num_classes") else 2
    samples = []
    for _ in range(DRY_RUN_IMAGES):
        labels = torch.randint(classes, (1, *model.crop), device=device)
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=labels)))
    images = torch.randn(DRY_RUN_IMAGES, 3, *model.crop, device=device)

    # One forward pass, in training mode.
    _, terms = model.train().parse_losses(model.loss(images, samples))
    return [
        Row(name, "one batch of noise", {"value": [float(torch.as_tensor(value).detach())]})
        for name, value in terms.items()
    ]
