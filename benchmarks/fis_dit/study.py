"""Quality at equal FLOPs: dense, fewer steps, static and random anchors, skipped blocks, FIS, caches.

Run from the workspace root (half an hour on two cores; stopped runs continue where they were):

    uv run python -m benchmarks.fis_dit.study
    uv run python -m benchmarks.fis_dit.study --data digits --seeds 21 22 23

Shapes with seeds 1 to 3 are the development data, on which variants are chosen; digits with seeds 11 to
13 confirm them. Blocks, skipped or left dense, are chosen on other noise. Speed is ``fis-dit bench``'s
matter.
"""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from effml_common.cli import parse
from effml_common.errors import InputError
from effml_common.files import atomic_write
from effml_common.logging import progress, warn
from effml_common.report import resolve
from effml_common.settings import setting
from fis_dit.adapters.apply import apply_fis
from fis_dit.commands.plan import block_scores
from fis_dit.config import PRESETS, FISConfig
from fis_dit.demo.arms import (
    Arm,
    cache_arms,
    dropped_step,
    fis,
    magnitude_ratios,
    run_arm,
    skipped_blocks,
)
from fis_dit.demo.models import STUDENT_STEPS, euler, load, noise_levels
from fis_dit.demo.report import Judge, make_noise, plot_quality
from fis_dit.method.metrics import relative_l2
from fis_dit.method.neighbours import find_neighbours, make_frame_index

CALIBRATION_SEED = 500
TEACHER_STEPS = 16
DEVELOPMENT, CONFIRMATION = ("shapes", (1, 2, 3)), ("digits", (11, 12, 13))


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Measure every arm on every seed; cells that are in the output file are not run again."""

    data: tuple[str, ...] = setting(("shapes", "digits"), "data sets")
    seeds: tuple[int, ...] = setting((), "seeds; default 1 2 3 for shapes and 11 12 13 for digits")
    arms: tuple[str, ...] = setting((), "names of arms to run beside dense; default all")
    clips: int = setting(16, "clips per seed")
    out: str = setting("benchmarks/fis_dit/results/study.json", "file to write and to continue")


def scored(model: Any, data: str) -> dict[str, list[float]]:
    """Scores of all blocks on calibration noise: sparse alone (two ways), and skipped alone."""
    noise, prompt = make_noise(data, 16, CALIBRATION_SEED)

    @torch.no_grad()
    def run() -> torch.Tensor:
        return list(euler(model, noise, prompt, noise_levels(4)))[-1][1]

    dense, skipped = run(), []
    for block in range(len(model.blocks)):
        with skipped_blocks([block]).change(model):
            skipped.append(relative_l2(run(), dense))
    local, endpoint = (block_scores(model, run, FISConfig(), m)[0] for m in ("local", "endpoint"))
    return {"local": local, "endpoint": endpoint, "skip": skipped}


def lowest(scores: Sequence[float], count: int) -> tuple[int, ...]:
    return tuple(sorted(sorted(range(len(scores)), key=lambda block: scores[block])[:count]))


def farthest_frames(
    frames: torch.Tensor, count: int, age: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Both ends, then again and again the frame that its neighbours predict worst.

    Args:
        frames: Hidden states "b f n"; one choice for the batch.
        count: Frames to choose.
        age: Sparse blocks since each frame was computed; its error counts 1 + age times.
    """
    total = frames.shape[1]
    chosen = [0, total - 1]
    while len(chosen) < count:
        plan = find_neighbours(total, tuple(sorted(chosen)))
        kept = frames[:, list(plan.anchors)]
        weight = torch.tensor(plan.weight)[:, None]
        guess = torch.lerp(kept[:, list(plan.left)], kept[:, list(plan.right)], weight)
        error = (frames[:, list(plan.skipped)] - guess).square().mean(dim=(0, 2))
        if age is not None:
            error = error * torch.tensor([1.0 + age[f] for f in plan.skipped])
        chosen.append(plan.skipped[int(error.argmax())])
    return tuple(sorted(chosen))


def content_arm(name: str, *, aged: bool, **settings: Any) -> Arm:
    """FIS whose anchors follow the clip: chosen anew at every sparse block, from its input."""
    config = FISConfig(num_inference_steps=STUDENT_STEPS, equalize=True, **settings)

    @contextlib.contextmanager
    def change(model: Any) -> Iterator[None]:
        with apply_fis(model, config) as handle, contextlib.ExitStack() as hooks:
            geometry: Any = handle._attached[0].geometry
            age: list[int] = []

            def choose(sparse: Any, hidden: torch.Tensor) -> None:
                frames = sparse.plan.frames.shape[0]
                if not age:
                    age.extend([0] * frames)
                count = sparse.plan.anchors.shape[0]
                split = hidden.unflatten(1, (frames, -1)).flatten(2)
                chosen = farthest_frames(split, count, age if aged else None)
                age[:] = [0 if f in chosen else age[f] + 1 for f in range(frames)]
                sparse.plan = make_frame_index(find_neighbours(frames, chosen), hidden.device)

            for sparse in geometry._sparse:
                hook = model.blocks[sparse.number].register_forward_pre_hook(
                    lambda _, args, sparse=sparse: choose(sparse, args[0])
                )
                hooks.callback(hook.remove)
            yield

    return Arm(name, "content-aware anchors", change)


