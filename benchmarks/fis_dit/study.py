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

from benchmarks.script import run_script
from effml_common.files import atomic_write
from effml_common.logging import Progress
from effml_common.parsing import setting
from effml_common.report import resolve
from fis_dit.adapters.apply import apply_fis
from fis_dit.adapters.block_scores import score_blocks
from fis_dit.config import PRESETS, FISConfig
from fis_dit.demo.arms import (
    Arm,
    Judge,
    make_cache_arms,
    make_dropped_step_arm,
    make_fis_arm,
    make_skipped_blocks_arm,
    measure_magnitude_ratios,
    run_arm,
)
from fis_dit.demo.data import draw_noise
from fis_dit.demo.models import STUDENT_STEPS, denoise, load_model, noise_levels
from fis_dit.demo.report import plot_quality
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


def score_all_blocks(model: Any, data: str) -> dict[str, list[float]]:
    """Score all blocks on calibration noise: sparse alone (two ways), and skipped alone."""
    noise, prompt = draw_noise(data, 16, CALIBRATION_SEED)

    @torch.no_grad()
    def run() -> torch.Tensor:
        return list(denoise(model, noise, prompt, noise_levels(4)))[-1][1]

    # A skipped block costs what the output changes by.
    dense, skipped = run(), []
    for block in range(len(model.blocks)):
        with make_skipped_blocks_arm([block]).change(model):
            skipped.append(relative_l2(run(), dense))

    # A sparse block, by its own error and by that of the output.
    local = score_blocks(model, run, FISConfig(), "local").scores
    endpoint = score_blocks(model, run, FISConfig(), "endpoint").scores
    return {"local": list(local), "endpoint": list(endpoint), "skip": skipped}


def choose_lowest(scores: Sequence[float], count: int) -> tuple[int, ...]:
    """Choose the blocks of lowest score, ascending."""
    return tuple(sorted(sorted(range(len(scores)), key=lambda block: scores[block])[:count]))


