"""The ``demo`` command: the distilled four-step models, dense, frame-sparse and with every rival.

Distances are to the dense model's clips of the same noise; ``frechet`` is to real clips, so that it does
not punish a clip for being another one. Costs are FLOPs counted by torch, relative to dense.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from effml_common.device import device_name, resolve_device
from effml_common.logging import RunLog, progress, say
from effml_common.report import Claim, Report, Row, environment, write_report
from fis_dit.config import PRESETS, DemoConfig
from fis_dit.demo.arms import (
    Arm,
    Run,
    cache_arms,
    dropped_step,
    fis,
    magnitude_ratios,
    run_arm,
    skipped_blocks,
)
from fis_dit.demo.data import CLIP_SETS, clips, text, to_pixels
from fis_dit.demo.models import load, noise_levels
from fis_dit.method.metrics import (
    coverage,
    flicker,
    frechet_distance,
    motion_error,
    psnr,
    relative_l2,
    slowest_quarter,
)

REFERENCE_CLIPS = 1024
SHOWN = 6
DEMO_CACHES = ("FirstBlockCache 0.2", "FirstBlockCache 0.3", "MagCache 0.3", "PAB every 2")
DEMO_CACHES += ("TaylorSeer order 1, every 2", "FasterCache")

Results = dict[str, list[dict[str, float]]]  # per arm, one entry per seed


def make_noise(name: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Starting noise "b 1 f h w" and prompts of random labels."""
    spec, generator = CLIP_SETS[name], torch.Generator().manual_seed(10_000 + seed)
    noise = torch.randn(count, 1, 13, spec.size, spec.size, generator=generator)
    labels = torch.randint(spec.classes, (count,), generator=generator)
    return noise, text(name, labels)


class Judge:
    """Real clips, and the metrics that need them.

    Args:
        name: Data set.
    """

    def __init__(self, name: str) -> None:
        self.scale = CLIP_SETS[name].std
        self.features: Any = load(name, "classifier").features
        self.real = clips(name, REFERENCE_CLIPS, seed=99)[0]
        self.reference = self.features(self.real).flatten(0, 1)

    def __call__(self, run: Run, dense: Run) -> dict[str, float]:
        """All metrics of one arm and seed; PSNR in pixel units with peak 1."""
        slow = slowest_quarter(dense.clips)
        values = self.features(run.clips).flatten(0, 1)
        return {
            **_distances(run, dense, self.scale),
            "psnr slow": _decibels(run.clips[slow], dense.clips[slow], self.scale),
            "frechet": frechet_distance(values, self.reference),
            "flicker": flicker(run.clips, self.real),
        }


def _decibels(clip: Tensor, dense: Tensor, scale: float) -> float:
    return min(99.0, psnr(clip * scale, dense * scale, 1.0))


def _distances(run: Run, dense: Run, scale: float) -> dict[str, float]:
    return {
        "cost": run.flops / dense.flops,
        "psnr": _decibels(run.clips, dense.clips, scale),
        "relative l2": relative_l2(run.clips, dense.clips),
        "velocity error": relative_l2(run.velocity, dense.velocity),
        "motion error": motion_error(run.clips, dense.clips),
        "worst / best frame": coverage(run.clips, dense.clips) if run is not dense else 1.0,
    }


def arms(ratios: Sequence[float]) -> list[Arm]:
    """The demo's arms; the study in ``benchmarks`` has more."""
    caches = [arm for arm in cache_arms(ratios) if arm.name in DEMO_CACHES]
    return [
        Arm("dense", "dense"),
        *(fis(f"FIS {name}", **settings) for name, settings in PRESETS.items()),
        fis("FIS static anchors", "static", pattern="static", equalize=True),
        fis("FIS interleaved, same count", "interleaved", equalize=True),
        Arm("3 steps", "fewer steps", levels=noise_levels(3)),
        Arm("2 steps", "fewer steps", levels=noise_levels(2)),
        dropped_step(3),
        skipped_blocks([6, 7]),
        skipped_blocks([2, 6, 7]),
        *caches,
    ]


def demo(config: DemoConfig) -> Report:
    """Make the same clips in every arm, and write tables, plot and animation.

    Returns:
        The report: a row per arm with one value per seed, and claims on paired gaps.
    """
    device, started, name = resolve_device(config.device), time.monotonic(), config.data
    if device.type == "cpu":
        say(f"estimate: {config.seeds * config.clips * 1.6 / 60 + 0.3:.1f} min, under 1 GiB")
    torch.set_num_threads(1)  # matrices this small gain nothing from a second thread
    student, judge = load(name, "student").to(device), Judge(name)
    noise, prompt = make_noise(name, 16, seed=0)
    chosen = arms(magnitude_ratios(student, noise, prompt))
    out = Path(config.out or time.strftime("runs/demo-%Y%m%d-%H%M%S"))
    seeds, results, shown = list(range(1, config.seeds + 1)), Results(), {}
    with RunLog(out / "run") as log, progress("arms", len(chosen) * len(seeds)) as bar:
        for seed in seeds:
            noise, prompt = make_noise(name, config.clips, seed)
            dense = run_arm(student, chosen[0], noise, prompt)
            for arm in chosen:
                run = dense if arm.group == "dense" else run_arm(student, arm, noise, prompt)
                found = judge(run, dense)
                results.setdefault(arm.name, []).append(found)
                shown.setdefault(arm.name, to_pixels(name, run.clips[:SHOWN, 0]))
                log.log(seed, {"arm": arm.name, **found})
                bar.advance()
    peer = best_peer(results, chosen)
    figures = _figures(out / "run", results, chosen, shown, peer)
    report = Report(
        package="fis-dit",
        version=version("fis-dit"),
        command=sys.argv,
        seeds=seeds,
        seconds=time.monotonic() - started,
        rows=_rows(results, chosen, name),
        claims=_claims(results, peer),
        notes=_notes(peer),
        files=sorted(path.name for path in (out / "run").glob("clips.*")),
        environment=environment(("diffusers",), device_name(device)),
    )
    write_report(report, out / "run", figures)
    say(f"report: {out / 'run' / 'report.html'}")
    return report