def fis_arms(scores: dict[str, list[float]]) -> list[Arm]:
    """The method: presets, lifts, sites, keys, strides, dense parts and ways to choose blocks."""
    planned, local = lowest(scores["endpoint"], 6), lowest(scores["local"], 6)
    # The preset "quality" is "n=2, shift".
    arms = [fis(f"preset {name}", **PRESETS[name]) for name in ("paper-like", "safe")]
    arms += [
        fis("n=2, hold", lift="hold"),
        fis("n=2, carry", lift="carry"),
        fis("n=2, state", lift="state"),
        fis("n=2, no dense blocks", dense_head=0, dense_tail=0),
        fis("n=2, head 2", dense_head=2),
        fis("n=2, tail 2", dense_tail=2),
        fis("n=3", stride=3),
        fis("n=4", stride=4),
        fis("n=2, shift", step_shift=1),
        fis("n=2, attn", sites="attn"),
        fis("n=2, attn, shift", sites="attn", step_shift=1),
        fis("n=3, attn", stride=3, sites="attn"),
        fis("n=3, attn, shift", stride=3, sites="attn", step_shift=1),
        fis("n=2, full keys", kv="full"),
        fis("n=2, full keys, shift", kv="full", step_shift=1),
        fis("n=2, attn, full keys", kv="full", sites="attn"),
        fis("n=3, full keys", kv="full", stride=3),
        fis("n=2, no boundaries", boundaries=False),
        fis("n=2, dense last step", dense_steps=(-1,)),
        fis("n=2, dense first step", dense_steps=(0,)),
        fis("n=2, planned blocks", blocks=planned),
        fis("n=2, locally planned blocks", blocks=local),
        fis("n=2, planned blocks, shift", blocks=planned, step_shift=1),
        fis("n=2, planned blocks, full keys", blocks=planned, kv="full"),
        fis("n=2, planned blocks, full keys, shift", blocks=planned, kv="full", step_shift=1),
        fis("n=3, planned blocks, full keys", blocks=planned, kv="full", stride=3),
    ]
    patterns = [
        fis("same count: interleaved", "FIS", equalize=True),
        fis("same count: static", "static subset", equalize=True, pattern="static"),
        fis("same count: random", "random anchors", equalize=True, pattern="random"),
        content_arm("same count: by content", aged=False),
        content_arm("same count: by content and age", aged=True),
    ]
    return arms + patterns


def all_arms(model: Any, data: str, scores: dict[str, list[float]]) -> list[Arm]:
    noise, prompt = make_noise(data, 16, CALIBRATION_SEED)
    return [
        Arm("dense", "dense"),
        Arm("3 steps", "fewer steps", levels=noise_levels(3)),
        Arm("2 steps", "fewer steps", levels=noise_levels(2)),
        *(dropped_step(position) for position in (1, 2, 3)),
        *(skipped_blocks(lowest(scores["skip"], count)) for count in (2, 3)),
        *fis_arms(scores),
        *cache_arms(magnitude_ratios(model, noise, prompt)),
    ]


def teacher_arms() -> list[Arm]:
    """The undistilled model at 16 steps: fewer steps against FIS."""
    levels = noise_levels(TEACHER_STEPS)
    dense = [Arm("dense", "dense", levels=levels)]
    fewer = [Arm(f"{n} steps", "fewer steps", levels=noise_levels(n)) for n in (12, 10, 8)]
    ours = fis("preset paper-like")
    return [*dense, *fewer, Arm(ours.name, "FIS", ours.change, levels)]


def study(config: StudyConfig) -> dict[str, Any]:
    """Run what is missing and write the file after every cell."""
    torch.set_num_threads(1)
    out = Path(config.out)
    done: dict[str, Any] = {"command": sys.argv[1:], "scores": {}, "cells": {}}
    if out.is_file():
        done = {**done, **json.loads(out.read_text())}
    for data in config.data:
        default = CONFIRMATION[1] if data == CONFIRMATION[0] else DEVELOPMENT[1]
        for kind in ("student", "teacher"):
            model: Any = load(data, kind)
            if kind == "student" and data not in done["scores"]:
                done["scores"][data] = scored(model, data)
            arms = (
                all_arms(model, data, done["scores"][data]) if kind == "student" else teacher_arms()
            )
            for seed in config.seeds or default:
                fill(done, out, config, f"{data}/{kind}/{seed}", model, arms, data, seed)
    return done


