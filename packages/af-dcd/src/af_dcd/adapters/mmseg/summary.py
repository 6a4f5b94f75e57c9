"""What a pair is, without data: shapes, weights, memory and cost, on meta tensors."""

import copy
from typing import Any

import torch
from mmengine.config import Config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from af_dcd.adapters.mmseg.feature_recorder import forward, ghost_of
from af_dcd.adapters.mmseg.runner import without_sync_bn
from af_dcd.adapters.mmseg.shims import build_model, quiet
from af_dcd.adapters.mmseg.teacher import without_downloads
from effml_common.report import Row


def describe(whole: Config) -> dict[str, Any]:
    """Facts about a composed config; see ``inspect``."""
    model = build_model(without_downloads(whole.model))
    config, size = model.distill, crop_of(whole, model)
    student, teacher = model.tapped_shapes["student"], model.tapped_shapes["teacher"]
    facts: dict[str, Any] = {
        "crop": list(size),
        "student tap": _tap(model.taps[0]), "student map": list(student[1:]),
        "teacher tap": _tap(model.taps[1]), "teacher map": list(teacher[1:]),
        "score map": list(model.tapped_shapes["scores"][1:]),
    }  # fmt: skip
    for name in ("lambda_kd", "lambda_fd", "lambda_ctr", "fd_reduction", "mask", "contrast"):
        facts[name] = getattr(config, name)
    if config.fd_reduction == "sum":
        c, h, w = teacher[1:]
        facts["lambda_fd on the mean error"] = round(config.lambda_fd * c * h * w, 3)
    facts["GMAC a crop: student forward"] = gmac(model, size)
    facts["GMAC a crop: teacher forward"] = gmac(model.teacher.model, size)
    branch = _branch_gmac(model)
    facts["GMAC a crop: branch forward"] = branch
    student_cost = facts["GMAC a crop: student forward"]
    teacher_cost = facts["GMAC a crop: teacher forward"]
    kd = 3 * student_cost + teacher_cost
    facts["GMAC a crop: step (backward counted as two forwards)"] = round(kd + 3 * branch, 1)
    facts["step against a step of logits KD"] = round((kd + 3 * branch) / kd, 2)
    facts["weights of the student"] = _count(model) - _count(getattr(model, "afdcd", None))
    facts["weights of the branch (dropped at the end)"] = _count(getattr(model, "afdcd", None))
    facts["bytes of the branch with gradient and momentum"] = 12 * _count(
        getattr(model, "afdcd", None)
    )
    facts["bytes of pairwise differences a crop: naive"] = _pairs(model, naive=True)
    facts["bytes of pairwise differences: chunked"] = _pairs(model, naive=False)
    return facts


def crop_of(whole: Config, model: Any) -> tuple[int, int]:
    """Size of a training crop."""
    size = whole.model.get("distill", {}).get("size") or model.data_preprocessor.size
    height, width = size or (512, 512)
    return int(height), int(width)


def gmac(model: nn.Module, size: tuple[int, int]) -> float:
    """Giga multiply-accumulates of one image up to the class scores."""
    ghost = ghost_of(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), quiet():
        forward(ghost, torch.zeros(1, 3, *size, device="meta"))
    return round(counter.get_total_flops() / 2e9, 2)


def _branch_gmac(model: Any) -> float:
    if not hasattr(model, "afdcd"):
        return 0.0
    shape = model.tapped_shapes["student"]
    ghost = copy.deepcopy(model.afdcd.generation).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ghost(torch.zeros(1, *shape[1:], device="meta"))
    return round(counter.get_total_flops() / 2e9, 2)


def _pairs(model: Any, *, naive: bool) -> int:
    """Bytes of the [patches, k, k, d] differences in float32, whole or in one block."""
    from af_dcd.method.contrast import BUDGET, as_patches

    config = model.distill
    if config.lambda_ctr == 0:
        return 0
    form = config.contrast_settings()
    cut = [form[name] for name in ("groups", "patch", "pool", "crop_to_fit")]
    probe = torch.zeros(1, *model.tapped_shapes["teacher"][1:], device="meta")
    q, k, d = as_patches(probe, *cut).shape
    whole = 4 * q * k * k * d
    return whole if naive else min(whole, BUDGET)


def _count(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def _tap(tap: Any) -> str:
    return ":".join(part for part in (tap.kind, tap.path, tap.entry) if part)


def dry_run(whole: Config, device: torch.device) -> list[Row]:
    """One batch of noise through both models: the size of every weighted term, a row each."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    if device.type != "cuda":  # SyncBatchNorm runs on CUDA alone
        without_sync_bn(whole.model)
    model = build_model(whole.model).to(device)
    size = crop_of(whole, model)
    samples = []
    classes = model.decode_head.num_classes if hasattr(model.decode_head, "num_classes") else 2
    for _ in range(2):
        labels = torch.randint(classes, (1, *size), device=device)
        sample = SegDataSample(gt_sem_seg=PixelData(data=labels))
        samples.append(sample)
    images = torch.randn(2, 3, *size, device=device)
    _, logged = model.train().parse_losses(model.loss(images, samples))
    return [
        Row(name, "one batch of noise", {"value": [float(torch.as_tensor(value).detach())]})
        for name, value in logged.items()
    ]
