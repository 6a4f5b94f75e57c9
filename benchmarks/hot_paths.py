"""Hot paths: what a GPU does most, declared once; counted on a fake device or timed on a real one.

``benchmarks/<module>/cuda.py`` lists the paths of a package. The tests in ``tests/cuda`` count them,
``python -m benchmarks.<module>.cuda --predict`` prints what a card should need, and without
``--predict`` the same paths are timed on the card that is there. ``python -m benchmarks.hot_paths``
prints the committed figures of all packages.
"""

import argparse
import contextlib
import copy
import gc
import json
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

MODULES = ("sliderquant", "com_pt", "scalekd", "af_dcd", "morse_diffusion", "fis_dit")
BUDGETS = Path(__file__).parents[1] / "tests" / "cuda" / "budgets.json"


class Kit(Protocol):
    """Makes the modules and tensors of a path, on a fake device or a real one."""

    device: torch.device

    def module(self, make: Callable[[], nn.Module], dtype: torch.dtype | None = None) -> nn.Module:
        """Build a module on the device; compiled where the compiled path is timed."""
        ...

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal values on the device."""
        ...

    def randint(self, high: int, *shape: int) -> Tensor:
        """Whole numbers from 0 to ``high`` - 1 on the device, as int64."""
        ...

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bf16 autocast, where the device has one ("gpu" and "meta" do not)."""
        ...


Step = Callable[[], object]


@dataclass(frozen=True)
class HotPath:
    """One path of a package.

    Args:
        name: What runs, at which published shape.
        build: From a kit, and whether a tiny model will do, to a step that runs the path once.
        fake: Device on which it is counted (``tests/cuda/counter.py`` says which shows what).
        warm_up: Steps before counting, such as one that makes the optimizer's state.
        scaled: Factor from what is counted to the whole path, where a part stands for it.
        once: What of it happens once, however large the part is (a model without its blocks, say):
            counted as it is, and only the rest is scaled.
        allow: Waits that would stop a fake run, and the values that they return.
        compile: Whether the modules are timed under ``torch.compile`` too.
    """

    name: str
    build: Callable[[Kit, bool], Step]
    fake: str = "cuda:0"
    warm_up: int = 0
    scaled: float = 1.0
    once: Callable[[Kit, bool], Step] | None = None
    allow: Mapping[str, Any] = field(default_factory=dict)
    compile: bool = True


@dataclass(frozen=True)
class Ceilings:
    """The fastest that a card does each thing; operands' types as in ``Launch.dtype``."""

    name: str
    launch_s: float
    bytes_per_s: float
    flops_per_s: Mapping[str, float]


# Copy and bf16 product as read off such a card, the other rates from its data sheet (dense).
H100 = Ceilings(
    name="NVIDIA H100",
    launch_s=4e-6,
    bytes_per_s=3.0e12,
    flops_per_s={
        "bfloat16": 8.0e14,
        "float16": 8.0e14,
        "tf32": 4.9e14,
        "float32": 6.7e13,
        "float64": 6.7e13,
    },
)


class FakeKit:
    """Tensors without values, inside a counter."""

    def __init__(self, counter: Any) -> None:
        self.counter, self.device = counter, counter.device

    def module(self, make: Callable[[], nn.Module], dtype: torch.dtype | None = None) -> nn.Module:
        """Place a module that was built without memory."""
        return self.counter.module(make, dtype)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of this shape."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def randint(self, high: int, *shape: int) -> Tensor:
        """A tensor of this shape."""
        return torch.empty(shape, dtype=torch.long, device=self.device)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bf16 autocast of the fake CPU and of forwards on the fake card."""
        return _autocast(self.device)


class RealKit:
    """Random weights and inputs on a device that is there."""

    def __init__(self, device: torch.device, compiled: bool = False) -> None:
        self.device, self.compiled = device, compiled

    def module(self, make: Callable[[], nn.Module], dtype: torch.dtype | None = None) -> nn.Module:
        """Build in the final type, so that a large model never stands there in float32."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype or before)
        try:
            with torch.device(self.device):
                module = make()
        finally:
            torch.set_default_dtype(before)
        module = module.to(self.device) if dtype is None else module.to(self.device, dtype)
        if self.compiled:
            module.compile()
        return module

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal values."""
        return torch.randn(shape, dtype=dtype, device=self.device)

    def randint(self, high: int, *shape: int) -> Tensor:
        """Uniform whole numbers."""
        return torch.randint(high, shape, device=self.device)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bf16 autocast."""
        return _autocast(self.device)


def _autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type == "cpu":
        return torch.autocast("cpu", torch.bfloat16)
    if device.type != "cuda":
        return contextlib.nullcontext()
    return _cuda_autocast()


@contextlib.contextmanager
def _cuda_autocast() -> Any:
    """As ``torch.autocast("cuda")``, which switches itself off where there is no driver."""
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", dtype)


