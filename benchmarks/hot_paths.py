"""Hot paths: what a GPU does most, declared once; counted on a fake device or timed on a real one.

``benchmarks/<module>/cuda.py`` lists the paths of a package. The tests in ``tests/cuda`` count them,
``python -m benchmarks.<module>.cuda --predict`` prints what a card should need, and without
``--predict`` the same paths are timed on the card that is there (``hot_path_timing.py``).
``python -m benchmarks.hot_paths`` prints the committed figures of all packages.
"""

import argparse
import contextlib
import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sliderquant.method.precision import forward_precision

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
    # Not ``torch.autocast("cuda")``, which switches itself off where there is no driver.
    return forward_precision(device)


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


def print_table(rows: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]]) -> None:
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
        print_table([(name, cost, {}) for name, cost in committed[module].items()])


if __name__ == "__main__":
    print_budgets()
