"""Time hot paths on the device that is there, the measured figures beside the predicted ones.

The command line of ``python -m benchmarks.<module>.cuda``: without ``--predict`` each path runs in eager
mode and then compiled, in turn, within the time that is given; the file is written after each.
"""

import argparse
import gc
import json
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.hot_paths import BUDGETS, H100, HotPath, Kit, RealKit, Step, count, print_table


def measure(
    path: HotPath, device: torch.device, *, tiny: bool, compiled: bool, seconds: float
) -> dict[str, Any]:
    """Time a path on a device: the median of steps after two that warm it up.

    Args:
        path: What to run.
        device: Where; CUDA events time a card, the clock a CPU.
        tiny: Whether to build the tiny model.
        compiled: Whether modules run under ``torch.compile``.
        seconds: Time for the repetitions; at least one runs.

    Returns:
        "ms" (median), "ms_min", "ms_max", "steps", and on a card "peak" in bytes.
    """
    on_card = device.type == "cuda"
    if compiled:
        torch._dynamo.reset()  # or the shapes of the path before count as a change
    gc.collect()  # cycles would keep the path before this one in memory
    if on_card:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    times = _times(path, path.build, device, tiny=tiny, compiled=compiled, seconds=seconds)
    peak = torch.cuda.max_memory_allocated(device) if on_card else None
    once = 0.0
    if path.once is not None:
        runs = _times(path, path.once, device, tiny=tiny, compiled=compiled, seconds=seconds / 10)
        once = statistics.median(runs)

    # The part that is built stands for the whole, as in the count.
    times = [once + (ms - once) * path.scaled for ms in times]
    figures: dict[str, Any] = {"ms": statistics.median(times), "steps": len(times)}
    figures |= {"ms_min": min(times), "ms_max": max(times)}
    return figures | ({"peak": peak} if on_card else {})


def _times(
    path: HotPath,
    build: Callable[[Kit, bool], Step],
    device: torch.device,
    *,
    tiny: bool,
    compiled: bool,
    seconds: float,
) -> list[float]:
    """Milliseconds of each step in this time, at most 50 of them."""
    step = build(RealKit(device, compiled), tiny)
    for _ in range(max(path.warm_up, 0 if tiny else 2)):
        step()
    clock = _cuda_ms if device.type == "cuda" else _clock_ms
    times: list[float] = []
    until = time.monotonic() + seconds
    while not times or (time.monotonic() < until and len(times) < 50):
        times.append(clock(step))
    return times


def _cuda_ms(step: Step) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _clock_ms(step: Step) -> float:
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def measured_ceilings(device: torch.device) -> dict[str, float]:
    """Copy bandwidth (bytes read and written a second) and bf16 product rate of a card."""
    if device.type != "cuda":
        return {}
    source = torch.empty(2**30, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))

    def median_s(step: Step) -> float:
        return statistics.median([_cuda_ms(step) for _ in range(10)][2:]) / 1e3

    copy_s, product_s = median_s(lambda: target.copy_(source)), median_s(lambda: a @ b)
    return {"bytes_per_s": 2 * 2**30 / copy_s, "bfloat16_flops_per_s": 2 * 8192**3 / product_s}