def best_peer(results: Results, chosen: Sequence[Arm]) -> str:
    """The rival nearest to real clips among those that cost no more than "3 steps" of 4."""
    rivals = [
        arm.name for arm in chosen if arm.group not in ("dense", "FIS", "interleaved", "static")
    ]
    cheap = [name for name in rivals if _mean(results[name], "cost") <= 0.77]
    return min(cheap, key=lambda name: _mean(results[name], "frechet"))


def _mean(runs: Sequence[Mapping[str, float]], metric: str) -> float:
    return sum(run[metric] for run in runs) / len(runs)


def _rows(results: Results, chosen: Sequence[Arm], data: str) -> list[Row]:
    setting = f"{data}; a seed varies noise and labels"
    return [
        Row(
            arm.name,
            setting,
            {key: [run[key] for run in results[arm.name]] for key in results["dense"][0]},
        )
        for arm in chosen
    ]


def _gaps(results: Results, better: str, worse: str, metric: str, sign: int) -> list[float]:
    pairs = zip(results[better], results[worse], strict=True)
    return [sign * (one[metric] - other[metric]) for one, other in pairs]


def _claims(results: Results, peer: str) -> list[Claim]:
    same, static, skip = "FIS interleaved, same count", "FIS static anchors", "skip blocks 2 6 7"
    paper = "FIS paper-like"
    texts = [
        (
            "static-frechet",
            "interleaved anchors are nearer to real clips than static",
            same,
            static,
        ),
        (
            "skipping-frechet",
            "FIS paper-like is nearer to real clips than block skipping",
            paper,
            skip,
        ),
        (
            "steps-frechet",
            "FIS paper-like is nearer to real clips than 3 of 4 steps",
            paper,
            "3 steps",
        ),
        ("peer-frechet", f"FIS paper-like is nearer to real clips than {peer}", paper, peer),
    ]
    claims = [Claim(i, t, _gaps(results, a, b, "frechet", -1)) for i, t, a, b in texts]
    rule = "interleaved anchors give a smaller velocity error than static, same count"
    gaps = _gaps(results, same, static, "velocity error", -1)
    claims.append(Claim("static-velocity", rule, gaps))
    told = "FIS paper-like has the higher PSNR to the dense clips than 3 of 4 steps"
    return [*claims, Claim("steps-psnr", told, _gaps(results, paper, "3 steps", "psnr", 1))]


def _notes(peer: str) -> list[str]:
    return [
        "cost: FLOPs of the transformer over the run, counted by torch, dense = 1",
        f"clips.gif and clips.png: rows dense, FIS paper-like, {peer} (the rival nearest to real clips)",
        "psnr is to the dense clips of the same noise ('slow': the quarter that moves least)",
        "frechet is to real clips; it hardly sees ghosts, which flicker (1: as real clips) does",
        "the models are tiny and their clips move fast: read the order of the arms",
    ]


def _figures(
    folder: Path,
    results: Results,
    chosen: Sequence[Arm],
    shown: Mapping[str, Tensor],
    peer: str,
) -> list[Path]:
    rows = [shown[name] for name in ("dense", "FIS paper-like", peer)]
    figures = [write_animation(folder, rows)]
    if find_spec("matplotlib") is None:
        say("no plot: install fis-dit[plot]")
        return figures
    points = {arm.name: (arm.group, results[arm.name]) for arm in chosen if arm.group != "dense"}
    return [plot_quality(folder / "quality.png", points), *figures]


def write_animation(folder: Path, rows: Sequence[Tensor]) -> Path:
    """Rows of clips "n f h w" in [0, 1] as ``clips.gif`` and, for the report, an animated PNG."""
    frames = []
    for f in range(rows[0].shape[1]):
        lines = [np.concatenate([_tile(clip[f]) for clip in row], 1) for row in rows]
        frames.append(Image.fromarray(np.concatenate(lines, 0)))
    first, *rest = frames
    for suffix in ("gif", "png"):
        path = folder / f"clips.{suffix}"
        first.save(path, save_all=True, append_images=rest, duration=120, loop=0)
    return folder / "clips.png"


def _tile(frame: Tensor) -> np.ndarray:
    scale = 96 // frame.shape[0]
    image = (frame.numpy() * 255).round().astype(np.uint8)
    return np.pad(np.kron(image, np.ones((scale, scale), np.uint8)), 2, constant_values=90)


def plot_quality(
    path: Path, points: Mapping[str, tuple[str, Sequence[Mapping[str, float]]]]
) -> Path:
    """Quality against cost, one marker per arm and a colour per group."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, 2)
    groups = list(dict.fromkeys(group for group, _ in points.values()))
    for metric, panel in zip(("psnr", "frechet"), panels, strict=True):
        for number, group in enumerate(groups):
            runs = [r for g, r in points.values() if g == group]
            cost, value = ([_mean(r, key) for r in runs] for key in ("cost", metric))
            marker = "*" if group == "FIS" else "osv^DPX<>"[number % 9]
            size = 130 if group == "FIS" else 45
            panel.scatter(cost, value, s=size, marker=marker, color=f"C{number % 10}", label=group)
        panel.set(xlabel="FLOPs, dense = 1")
    panels[0].set(ylabel="PSNR to the dense clips, dB (higher is better)")
    panels[1].set(ylabel="Frechet distance to real clips (lower is better)", yscale="log")
    panels[1].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    return path
