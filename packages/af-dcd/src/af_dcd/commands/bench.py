"""The ``bench`` command: what the contrast costs, chunked and naive, and where a step's time goes."""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from af_dcd.config import BenchConfig, options
from af_dcd.method.contrast import omni_contrastive_loss
from af_dcd.method.mimicking import MaskedGeneration, feature_loss
from af_dcd.method.presets import PRESETS, changed
from effml_common.device import device_name, resolve_device, synchronize
from effml_common.errors import ConfigError, InputError
from effml_common.logging import progress, say
from effml_common.report import Report, Row, environment, write_report

IMPLS = ("chunked", "naive")
GENERATOR = "generator and mimicking"


def bench(config: BenchConfig) -> Report:
    """Seconds of forward and backward in turns, and peak memory of each form in its own process.

    Raises:
        InputError: If the settings do not fit the map, or the device is missing.
    """
    began = time.monotonic()
    device = resolve_device(config.device)
    if device.type == "mps":
        raise InputError("bench reads peak memory, which mps does not count; use cpu or cuda")
    if config.preset not in PRESETS:
        raise ConfigError(f"no preset {config.preset!r}; use one of {', '.join(PRESETS)}")
    say("a few minutes at the default shape on a CPU; the naive form needs several GB there")
    torch.manual_seed(0)
    parts = parts_of(config, device)
    if device.type != "cpu":
        # The first run loads and chooses kernels, and takes memory that later runs find reserved.
        for run in parts.values():
            timed(run, device)
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    with progress("timing", config.repeats * len(parts)) as bar:
        for turn in range(config.repeats):
            for name, run in parts.items():
                # Minutes at the paper's width on a CPU: once tells enough there.
                if turn == 0 or name != GENERATOR or device.type != "cpu":
                    seconds[name].append(timed(run, device))
                bar.advance()
    memory = {impl: peak_of(config, impl, device) for impl in IMPLS}
    setting = f"{config.batch} x {config.channels} x {config.height} x {config.width}"
    rows = []
    for name, values in seconds.items():
        metrics = {"seconds": values}
        if name.startswith("contrast, "):
            metrics["peak extra MB"] = [memory[name.removeprefix("contrast, ")] / 2**20]
        rows.append(Row(name, setting, metrics))
    out = Path(config.out or time.strftime("runs/bench-%Y%m%d-%H%M%S")) / "run"
    report = Report(
        package="af-dcd",
        version=version("af-dcd"),
        command=sys.argv,
        seeds=[],
        seconds=time.monotonic() - began,
        rows=rows,
        notes=notes_of(seconds, memory),
        environment=environment((), device_name(device)),
    )
    out.mkdir(parents=True, exist_ok=True)
    write_report(report, out)
    return report


def notes_of(seconds: dict[str, list[float]], memory: dict[str, float]) -> list[str]:
    """Ratios within turns, which a busy machine distorts less than times."""
    chunked, naive = (seconds[f"contrast, {impl}"] for impl in IMPLS)
    generator = seconds[GENERATOR]
    return [
        f"peak extra memory, chunked against naive: {memory['chunked'] / memory['naive']:.3f}",
        f"time, chunked against naive: {median_ratio(chunked, naive):.2f}",
        f"generator with mimicking against the chunked contrast: {median_ratio(generator, chunked):.1f} "
        "times the time",
    ]


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over turns of the ratio of two times."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=False))
    return ratios[len(ratios) // 2]


def parts_of(config: BenchConfig, device: torch.device) -> dict[str, Callable[[], Any]]:
    """What is timed, by name: each a forward and a backward pass."""
    method = changed(PRESETS[config.preset], options(config.method))
    shape = config.batch, config.channels, config.height, config.width
    generated = torch.randn(shape, device=device).requires_grad_()
    teacher = torch.randn(shape, device=device).relu()
    student = torch.randn(
        (config.batch, config.student_channels, config.height, config.width), device=device
    ).requires_grad_()
    generation = MaskedGeneration(
        config.student_channels, config.channels, mask=method.mask, enhanced=method.enhanced,
        hidden=config.hidden,
    ).to(device)  # fmt: skip

    def contrast(impl: str) -> Tensor:
        settings = {**method.contrast_settings(), "impl": impl}
        return omni_contrastive_loss(generated, teacher, **settings)

    def run(impl: str) -> Callable[[], Any]:
        return lambda: contrast(impl).backward()

    parts = {f"contrast, {impl}": run(impl) for impl in IMPLS}
    parts[GENERATOR] = lambda: feature_loss(generation(student), teacher).backward()
    return parts


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run, after the device has caught up."""
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


def peak_of(config: BenchConfig, impl: str, device: torch.device) -> float:
    """Bytes above the inputs that one forward and backward takes, in a process of its own.

    On a CPU from /proc, so on Linux only.
    """
    words = [config.channels, config.height, config.width, config.batch, device, impl]
    words += [config.preset, *config.method]
    done = subprocess.run(
        [sys.executable, "-m", "af_dcd.commands.bench", *map(str, words)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:] or ["killed for its memory"]
        raise InputError(f"the {impl} form could not be measured: {why[0]}; use a smaller map")
    return float(done.stdout.split()[-1])


def _measure_here(words: list[str]) -> float:
    channels, height, width, batch = map(int, words[:4])
    device, (impl, preset, *method) = torch.device(words[4]), words[5:]
    torch.set_num_threads(1)
    settings = changed(PRESETS[preset], options(tuple(method))).contrast_settings()
    small = torch.randn(1, settings["groups"], *(4 * settings["pool"],) * 2).requires_grad_()
    # Libraries load at first use; a small run before must not count. Its patches are whole ones.
    omni_contrastive_loss(small, small, **{**settings, "impl": impl, "patch": 4}).backward()
    shape = batch, channels, height, width
    generated = torch.randn(shape, device=device).requires_grad_()
    teacher = torch.randn(shape, device=device)
    generated.grad = torch.zeros_like(generated)
    settings["impl"] = impl
    return extra_bytes(
        lambda: omni_contrastive_loss(generated, teacher, **settings).backward(), device
    )


def extra_bytes(run: Callable[[], Any], device: torch.device) -> float:
    """Bytes that a run takes at its peak above what was taken before, on the device named."""
    if device.type == "cpu":
        before = _resident("VmRSS")
        run()
        return max(1.0, _resident("VmHWM") - before)

    # Every card has counters of its own; unless it is named, those of the current card answer.
    counters = torch.get_device_module(device)
    counters.reset_peak_memory_stats(device)
    before = counters.memory_allocated(device)
    run()
    return float(counters.max_memory_allocated(device) - before)


def _resident(name: str) -> float:
    # Not getrusage, whose maximum a child takes over from the process that started it.
    text = Path("/proc/self/status").read_text()
    return 1024.0 * int(re.findall(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)[0])


if __name__ == "__main__":
    sys.stdout.write(f"{_measure_here(sys.argv[1:])}\n")