def fill(
    done: dict[str, Any],
    out: Path,
    config: StudyConfig,
    key: str,
    model: Any,
    arms: Sequence[Arm],
    data: str,
    seed: int,
) -> None:
    """Measure the arms of one seed that are not there yet."""
    cells = done["cells"].setdefault(key, {})
    wanted = config.arms or [arm.name for arm in arms]
    missing = [a for a in arms if a.name not in cells and a.name in ("dense", *wanted)]
    if not missing:
        return
    judge, (noise, prompt) = Judge(data), make_noise(data, config.clips, seed)
    dense = run_arm(model, arms[0], noise, prompt, batch=config.clips)
    with progress(key, len(missing)) as bar:
        for arm in missing:
            run = (
                dense
                if arm.group == "dense"
                else run_arm(model, arm, noise, prompt, batch=config.clips)
            )
            cells[arm.name] = {"group": arm.group, **judge(run, dense)}
            atomic_write(out, json.dumps(done, indent=1) + "\n")
            bar.advance()


def collected(done: dict[str, Any], data: str, kind: str) -> dict[str, tuple[str, list[Any]]]:
    """Per arm its group and one entry per seed."""
    found: dict[str, tuple[str, list[Any]]] = {}
    for key, cells in sorted(done["cells"].items()):
        if key.startswith(f"{data}/{kind}/"):
            for name, cell in cells.items():
                values = {k: v for k, v in cell.items() if k != "group"}
                found.setdefault(name, (cell["group"], []))[1].append(values)
    seeds = max((len(runs) for _, runs in found.values()), default=0)
    return {name: arm for name, arm in found.items() if len(arm[1]) == seeds}


CLAIMS = (
    (
        "interleaved above static by 1 dB, same count",
        "same count: interleaved",
        "same count: static",
        1,
    ),
    ("interleaved above random, same count", "same count: interleaved", "same count: random", 0),
    (
        "by content above interleaved, same count",
        "same count: by content",
        "same count: interleaved",
        0,
    ),
    (
        "by content and age above interleaved, same count",
        "same count: by content and age",
        "same count: interleaved",
        0,
    ),
    ("residual above hold", "preset paper-like", "n=2, hold", 0),
    ("hold above carry", "n=2, hold", "n=2, carry", 0),
    ("carry above state", "n=2, carry", "n=2, state", 0),
    ("n=2 above n=3", "preset paper-like", "n=3", 0),
    ("n=3 above n=4", "n=3", "n=4", 0),
    ("one dense block at each end above none", "preset paper-like", "n=2, no dense blocks", 0),
    ("planned blocks above head and tail", "n=2, planned blocks", "preset paper-like", 0),
    ("step shift above none", "n=2, shift", "preset paper-like", 0),
    ("full keys above anchor keys", "n=2, full keys", "preset paper-like", 0),
)


def claims(found: dict[str, tuple[str, list[Any]]]) -> list[dict[str, Any]]:
    """Paired gaps in PSNR; block skipping at equal FLOPs is the 3 blocks it skips."""
    skip = next(
        name
        for name, (group, _) in found.items()
        if group == "block skipping" and name.count(" ") == 4
    )
    told = []
    for text, one, other, margin in (
        *CLAIMS,
        ("FIS above block skipping, same FLOPs", "preset paper-like", skip, 0),
    ):
        if one not in found or other not in found:
            continue
        pairs = zip(found[one][1], found[other][1], strict=True)
        value, stderr, holds = resolve([a["psnr"] - b["psnr"] - margin for a, b in pairs])
        told.append({"text": text, "gap": value, "stderr": stderr, "holds": holds})
    return told


def show(done: dict[str, Any], out: Path) -> None:
    """Print tables and claims; draw the plots."""
    console = Console(width=140)
    for data in done["scores"]:
        for kind in ("student", "teacher"):
            found = collected(done, data, kind)
            if not found:
                continue
            table = Table(title=f"{data}, {kind}")
            metrics = list(found["dense"][1][0])
            for column in ("arm", *metrics):
                table.add_column(column)
            for name, (_, runs) in found.items():
                means = (sum(run[m] for run in runs) / len(runs) for m in metrics)
                table.add_row(name, *(f"{mean:.3f}" for mean in means))
            console.print(table)
        found = collected(done, data, "student")
        done.setdefault("claims", {})[data] = claims(found)
        for claim in done["claims"][data]:
            console.print(f"{data}: {claim['holds']}: {claim['text']} ({claim['gap']:+.2f} dB)")
        points = {name: arm for name, arm in found.items() if name != "dense"}
        plot_quality(out.with_name(f"{data}.png"), points)
    atomic_write(out, json.dumps(done, indent=1) + "\n")


def main() -> int:
    """Parse the flags, run, print; 2 on bad input."""
    try:
        config = parse(StudyConfig, sys.argv[1:], prog="python -m benchmarks.fis_dit.study")
        show(study(config), Path(config.out))
    except InputError as error:
        warn(str(error))
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
