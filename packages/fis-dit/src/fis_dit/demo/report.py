"""The ``demo`` command: distilled four-step models, dense, frame-sparse and otherwise accelerated.

Costs are FLOPs counted by torch, relative to dense.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from effml_common.device import resolve_device
from effml_common.folders import run_folder
from effml_common.logging import Progress, RunLog, say
from effml_common.report import Claim, Report, ReportBuilder, Row
from fis_dit.config import DemoConfig
from fis_dit.demo.arms import Comparison, average, compare, make_arms, measure_magnitude_ratios
from fis_dit.demo.data import draw_noise
from fis_dit.demo.models import load_model

TILE_PIXELS = 96  # height and width of a clip in the animation


def demo(config: DemoConfig) -> Report:
    """Make the same clips in every arm, and write tables, plot and animation.

    Args:
        config: Data set, seeds and number of clips.

    Returns:
        The report: a row per arm with one value per seed, and claims on paired gaps.
    """
    # Prepare.
    device, builder = resolve_device(config.device), ReportBuilder("fis-dit", ("diffusers",))
    if device.type == "cpu":
        say(f"estimate: {config.seeds * config.clips * 1.6 / 60 + 0.3:.1f} min, under 1 GiB")
    torch.set_num_threads(1)  # matrices this small gain nothing from a second thread
    run_dir = run_folder(config.out, "demo") / "run"
    student = load_model(config.data, "student").to(device)
    ratios = measure_magnitude_ratios(student, *draw_noise(config.data, 16, seed=0))
    arms, seeds = make_arms(ratios), list(range(1, config.seeds + 1))

    # Run.
    with RunLog(run_dir) as log, Progress("arms", len(arms) * len(seeds)) as bar:

        def record(seed: int, arm: str, metrics: dict[str, float]) -> None:
            log.log(seed, {"arm": arm, **metrics})
            bar.advance()

        comparison = compare(
            config.data, student, arms, seeds=seeds, clips=config.clips, on_result=record
        )

    # Write.
    peer = comparison.best_peer()
    figures = _draw_figures(run_dir, comparison, peer)
    return builder.write(
        run_dir,
        _make_rows(comparison, config.data),
        figures=figures,
        device=device,
        seeds=seeds,
        claims=_make_claims(comparison, peer),
        notes=_make_notes(peer),
        files=sorted(path.name for path in run_dir.glob("clips.*")),
    )


def _make_rows(comparison: Comparison, data: str) -> list[Row]:
    setting, metrics = f"{data}; a seed varies noise and labels", comparison.results["dense"][0]
    return [
        Row(
            arm.name,
            setting,
            {key: [run[key] for run in comparison.results[arm.name]] for key in metrics},
        )
        for arm in comparison.arms
    ]


def _make_claims(comparison: Comparison, peer: str) -> list[Claim]:
    # By the distance to real clips, and what is compared with what.
    same, static, skip = "FIS interleaved, same count", "FIS static anchors", "skip blocks 2 6 7"
    paper, nearer = "FIS paper-like", "FIS paper-like is nearer to real clips than"
    static_text = "interleaved anchors are nearer to real clips than static"
    by_frechet = [
        ("static-frechet", static_text, same, static),
        ("skipping-frechet", f"{nearer} block skipping", paper, skip),
        ("steps-frechet", f"{nearer} 3 of 4 steps", paper, "3 steps"),
        ("peer-frechet", f"{nearer} {peer}", paper, peer),
    ]
    claims = [
        Claim(id_, text, comparison.paired_gaps(better, worse, "frechet", -1))
        for id_, text, better, worse in by_frechet
    ]

    # By the distance to the dense model.
    velocity_text = "interleaved anchors give a smaller velocity error than static, same count"
    psnr_text = "FIS paper-like has the higher PSNR to the dense clips than 3 of 4 steps"
    velocity_gaps = comparison.paired_gaps(same, static, "velocity error", -1)
    psnr_gaps = comparison.paired_gaps(paper, "3 steps", "psnr", 1)
    claims.append(Claim("static-velocity", velocity_text, velocity_gaps))
    return [*claims, Claim("steps-psnr", psnr_text, psnr_gaps)]


def _make_notes(peer: str) -> list[str]:
    return [
        "cost: FLOPs of the transformer over the run, counted by torch, dense = 1",
        f"clips.gif and clips.png: rows dense, FIS paper-like, {peer} (the rival nearest to real clips)",
        "psnr is to the dense clips of the same noise ('slow': the quarter that moves least)",
        "frechet is to real clips; it hardly sees ghosts, which flicker (1: as real clips) does",
        "the models are tiny and their clips move fast: read the order of the arms",
    ]


def _draw_figures(folder: Path, comparison: Comparison, peer: str) -> list[Path]:
    """Write the animation and, where matplotlib is installed, the plot."""
    rows = [comparison.shown[name] for name in ("dense", "FIS paper-like", peer)]
    figures = [write_animation(folder, rows)]
    if find_spec("matplotlib") is None:
        say("no plot: install fis-dit[plot]")
        return figures
    points = {
        arm.name: (arm.group, comparison.results[arm.name])
        for arm in comparison.arms
        if arm.group != "dense"
    }
    return [plot_quality(folder / "quality.png", points), *figures]


def write_animation(folder: Path, rows: Sequence[Tensor]) -> Path:
    """Write rows of clips as ``clips.gif`` and, for the report, an animated PNG.

    Args:
        folder: Where they go.
        rows: Clips "n f h w" in [0, 1], one row above the other.

    Returns:
        The PNG.
    """
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
    """Enlarge a frame "h w" and put a border around it."""
    scale = TILE_PIXELS // frame.shape[0]
    image = (frame.numpy() * 255).round().astype(np.uint8)
    return np.pad(np.kron(image, np.ones((scale, scale), np.uint8)), 2, constant_values=90)


def plot_quality(
    path: Path, points: Mapping[str, tuple[str, Sequence[Mapping[str, float]]]]
) -> Path:
    """Plot quality against cost, one marker per arm and a colour per group.

    Args:
        path: PNG to write.
        points: By arm, its group and the metrics of each seed.
    """
    from matplotlib.figure import Figure

    # One panel for each metric, with the groups in the same colours.
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, 2)
    groups = list(dict.fromkeys(group for group, _ in points.values()))
    for metric, panel in zip(("psnr", "frechet"), panels, strict=True):
        for number, group in enumerate(groups):
            runs = [r for g, r in points.values() if g == group]
            cost, value = ([average(r, key) for r in runs] for key in ("cost", metric))
            marker = "*" if group == "FIS" else "osv^DPX<>"[number % 9]
            size = 130 if group == "FIS" else 45
            panel.scatter(cost, value, s=size, marker=marker, color=f"C{number % 10}", label=group)
        panel.set(xlabel="FLOPs, dense = 1")

    panels[0].set(ylabel="PSNR to the dense clips, dB (higher is better)")
    panels[1].set(ylabel="Frechet distance to real clips (lower is better)", yscale="log")
    panels[1].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    return path
