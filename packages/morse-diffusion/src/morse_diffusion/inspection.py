"""The ``inspect`` and ``plan`` commands: shapes, counts and schedules, without a weight."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effml_common.errors import InputError
from morse_diffusion.adapters.dot import DotShape, UNetDot
from morse_diffusion.adapters.files import read_config
from morse_diffusion.config import InspectConfig, PlanConfig
from morse_diffusion.lora import targets
from morse_diffusion.plan import MorsePlan, make_plan

PUBLISHED = {"Dash": 859.52e6, "Dot": 97.84e6}  # Table 2 of the paper, SD v1.4


@dataclass(frozen=True)
class Facts:
    """Named facts, as a table or as JSON."""

    facts: dict[str, Any]
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """The facts."""
        return self.facts

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table("", "", show_header=False)
        for name, value in self.facts.items():
            text = f"{value / 1e6:.2f}M" if name.startswith("weights") else str(value)
            table.add_row(name, text)
        return Group(table, self.note) if self.note else table


def inspect(config: InspectConfig) -> Facts:
    """Describe a Dot on disk, or count the published one."""
    if config.dot is not None:
        return Facts(read_config(config.dot))
    return Facts(
        count_published(),
        "The paper names neither the LoRA targets nor the form for convolutions; every Linear and "
        "Conv2d in loralib's form comes closest. This package stores PEFT's form.",
    )


def stable_diffusion_unet() -> nn.Module:
    """The UNet of Stable Diffusion 1.4, on the meta device."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=768,
            attention_head_dim=8,
            block_out_channels=(320, 640, 1280, 1280),
        )


def count_published() -> dict[str, Any]:
    """Weights of a rank-64 Dot of Stable Diffusion 1.4, in both forms, beside the paper's."""
    unet = stable_diffusion_unet()
    with torch.device("meta"):
        dot = UNetDot(unet, DotShape(m=2, channels=(96, 160), layers=1, lora_rank=64))
    every = dict(unet.named_children())
    counts = {"linear": 0, "conv, PEFT": 0, "conv, loralib": 0}
    for _, _, layer in targets(every):
        out, inputs = layer.weight.shape[:2]
        if isinstance(layer, nn.Linear):
            counts["linear"] += 64 * (out + inputs)
            continue
        area = layer.kernel_size[0] * layer.kernel_size[1]
        counts["conv, PEFT"] += 64 * (inputs * area + out)
        counts["conv, loralib"] += 64 * area * (inputs + out)
    extra = sum(p.numel() for n, p in dot.named_parameters() if not n.startswith("residuals."))
    base = {
        "weights of the Dash": sum(p.numel() for p in unet.parameters()),
        "weights of the Dash, paper": PUBLISHED["Dash"],
        "weights of the extra blocks": extra,
        **{f"weights of LoRA on {name}": n for name, n in counts.items()},
    }
    return {
        **base,
        "weights of the Dot, loralib form": extra + counts["linear"] + counts["conv, loralib"],
        "weights of the Dot, PEFT form": extra + counts["linear"] + counts["conv, PEFT"],
        "weights of the Dot, paper": PUBLISHED["Dot"],
        "weights of the Dot as built here": dot.own_parameters(),
    }


def plan(config: PlanConfig) -> Facts:
    """Print a plan for a budget.

    Raises:
        PlanError: If no plan meets it.
        InputError: If the profile cannot be read.
    """
    if config.budget_ms is not None:
        path = Path(config.profile or "")
        try:
            profile = json.loads(path.read_text(encoding="utf-8"))
            profile = {name: float(value) for name, value in profile.items()}
        except (ValueError, AttributeError, TypeError) as error:
            raise InputError(
                f"{path} is no profile ({error}); write t_dash, t_dot and t_sched as JSON numbers"
            ) from error
        chosen = MorsePlan.from_latency(config.budget_ms, profile, config.early)
    else:
        assert config.budget_lsd is not None
        assert config.n is not None
        chosen = make_plan(config.budget_lsd, config.n, config.r, early=config.early)
    return Facts(
        {
            "pattern": chosen.pattern,
            "steps": chosen.n_total,
            "Dash steps": chosen.dash_steps,
            "Dot steps": chosen.dot_steps,
            "LSD": round(chosen.lsd, 4),
            "k/n": round(chosen.share, 4),
            "r": round(chosen.expansion, 4),
            "N": chosen.speed_ratio,
            "dash_indices": list(chosen.dash_indices),
        }
    )
