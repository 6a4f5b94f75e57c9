"""The ``bench`` command: what the contrast costs, chunked and naive, and where a step's time goes."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from af_dcd.commands._peak_memory import ContrastCase, measure_peak_bytes
from af_dcd.config import BenchConfig, DistillConfig, parse_options
from af_dcd.method.contrast import omni_contrastive_loss
from af_dcd.method.mimicking import MaskedGeneration, feature_loss
from af_dcd.method.presets import PRESETS, replace_settings
from effml_common.device import resolve_device, synchronize
from effml_common.errors import ConfigError, InputError
from effml_common.folders import run_folder
from effml_common.logging import Progress, say
from effml_common.report import Report, ReportBuilder, Row

FORMS = ("chunked", "naive")  # of the contrast
GENERATOR = "generator and mimicking"


def bench(config: BenchConfig) -> Report:
    """Time forward and backward in turns, and measure each form's peak memory in its own process.

    Raises:
        InputError: If the settings do not fit the map, or the device is missing.
    """
    # Where it computes, and the settings that are measured.
    builder = ReportBuilder("af-dcd")
    run_dir = run_folder(config.out, "bench") / "run"
    device = resolve_device(config.device)
    if device.type == "mps":
        raise InputError("bench reads peak memory, which mps does not count; use cpu or cuda")
    if config.preset not in PRESETS:
        raise ConfigError(f"no preset {config.preset!r}; use one of {', '.join(PRESETS)}")
    method = replace_settings(PRESETS[config.preset], parse_options(config.method))

    # Time first, then memory.
    say("a few minutes at the default shape on a CPU; the naive form needs several GB there")
    torch.manual_seed(0)
    seconds = time_in_turns(build_workloads(config, method, device), config.repeats, device)
    shape = config.batch, config.channels, config.height, config.width
    peak_bytes = {
        form: measure_peak_bytes(
            ContrastCase(shape, {**method.contrast_settings(), "impl": form}, str(device))
        )
        for form in FORMS
    }

    return builder.write(
        run_dir,
        workload_rows(seconds, peak_bytes, " x ".join(map(str, shape))),
        notes=ratio_notes(seconds, peak_bytes),
        device=device,
    )


def build_workloads(
    config: BenchConfig, method: DistillConfig, device: torch.device
) -> dict[str, Callable[[], Any]]:
    """Build what is timed, by name: each a forward and a backward pass."""
    # Maps of the size that is asked for; the teacher's are the output of a ReLU.
    size = config.height, config.width
    generated = torch.randn(config.batch, config.channels, *size, device=device).requires_grad_()
    teacher = torch.randn(config.batch, config.channels, *size, device=device).relu()
    student = torch.randn(config.batch, config.student_channels, *size, device=device)
    student.requires_grad_()
    generation = MaskedGeneration(
        config.student_channels, config.channels, mask=method.mask, enhanced=method.enhanced,
        hidden=config.hidden,
    ).to(device)  # fmt: skip

    def contrast(form: str) -> None:
        settings = {**method.contrast_settings(), "impl": form}
        omni_contrastive_loss(generated, teacher, **settings).backward()

    def mimic() -> None:
        feature_loss(generation(student), teacher).backward()

    return {**{f"contrast, {form}": partial(contrast, form) for form in FORMS}, GENERATOR: mimic}


def time_in_turns(
    workloads: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Time each workload ``repeats`` times, in turns so that a busy machine slows all alike."""
    # The first run loads and chooses kernels, and takes memory that later runs find reserved.
    if device.type != "cpu":
        for run in workloads.values():
            time_run(run, device)

    seconds: dict[str, list[float]] = {name: [] for name in workloads}
    with Progress("timing", repeats * len(workloads)) as bar:
        for turn in range(repeats):
            for name, run in workloads.items():
                # Minutes at the paper's width on a CPU: once tells enough there.
                if turn == 0 or name != GENERATOR or device.type != "cpu":
                    seconds[name].append(time_run(run, device))
                bar.advance()
    return seconds


def time_run(run: Callable[[], Any], device: torch.device) -> float:
    """Time one run in seconds, after the device has caught up."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def workload_rows(
    seconds: Mapping[str, list[float]], peak_bytes: Mapping[str, float], shape: str
) -> list[Row]:
    """Make a row for each workload; the forms of the contrast have their memory, too."""
    rows = []
    for name, values in seconds.items():
        metrics = {"seconds": values}
        if name.startswith("contrast, "):
            form = name.removeprefix("contrast, ")
            metrics["peak extra MB"] = [peak_bytes[form] / 2**20]
        rows.append(Row(name, shape, metrics))
    return rows


def ratio_notes(seconds: Mapping[str, list[float]], peak_bytes: Mapping[str, float]) -> list[str]:
    """Give ratios within turns, which a busy machine distorts less than times."""
    chunked, naive = (seconds[f"contrast, {form}"] for form in FORMS)
    generator = seconds[GENERATOR]
    return [
        "peak extra memory, chunked against naive: "
        f"{peak_bytes['chunked'] / peak_bytes['naive']:.3f}",
        f"time, chunked against naive: {median_ratio(chunked, naive):.2f}",
        f"generator with mimicking against the chunked contrast: {median_ratio(generator, chunked):.1f} "
        "times the time",
    ]


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Take the median over turns of the ratio of two times."""
    pairs = zip(numerators, denominators, strict=False)
    ratios = sorted(numerator / denominator for numerator, denominator in pairs)
    return ratios[len(ratios) // 2]
