"""The ``bench`` command: seconds of dense and sparse forwards at full shapes, with random weights."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from effml_common.device import resolve_device, synchronize
from effml_common.errors import InputError
from effml_common.folders import run_folder
from effml_common.logging import Progress, say
from effml_common.report import Report, ReportBuilder, Row
from fis_dit.adapters.apply import apply_fis
from fis_dit.adapters.random_models import (
    ARCHITECTURES,
    TINY_TEXT_TOKENS,
    Architecture,
    Blocks,
    build_random_model,
    describe_blocks,
)
from fis_dit.config import BenchConfig, FISConfig, parse_timed_setting
from fis_dit.method.cost import flops

CPU_FLOPS = 3e10  # per second and core in float32, for the estimate only
AVERAGE_SHARE = 0.7  # of a dense forward's time that the timed forwards take, for the estimate only


@dataclass
class Timings:
    """Of every timed forward with one setting.

    Attributes:
        seconds: Wall time.
        peak_gib: Peak memory in GiB, where the device tells it.
    """

    seconds: list[float] = field(default_factory=list)
    peak_gib: list[float] = field(default_factory=list)


def bench(config: BenchConfig) -> Report:
    """Time dense and sparse forwards, interleaved, and compare them with the FLOPs model.

    Args:
        config: Shapes, settings to time and number of forwards.

    Returns:
        The report: a row for dense and for each setting, with one value per timed forward.

    Raises:
        InputError: If the device is not there, or is the CPU and the model is not ``tiny``.
    """
    # Plan: which settings, on which shapes, and for how long.
    device, builder = resolve_device(config.device), ReportBuilder("fis-dit", ("diffusers",))
    run_dir = run_folder(config.out, "bench") / "run"
    architecture = ARCHITECTURES[config.arch]
    blocks = describe_blocks(architecture)
    if device.type == "cpu":
        _estimate_or_refuse(config, architecture, blocks)
    settings = _make_timed_settings(config, architecture, blocks)

    # Run.
    model, inputs = build_random_model(architecture, device)
    timings = _time_forwards(config, model, inputs, settings, device)

    # Write.
    ends = f"{architecture.dense_ends} dense at each end"
    note = f"{blocks.depth} blocks, {ends}; one forward, batch 1"
    return builder.write(
        run_dir,
        _compare_with_flops(config.arch, blocks, settings, timings),
        device=device,
        seeds=[0],
        notes=[note],
    )


def _make_timed_settings(
    config: BenchConfig, architecture: Architecture, blocks: Blocks
) -> dict[str, FISConfig]:
    """Make dense and every setting by name; text padding is trimmed in each where that is exact."""
    settings = {"dense": FISConfig(stride=1, drop_text_padding=blocks.trims_text)}
    for name in config.settings:
        settings[name] = FISConfig(
            **parse_timed_setting(name),
            dense_head=architecture.dense_ends,
            dense_tail=architecture.dense_ends,
            drop_text_padding=blocks.trims_text,
        )
    return settings


def _estimate_or_refuse(config: BenchConfig, architecture: Architecture, blocks: Blocks) -> None:
    """Say how long the forwards take on the CPU, or refuse where that is hours.

    Raises:
        InputError: If the model is not ``tiny``.
    """
    frames, tokens = architecture.geometry
    dense = flops(blocks.shape, FISConfig(blocks=()), blocks.depth, frames, tokens).dense
    seconds, gib = dense / CPU_FLOPS, architecture.parameters * 4 + 2
    if config.arch != "tiny":
        raise InputError(
            f"{config.arch} on the CPU would take about {seconds / 3600:.1f} hours a forward and "
            f"{gib:.0f} GiB; use --device cuda, or --arch tiny"
        )

    forwards = (len(config.settings) + 1) * (config.repeats + config.warmup)
    minutes = forwards * seconds * AVERAGE_SHARE / 60
    say(f"estimate: {forwards} forwards, about {minutes:.1f} min, under 2 GiB")


@torch.no_grad()
def _time_forwards(
    config: BenchConfig,
    model: Any,
    inputs: dict[str, Any],
    settings: Mapping[str, FISConfig],
    device: torch.device,
) -> dict[str, Timings]:
    """Time every forward; settings take turns, so that a busy machine hits all alike."""
    timings = {name: Timings() for name in settings}
    memory = {"cuda": torch.cuda, "xpu": torch.xpu}.get(device.type)
    with Progress("timing", len(settings) * (config.repeats + config.warmup)) as bar:
        for repeat in range(config.warmup + config.repeats):
            for name, setting in settings.items():
                # One forward, and its own peak of memory.
                with apply_fis(model, setting):
                    synchronize(device)
                    if memory is not None:
                        memory.reset_peak_memory_stats(device)
                    start = time.perf_counter()
                    model(**inputs)
                    synchronize(device)
                    seconds = time.perf_counter() - start

                # The first forwards warm up, and do not count.
                if repeat >= config.warmup:
                    timings[name].seconds.append(seconds)
                    if memory is not None:
                        timings[name].peak_gib.append(memory.max_memory_allocated(device) / 2**30)
                bar.advance()
    return timings


def _compare_with_flops(
    arch: str, blocks: Blocks, settings: Mapping[str, FISConfig], timings: Mapping[str, Timings]
) -> list[Row]:
    """Make a row for each setting: what the clock says, and what the FLOPs model promises."""
    # Blocks and clip, as the FLOPs model wants them.
    frames, tokens = ARCHITECTURES[arch].geometry
    shape = blocks.shape
    if arch == "tiny":
        shape = replace(shape, text=TINY_TEXT_TOKENS)

    # A row per setting.
    dense_seconds, rows = statistics.median(timings["dense"].seconds), list[Row]()
    for name, setting in settings.items():
        counted = setting if name != "dense" else FISConfig(blocks=())
        cost, timed = flops(shape, counted, blocks.depth, frames, tokens), timings[name]
        median_seconds = statistics.median(timed.seconds)
        metrics: dict[str, list[float]] = {
            "seconds": timed.seconds,
            "speed-up": [dense_seconds / seconds for seconds in timed.seconds],
            "by FLOPs": [cost.speedup],
            "share of it": [dense_seconds / median_seconds / cost.speedup],
            "TFLOP/s": [cost.sparse / median_seconds / 1e12],
        }
        if timed.peak_gib:
            metrics["peak GiB"] = [max(timed.peak_gib)]
        rows.append(Row(name, f"{arch}, {frames} x {tokens} tokens", metrics))
    return rows