def count(path: HotPath, *, tiny: bool = False, ceilings: Ceilings = H100) -> dict[str, Any]:
    """Run a path on its fake device.

    Returns:
        Launches, bytes, FLOPs, copies and waits (scaled to the whole path), peak memory in bytes,
        and the predicted milliseconds of the device alone and of a step in eager mode.
    """
    part, peak = _counted(path, path.build, tiny, ceilings)
    once = _counted(path, path.once, tiny, ceilings)[0] if path.once else {}
    if not part["launches", ""]:
        raise ValueError(
            f"{path.name} launched nothing on {path.fake}; build with the kit's tensors"
        )
    if any(value > part.get(key, 0) * (1 + 1e-9) for key, value in once.items()):
        raise ValueError(f"{path.name}: what happens once costs more than the part that holds it")
    whole = {
        key: once.get(key, 0) + (part.get(key, 0) - once.get(key, 0)) * path.scaled
        for key in part | once
    }

    figures: dict[str, Any] = {"fake": path.fake, "scaled": path.scaled, "peak": peak}
    for name in ("launches", "read", "written"):
        figures[name] = round(whole[name, ""])
    for name in ("flops", "copies", "waits"):
        rows = {row: round(value) for (kind, row), value in sorted(whole.items()) if kind == name}
        figures[name] = {row: value for row, value in rows.items() if value}
    device_s, host_s = whole["device_s", ""], whole["launches", ""] * ceilings.launch_s
    figures["device_ms"] = round(device_s * 1e3, 3)
    figures["step_ms"] = round(max(device_s, host_s) * 1e3, 3)
    return figures


def _counted(
    path: HotPath, build: Callable[[Kit, bool], Step], tiny: bool, ceilings: Ceilings
) -> tuple[dict[tuple[str, str], float], int]:
    """Figures of one run by (kind, row), and its peak memory, which is not scaled."""
    from tests.cuda.counter import Counter

    # What an allowed wait returns may depend on the waits before.
    with Counter(path.fake, copy.deepcopy(path.allow)) as counter:
        step = build(FakeKit(counter), tiny)
        for _ in range(path.warm_up):
            step()
        with counter.counting() as cost:
            step()

    figures: dict[tuple[str, str], float] = {
        ("launches", ""): cost.launch_count,
        ("read", ""): cost.read,
        ("written", ""): cost.written,
    }
    for name in ("flops", "copies", "waits"):
        figures.update({(name, row): value for row, value in getattr(cost, name).items()})
    figures["device_s", ""] = sum(
        times * max(one.nbytes / ceilings.bytes_per_s, _flops_s(one.flops, one.dtype, ceilings))
        for one, times in cost.launches.items()
    )
    return figures, cost.peak


def _flops_s(flops: int, dtype: str, ceilings: Ceilings) -> float:
    return flops / ceilings.flops_per_s.get(dtype, ceilings.flops_per_s["float32"])


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
        _print_table([(path.name, count(path, tiny=options.tiny), {}) for path in chosen])
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
    _print_table([(name, row["predicted"], row) for name, row in result["paths"].items()])
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


def _print_table(rows: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]]) -> None:
    """Print counted, predicted and measured figures of each path, side by side; no empty columns."""
    table: list[dict[str, str]] = []
    for name, cost, row in rows:
        cells = {"path": name}
        if cost:
            moved, flops = cost["read"] + cost["written"], sum(cost["flops"].values())
            cells |= {
                "launches": f"{cost['launches']:,}",
                "waits": f"{sum(cost['waits'].values()):,}",
                "peak GiB": f"{cost['peak'] / 2**30:.2f}",
                "GB moved": f"{moved / 1e9:,.1f}",
                "TFLOP": f"{flops / 1e12:,.2f}",
                "device ms": f"{cost['device_ms']:,.2f}",
                "step ms": f"{cost['step_ms']:,.2f}",
            }
        for mode, column in (("eager", "measured ms"), ("compiled", "compiled ms")):
            timed = row.get(mode, {})
            if timed:
                cells[column] = f"{timed['ms']:,.2f}" if "ms" in timed else timed["error"][:40]
        if "peak" in row.get("eager", {}):
            cells["measured GiB"] = f"{row['eager']['peak'] / 2**30:.2f}"
        table.append(cells)

    columns = list(dict.fromkeys(column for cells in table for column in cells))
    table = [dict(zip(columns, columns, strict=True)), *table]
    widths = {column: max(len(cells.get(column, "")) for cells in table) for column in columns}
    for cells in table:
        padded = [cells.get(column, "").rjust(widths[column]) for column in columns[1:]]
        print("  ".join([cells["path"].ljust(widths["path"]), *padded]).rstrip())


def print_budgets() -> None:
    """Command line of ``python -m benchmarks.hot_paths``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hot_paths",
        description="Print the committed figures of all hot paths, or of the packages that are named.",
        epilog="The columns are explained in docs/cuda.md.",
    )
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(MODULES)}")
    modules = [name.replace("-", "_") for name in parser.parse_args().modules]
    for unknown in sorted({*modules} - {*MODULES}):
        parser.error(f"no package called {unknown}; there are {', '.join(MODULES)}")
    committed = json.loads(BUDGETS.read_text())
    for module in modules or MODULES:
        print(f"\n{module} (predicted for one {H100.name})")
        _print_table([(name, cost, {}) for name, cost in committed[module].items()])


if __name__ == "__main__":
    print_budgets()
