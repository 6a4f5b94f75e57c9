"""What the commands do, one public function each."""

import json
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from com_pt.adapters.files import build_like, compare, load_any, save_any
from com_pt.adapters.grow import grow, layout_of
from com_pt.chain import ChainConfig, chain_of, load_chain
from com_pt.config import (
    CostConfig,
    EvalConfig,
    GrowConfig,
    IndividualConfig,
    InspectConfig,
    PlanConfig,
    TrainConfig,
)
from com_pt.cost import ChainCost, StageCost
from com_pt.evaluate import encoded_images, evaluate_retrieval, linear_probe, perplexity
from com_pt.run import FROZEN, LEDGER, Member, plan_chain, run_chain
from com_pt.tasks.base import task_class
from com_pt.tasks.causal_lm import CausalLMTask
from com_pt.tasks.classify import ClassifyTask
from com_pt.tasks.clip import ClipTask
from effml_common.device import device_name, resolve_device
from effml_common.errors import ConfigError, InputError
from effml_common.files import atomic_write
from effml_common.logging import say
from effml_common.report import Report, Row, environment, write_report

DETAILS = ("R@5", "R@10", "rank")  # of retrieval: in the ledger, too many for a table


@dataclass(frozen=True)
class Facts:
    """Named facts, as a table or as JSON; the note stands below the table."""

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
            table.add_row(name, _cell(value))
        return Group(table, self.note) if self.note else table


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(item)}" for name, item in value.items())[:300]
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)[:300]


def grow_model(config: GrowConfig) -> Facts:
    """Grow a model and save it.

    Raises:
        InputError: If a model cannot be loaded, or the two cannot be connected.
    """
    device = resolve_device(config.device)
    out = Path(config.out or time.strftime("runs/grow-%Y%m%d-%H%M%S"))
    if out.exists():
        raise ConfigError(f"{out} is there already; choose another --out")
    small = load_any(config.small, config.small_model)
    large, spec = build_like(small, config.large, config.seed)
    small.model.to(device)
    large.to(device)
    report = grow(
        small.model,
        large,
        config.mode,
        config.depth,
        resize_pos=config.resize_pos,
        strict=config.strict,
        seed=config.seed,
        allow_missing=config.allow_missing,
    )
    measured = {} if config.resize_pos else compare(small, large)
    save_any(large, small, spec, out)
    (out / "run").mkdir()
    atomic_write(out / "run" / "growth.json", json.dumps(report.to_json(), indent=1) + "\n")
    facts = {
        "grown": str(out),
        "mode": f"{report.mode}, depth {report.depth}",
        "inherited": round(report.inherited, 4),
        "copied parameters": len(report.copied),
        "fresh parameters": report.fresh,
        "left out of the small model": report.skipped,
        "layers": report.layers,
        "outputs on random inputs": measured,
    }
    return Facts(
        facts, "inherited: share of the large model's numbers that come from the small one"
    )


def plan(config: PlanConfig) -> ChainCost:
    """What a chain costs."""
    return plan_chain(load_chain(config.chain))


def cost(config: CostConfig) -> Facts:
    """What a run spent, stage by stage, beside the plan.

    Raises:
        InputError: If the folder holds no run.
    """
    run = Path(config.run) / "run"
    try:
        frozen = json.loads((run / FROZEN).read_text(encoding="utf-8"))
        lines = (run / LEDGER).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(
            f"{config.run} holds no finished stage; give the --out of train"
        ) from error
    frozen.pop("digest")
    planned = plan_chain(chain_of(frozen))
    facts: dict[str, Any] = {}
    for line, stage in zip(map(json.loads, lines), planned.stages, strict=False):
        facts[stage.name] = {
            "updates": line["steps"],
            "GMAC": line["macs"] / 1e9,
            "planned GMAC": line["samples"] * stage.per_sample / 1e9,
            "seconds": round(line["seconds"], 1),
            "GMAC a second": line["macs"] / 1e9 / max(line["seconds"], 1e-9),
        }
    facts["whole run"] = {
        "GMAC": sum(entry["GMAC"] for entry in facts.values()),
        "seconds": sum(entry["seconds"] for entry in facts.values()),
    }
    return Facts(facts, "GMAC a second falls where a frozen predecessor or small layers wait")


def train(config: TrainConfig) -> Report:
    """Train a chain."""
    device = resolve_device(config.device)
    return _train(config, with_overrides(load_chain(config.chain), config), "train", device)


def individual(config: IndividualConfig) -> Report:
    """Train one member alone."""
    device = resolve_device(config.device)
    chain = with_overrides(load_chain(config.chain), config).individual(config.member)
    return _train(config, chain, "individual", device)


def with_overrides(chain: ChainConfig, config: TrainConfig) -> ChainConfig:
    """The chain with what the command line replaces."""
    data = dict(chain.data)
    for name, value in (("train", config.train_data), ("val", config.val_data)):
        if value is not None:
            data[name] = value
    given = {
        name: value
        for name in ("precision", "accum_freq", "grad_checkpointing")
        if (value := getattr(config, name)) is not None
    }
    return replace(chain, data=data, **given)