def choose_farthest_frames(
    frames: torch.Tensor, count: int, age: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Choose both ends, then again and again the frame that its neighbours predict worst.

    Args:
        frames: Hidden states "b f n"; one choice for the batch.
        count: Frames to choose.
        age: Sparse blocks since each frame was computed; its error counts 1 + age times.
    """
    total = frames.shape[1]
    chosen = [0, total - 1]
    while len(chosen) < count:
        # What the frames that are not chosen would be filled with.
        neighbours = find_neighbours(total, tuple(sorted(chosen)))
        anchors = frames[:, list(neighbours.anchors)]
        weight = torch.tensor(neighbours.weight)[:, None]
        left, right = anchors[:, list(neighbours.left)], anchors[:, list(neighbours.right)]
        guess = torch.lerp(left, right, weight)

        # The worst of them is chosen next.
        error = (frames[:, list(neighbours.skipped)] - guess).square().mean(dim=(0, 2))
        if age is not None:
            error = error * torch.tensor([1.0 + age[f] for f in neighbours.skipped])
        chosen.append(neighbours.skipped[int(error.argmax())])
    return tuple(sorted(chosen))


def make_content_arm(name: str, *, aged: bool, **settings: Any) -> Arm:
    """Make an arm whose anchors follow the clip: chosen at every sparse block, from its input."""
    config = FISConfig(num_inference_steps=STUDENT_STEPS, equalize=True, **settings)

    @contextlib.contextmanager
    def change(model: Any) -> Iterator[None]:
        with apply_fis(model, config) as handle, contextlib.ExitStack() as hooks:
            geometry: Any = handle._attachments[0].geometry
            age: list[int] = []

            def choose(sparse: Any, hidden: torch.Tensor) -> None:
                frames = sparse.frame_index.frames.shape[0]
                if not age:
                    age.extend([0] * frames)
                count = sparse.frame_index.anchors.shape[0]
                split = hidden.unflatten(1, (frames, -1)).flatten(2)
                chosen = choose_farthest_frames(split, count, age if aged else None)
                age[:] = [0 if f in chosen else age[f] + 1 for f in range(frames)]
                sparse.frame_index = make_frame_index(
                    find_neighbours(frames, chosen), hidden.device
                )

            for sparse in geometry.sparse_hooks:
                hook = model.blocks[sparse.number].register_forward_pre_hook(
                    lambda _, args, sparse=sparse: choose(sparse, args[0])
                )
                hooks.callback(hook.remove)
            yield

    return Arm(name, "content-aware anchors", change)


def make_fis_arms(scores: dict[str, list[float]]) -> list[Arm]:
    """The method: presets, lifts, sites, keys, strides, dense parts and ways to choose blocks."""
    planned, local = choose_lowest(scores["endpoint"], 6), choose_lowest(scores["local"], 6)
    # The preset "quality" is "n=2, shift".
    arms = [make_fis_arm(f"preset {name}", **PRESETS[name]) for name in ("paper-like", "safe")]
    arms += [
        make_fis_arm("n=2, hold", lift="hold"),
        make_fis_arm("n=2, carry", lift="carry"),
        make_fis_arm("n=2, state", lift="state"),
        make_fis_arm("n=2, no dense blocks", dense_head=0, dense_tail=0),
        make_fis_arm("n=2, head 2", dense_head=2),
        make_fis_arm("n=2, tail 2", dense_tail=2),
        make_fis_arm("n=3", stride=3),
        make_fis_arm("n=4", stride=4),
        make_fis_arm("n=2, shift", step_shift=1),
        make_fis_arm("n=2, attn", sites="attn"),
        make_fis_arm("n=2, attn, shift", sites="attn", step_shift=1),
        make_fis_arm("n=3, attn", stride=3, sites="attn"),
        make_fis_arm("n=3, attn, shift", stride=3, sites="attn", step_shift=1),
        make_fis_arm("n=2, full keys", kv="full"),
        make_fis_arm("n=2, full keys, shift", kv="full", step_shift=1),
        make_fis_arm("n=2, attn, full keys", kv="full", sites="attn"),
        make_fis_arm("n=3, full keys", kv="full", stride=3),
        make_fis_arm("n=2, no boundaries", boundaries=False),
        make_fis_arm("n=2, dense last step", dense_steps=(-1,)),
        make_fis_arm("n=2, dense first step", dense_steps=(0,)),
        make_fis_arm("n=2, planned blocks", blocks=planned),
        make_fis_arm("n=2, locally planned blocks", blocks=local),
        make_fis_arm("n=2, planned blocks, shift", blocks=planned, step_shift=1),
        make_fis_arm("n=2, planned blocks, full keys", blocks=planned, kv="full"),
        make_fis_arm(
            "n=2, planned blocks, full keys, shift", blocks=planned, kv="full", step_shift=1
        ),
        make_fis_arm("n=3, planned blocks, full keys", blocks=planned, kv="full", stride=3),
    ]
    patterns = [
        make_fis_arm("same count: interleaved", "FIS", equalize=True),
        make_fis_arm("same count: static", "static subset", equalize=True, pattern="static"),
        make_fis_arm("same count: random", "random anchors", equalize=True, pattern="random"),
        make_content_arm("same count: by content", aged=False),
        make_content_arm("same count: by content and age", aged=True),
    ]
    return arms + patterns


def make_all_arms(model: Any, data: str, scores: dict[str, list[float]]) -> list[Arm]:
    noise, prompt = draw_noise(data, 16, CALIBRATION_SEED)
    return [
        Arm("dense", "dense"),
        Arm("3 steps", "fewer steps", levels=noise_levels(3)),
        Arm("2 steps", "fewer steps", levels=noise_levels(2)),
        *(make_dropped_step_arm(position) for position in (1, 2, 3)),
        *(make_skipped_blocks_arm(choose_lowest(scores["skip"], count)) for count in (2, 3)),
        *make_fis_arms(scores),
        *make_cache_arms(measure_magnitude_ratios(model, noise, prompt)),
    ]


def make_teacher_arms() -> list[Arm]:
    """The undistilled model at 16 steps: fewer steps against FIS."""
    levels = noise_levels(TEACHER_STEPS)
    dense = [Arm("dense", "dense", levels=levels)]
    fewer = [Arm(f"{n} steps", "fewer steps", levels=noise_levels(n)) for n in (12, 10, 8)]
    ours = make_fis_arm("preset paper-like")
    return [*dense, *fewer, Arm(ours.name, "FIS", ours.change, levels)]


def study(config: StudyConfig) -> dict[str, Any]:
    """Run what is missing and write the file after every cell."""
    # What an earlier run measured stays.
    torch.set_num_threads(1)
    out = Path(config.out)
    record: dict[str, Any] = {"command": sys.argv[1:], "scores": {}, "cells": {}}
    if out.is_file():
        record = {**record, **json.loads(out.read_text())}

    # Every data set, model and seed.
    for data in config.data:
        default = CONFIRMATION[1] if data == CONFIRMATION[0] else DEVELOPMENT[1]
        for kind in ("student", "teacher"):
            model: Any = load_model(data, kind)
            if kind == "student" and data not in record["scores"]:
                record["scores"][data] = score_all_blocks(model, data)
            arms = make_teacher_arms()
            if kind == "student":
                arms = make_all_arms(model, data, record["scores"][data])
            for seed in config.seeds or default:
                measure_missing(
                    record, out, config, f"{data}/{kind}/{seed}", model, arms, data, seed
                )
    return record


def measure_missing(
    record: dict[str, Any],
    out: Path,
    config: StudyConfig,
    key: str,
    model: Any,
    arms: Sequence[Arm],
    data: str,
    seed: int,
) -> None:
    """Measure the arms of one seed that are not there yet."""
    # What is asked for and not there.
    cells = record["cells"].setdefault(key, {})
    wanted = config.arms or [arm.name for arm in arms]
    missing = [a for a in arms if a.name not in cells and a.name in ("dense", *wanted)]
    if not missing:
        return

    # All arms start from the same noise.
    judge, (noise, prompt) = Judge(data), draw_noise(data, config.clips, seed)
    dense = run_arm(model, arms[0], noise, prompt, batch=config.clips)
    with Progress(key, len(missing)) as bar:
        for arm in missing:
            run = (
                dense
                if arm.group == "dense"
                else run_arm(model, arm, noise, prompt, batch=config.clips)
            )
            cells[arm.name] = {"group": arm.group, **judge(run, dense)}
            atomic_write(out, json.dumps(record, indent=1) + "\n")
            bar.advance()


def collect_arms(record: dict[str, Any], data: str, kind: str) -> dict[str, tuple[str, list[Any]]]:
    """Collect for each arm its group and one entry per seed."""
    arms: dict[str, tuple[str, list[Any]]] = {}
    for key, cells in sorted(record["cells"].items()):
        if key.startswith(f"{data}/{kind}/"):
            for name, cell in cells.items():
                values = {k: v for k, v in cell.items() if k != "group"}
                arms.setdefault(name, (cell["group"], []))[1].append(values)
    seeds = max((len(runs) for _, runs in arms.values()), default=0)
    return {name: arm for name, arm in arms.items() if len(arm[1]) == seeds}


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


def judge_claims(arms: dict[str, tuple[str, list[Any]]]) -> list[dict[str, Any]]:
    """Judge paired gaps in PSNR; block skipping at equal FLOPs is the 3 blocks it skips."""
    # The last claim is about the arm that skips three blocks.
    skip = next(
        name
        for name, (group, _) in arms.items()
        if group == "block skipping" and name.count(" ") == 4
    )
    all_claims = (*CLAIMS, ("FIS above block skipping, same FLOPs", "preset paper-like", skip, 0))

    # Claims about arms that were not run are left out.
    judged = []
    for text, better, worse, margin in all_claims:
        if better not in arms or worse not in arms:
            continue
        pairs = zip(arms[better][1], arms[worse][1], strict=True)
        value, stderr, holds = resolve([a["psnr"] - b["psnr"] - margin for a, b in pairs])
        judged.append({"text": text, "gap": value, "stderr": stderr, "holds": holds})
    return judged


def show(record: dict[str, Any], out: Path) -> None:
    """Print tables and claims; draw the plots."""
    console = Console(width=140)
    for data in record["scores"]:
        # A table for each model.
        for kind in ("student", "teacher"):
            arms = collect_arms(record, data, kind)
            if not arms:
                continue
            table = Table(title=f"{data}, {kind}")
            metrics = list(arms["dense"][1][0])
            for column in ("arm", *metrics):
                table.add_column(column)
            for name, (_, runs) in arms.items():
                means = (sum(run[m] for run in runs) / len(runs) for m in metrics)
                table.add_row(name, *(f"{mean:.3f}" for mean in means))
            console.print(table)

        # Claims and a plot for the distilled one.
        arms = collect_arms(record, data, "student")
        record.setdefault("claims", {})[data] = judge_claims(arms)
        for claim in record["claims"][data]:
            console.print(f"{data}: {claim['holds']}: {claim['text']} ({claim['gap']:+.2f} dB)")
        points = {name: arm for name, arm in arms.items() if name != "dense"}
        plot_quality(out.with_name(f"{data}.png"), points)
    atomic_write(out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(
        run_script(
            StudyConfig,
            "python -m benchmarks.fis_dit.study",
            lambda config: show(study(config), Path(config.out)),
        )
    )