def main(module: str, paths: Sequence[HotPath], argv: Sequence[str] | None = None) -> None:
    """Command line of ``python -m benchmarks.<module>.cuda``."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}.cuda",
        description="Time what a GPU does most in this package, or count it without one.",
        epilog="The columns are explained in docs/cuda.md.",
    )
    parser.add_argument(
        "--predict", action="store_true", help="count on a fake device, time nothing"
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (default cuda)")
    parser.add_argument("--tiny", action="store_true", help="tiny models, for a CPU")
    parser.add_argument("--only", default="", help="paths whose name holds this text, case by case")
    parser.add_argument("--seconds", type=float, default=60, help="for everything (default 60)")
    parser.add_argument("--out", type=Path, help="folder for <module>-cuda.json")
    options = parser.parse_args(argv)
    chosen = [path for path in paths if options.only in path.name]
    if not chosen:
        parser.error(
            f"no path holds {options.only!r}; there are:\n  " + "\n  ".join(p.name for p in paths)
        )
    if options.predict:
        print_table([(path.name, count(path, tiny=options.tiny), {}) for path in chosen])
        return

    if not re.fullmatch(r"cpu|cuda(:\d+)?", options.device):
        parser.error(f"--device {options.device}: use cuda, cuda:N or cpu")
    device = torch.device(options.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(
            f"{torch.cuda.device_count()} CUDA devices here; --predict counts without one, "
            "--device cpu --tiny tries the timing"
        )
    if not options.seconds > 0:
        parser.error(f"--seconds {options.seconds:g}: must be more than 0")
    if options.out:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"cannot write to {options.out} ({error.strerror}); name another folder")
    _measure_all(module, chosen, device, options)


def _measure_all(
    module: str, paths: Sequence[HotPath], device: torch.device, options: argparse.Namespace
) -> None:
    """Time every path in eager mode, then compiled, writing the file after each."""
    on_card = device.type == "cuda"
    if on_card:
        torch.cuda.set_device(device)  # events are recorded on the current one
    budgets = json.loads(BUDGETS.read_text()).get(module, {}) if BUDGETS.exists() else {}
    result: dict[str, Any] = {
        "schema": 1,
        "module": module,
        "card": torch.cuda.get_device_name(device) if on_card else "cpu",
        "torch": torch.__version__,
        "tiny": options.tiny,
        "ceilings": {},
        "predicted_for": asdict(H100),
        "paths": {},
    }
    try:
        result["ceilings"] = measured_ceilings(device)
    except Exception as error:  # without them only the shares are missing
        print(f"ceilings: {type(error).__name__}: {error}".splitlines()[0])
    passes = [False, True] if on_card and not options.tiny else [False]
    jobs = [
        (path, compiled) for compiled in passes for path in paths if path.compile or not compiled
    ]

    # What is left of the time is shared by the jobs that are left; one failure does not stop the others.
    deadline = time.monotonic() + options.seconds
    for place, (path, compiled) in enumerate(jobs):
        left = deadline - time.monotonic()
        predicted = {} if options.tiny else budgets.get(path.name, {})
        row = result["paths"].setdefault(path.name, {"predicted": predicted})
        mode = "compiled" if compiled else "eager"
        try:
            if left <= 0:
                raise TimeoutError(f"{options.seconds:.0f} s were over before its turn")
            share = min(left / (len(jobs) - place) / 2, 5)
            row[mode] = measure(path, device, tiny=options.tiny, compiled=compiled, seconds=share)
            row[mode] |= _shares(predicted, row[mode]["ms"], result["ceilings"])
        except Exception as error:  # said in the table and by the exit code
            row[mode] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        if options.out:
            (options.out / f"{module}-cuda.json").write_text(json.dumps(result, indent=1) + "\n")
    print_table([(name, row["predicted"], row) for name, row in result["paths"].items()])
    # A compiled path whose turn never came is no failure.
    errors = [mode.get("error", "") for row in result["paths"].values() for mode in row.values()]
    if any(error and not error.startswith("TimeoutError") for error in errors) or not _all_timed(
        result
    ):
        raise SystemExit(1)


def _all_timed(result: Mapping[str, Any]) -> bool:
    """Whether every path was timed in eager mode."""
    return all("ms" in row.get("eager", {}) for row in result["paths"].values())


def _shares(
    predicted: Mapping[str, Any], ms: float, ceilings: Mapping[str, float]
) -> dict[str, float]:
    """How much of the card's copy bandwidth and bf16 rate a path has used."""
    if not predicted or not ceilings:
        return {}
    moved = predicted["read"] + predicted["written"]
    half = sum(predicted["flops"].get(name, 0) for name in ("bfloat16", "float16"))
    seconds = ms / 1e3
    return {
        "share_of_copy": moved / seconds / ceilings["bytes_per_s"],
        "share_of_bfloat16": half / seconds / ceilings["bfloat16_flops_per_s"],
    }