def _train(config: TrainConfig, chain: ChainConfig, command: str, device: torch.device) -> Report:
    started = time.monotonic()
    out = Path(config.out or time.strftime(f"runs/{command}-%Y%m%d-%H%M%S"))
    task = task_class(chain.task)(chain.data)
    resume = config.resume == "auto"
    members = run_chain(chain, out, task=task, resume=resume, force=config.force, device=device)
    planned = plan_chain(chain, task)
    report = Report(
        package="com-pt",
        version=version("com-pt"),
        command=sys.argv,
        seeds=[chain.seed],
        seconds=time.monotonic() - started,
        rows=[_row(member, stage) for member, stage in zip(members, planned.stages, strict=True)],
        notes=[f"planned: every member alone costs {planned.ratio:.2f} times as much"],
        files=[member.name for member in members],
        environment=environment(
            ("open-clip-torch", "timm", "transformers", "accelerate"),
            device_name(device),
        ),
    )
    write_report(report, out / "run")
    say(f"members: {', '.join(str(out / member.name) for member in members)}")
    return report


def _row(member: Member, stage: StageCost) -> Row:
    numbers = {
        **{name: [v] for name, v in member.metrics.items() if not name.endswith(DETAILS)},
        "GMAC": [member.macs / 1e9],
        "seconds": [member.seconds],
    }
    return Row(member.name, f"{member.steps} updates, {stage.epochs:g} epochs", numbers)


def evaluate(config: EvalConfig) -> Facts:
    """Judge a model.

    Raises:
        InputError: If the model or its data do not fit the suite.
    """
    device = resolve_device(config.device)
    loaded = load_any(config.model)
    wanted = {"top1": "timm", "perplexity": "llama"}.get(config.suite, "clip")
    if loaded.library != wanted:
        raise InputError(f"{config.suite} is for {wanted}, and {config.model} is {loaded.library}; "
                         "choose another --suite")  # fmt: skip
    model = loaded.model.to(device).eval()
    with forward_autocast(device):
        return Facts(_judge(config, model, loaded.classes))


def forward_autocast(device: torch.device) -> Any:
    """bfloat16 for the forward passes of an evaluation on CUDA; elsewhere the model's own type."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def _judge(config: EvalConfig, model: Any, classes: int) -> dict[str, float]:
    if config.suite == "perplexity":
        tokenizer = "bytes" if config.tokenizer == "simple" else config.tokenizer
        settings = {"val": list(config.data), "length": config.length, "tokenizer": tokenizer}
        return perplexity(model, CausalLMTask(settings).blocks("val"))
    if config.suite == "top1":
        size = list(model.patch_embed.img_size)
        data = {"val": config.data[0], "images": config.images}
        return ClassifyTask({**data, "classes": classes, "image_size": size}).evaluate(model)
    return _judge_clip(config, model)


def _judge_clip(config: EvalConfig, model: Any) -> dict[str, float]:
    from com_pt.data.captions import CaptionData

    text = getattr(model, "text", model)
    data: dict[str, Any] = {
        "images": config.images,
        "tokenizer": config.tokenizer,
        "image_size": model.visual.image_size,
        "context_length": text.context_length,
    }
    if config.suite == "zero-shot":
        files = {"classes": config.classes, "templates": config.templates}
        task = ClipTask({**data, "zero_shot": {"images": config.data[0], **files}})
        return task.evaluate(model)
    held_out = CaptionData.open({**data, "val": list(config.data)}, "val", captions=None)
    images, texts = held_out.for_retrieval()
    if config.suite == "retrieval":
        return evaluate_retrieval(model, images, texts)
    fit = CaptionData.open({**data, "val": config.train}, "val", captions=None)
    names = sorted({line[0] for line in fit.texts + held_out.texts})
    labels = [
        torch.tensor([names.index(line[0]) for line in part.texts]) for part in (fit, held_out)
    ]
    seen = [encoded_images(model, part).cpu() for part in (fit.for_retrieval()[0], images)]
    return linear_probe(seen[0], labels[0], seen[1], labels[1])


def inspect(config: InspectConfig) -> Facts:
    """Describe a model without weights."""
    task: Any = (
        ClipTask({"captions": config.captions}) if config.family == "clip" else ClassifyTask({})
    )
    with torch.device("meta"):
        model = task.build(config.model)
    layout = layout_of(model)
    roles: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        words = " x ".join(axis.role for axis in layout.rule_of(name).axes) or "scalar"
        roles[words] = roles.get(words, 0) + parameter.numel()
    return Facts(
        {
            "family": layout.name,
            "parameters": sum(roles.values()),
            "forward GMAC": task.macs(config.model) / 1e9,
            "towers": {name or "model": vars(tower) for name, tower in layout.towers.items()},
            "fixed along a chain": {k: str(v) for k, v in layout.fixed.items()},
            "parameters by axes": roles,
        }
    )
