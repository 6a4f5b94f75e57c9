"""Rounding the columns of a 2048-wide block: in blocks of 128, and one after the other, on this CPU.

    uv run python -m benchmarks.sliderquant.columns

A textbook's loop over the columns of a weight rewrites all columns behind each one (GPTQ), or the whole
gradient (coordinate descent). ``error_compensation`` gathers what 128 columns pass on and applies it in
one matrix product. Both are timed in this process, on the weights of a Llama block with 2048 hidden
units and random correlated inputs, and their codes are compared. Quote the ratio, never a time.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.script import run_script
from effml_common.files import atomic_write
from effml_common.parsing import require, setting
from sliderquant.method.error_compensation import (
    Grid,
    coordinate_descent_sweep,
    round_with_error_feedback,
    search_grid,
)
from sliderquant.method.quantizer import WeightFormat, nearest_codes
from sliderquant.method.ridge import Curvature, factorize

PROG = "python -m benchmarks.sliderquant.columns"
# in, out of the layers that read the same input. Rows do not depend on each other: an eighth of gate and
# up projection, and a quarter of the down projection, cost that part of the whole in either way.
GROUPS = {"q, k, v": (2048, 3072), "o": (2048, 2048), "gate, up": (2048, 2048), "down": (8192, 512)}
TOKENS = 4096  # random inputs that H is made of


@dataclass(frozen=True, kw_only=True)
class Config:
    """Time the loops over columns of a 2048-wide block on this CPU."""

    bits: int = setting(4, "bits of a weight")
    group_size: int = setting(128, "input columns per scale")
    threads: int = setting(1, "CPU threads")
    layers: tuple[str, ...] = setting(tuple(GROUPS), "layers to time")
    out: str = setting("benchmarks/sliderquant/results", "folder of the result")

    def __post_init__(self) -> None:
        require(2 <= self.bits <= 8, f"bits is {self.bits}", "give 2 to 8")
        fits = self.group_size >= 1 and 2048 % self.group_size == 0
        require(fits, f"group_size is {self.group_size}", "give a divisor of 2048")
        require(self.threads >= 1, f"threads is {self.threads}", "give 1 or more")
        for name in self.layers:
            require(name in GROUPS, f"no layers {name!r}", f"give some of {list(GROUPS)}")


def round_in_blocks(target: Tensor, grid: Grid, curvature: Curvature) -> Tensor:
    """Round with error feedback as the package does, the factor included."""
    return round_with_error_feedback(target, grid, curvature.order, curvature.inverse_factor())


def round_one_by_one(target: Tensor, grid: Grid, curvature: Curvature) -> Tensor:
    """Compute ``round_in_blocks`` with an update of all columns behind each column."""
    factor = curvature.inverse_factor()
    remaining, codes = target[curvature.order], torch.empty_like(target)
    for j, column in enumerate(curvature.order):
        scale, zero = (values[0] for values in grid.of_columns(column[None]))
        code = nearest_codes(remaining[j], scale, zero, grid.fmt)
        codes[column] = code
        value = ((code - zero) * scale).to(grid.fmt.dtype)
        error = (remaining[j] - value) / factor[j, j]
        remaining[j + 1 :] -= torch.outer(factor[j, j + 1 :], error)
    return codes


def sweep_one_by_one(codes: Tensor, grid: Grid, target: Tensor, curvature: Curvature) -> Tensor:
    """Compute ``coordinate_descent_sweep`` with an update of the whole gradient for each column."""
    hessian, codes = curvature.hessian, codes.clone()
    slope = hessian @ (target - grid.values(codes))
    for column in curvature.order:
        scale, zero = (values[0] for values in grid.of_columns(column[None]))
        optimum = (codes[column] - zero) * scale + slope[column] / hessian[column, column]
        code = nearest_codes(optimum, scale, zero, grid.fmt)
        slope -= torch.outer(hessian[column], (code - codes[column]) * scale)
        codes[column] = code
    return codes


def problem(columns: int, rows: int, config: Config) -> tuple[Tensor, Grid, Curvature]:
    """Return a random weight [in, out], its grid, and H of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(TOKENS, columns, generator=generator) @ (mixing + torch.eye(columns))
    curvature = factorize(inputs.T @ inputs, torch.float32)

    weight = torch.randn(columns, rows, generator=generator) * 0.02
    fmt = WeightFormat(
        bits=config.bits, group_size=config.group_size, sym=False, dtype=torch.bfloat16
    )
    return weight, search_grid(weight, fmt), curvature


def timed(compute: Callable[..., Tensor], *arguments: Any) -> tuple[Tensor, float]:
    """Return a result and the CPU seconds that it took."""
    begin = time.process_time()
    return compute(*arguments), time.process_time() - begin


@torch.no_grad()
def compare(columns: int, rows: int, config: Config) -> dict[str, Any]:
    """Return the CPU seconds of both ways on some layers, and how far their codes agree."""
    target, grid, curvature = problem(columns, rows, config)
    codes, in_blocks = timed(round_in_blocks, target, grid, curvature)
    again, one_by_one = timed(round_one_by_one, target, grid, curvature)

    # Both sweeps start from the same codes.
    swept, sweep_in_blocks = timed(
        coordinate_descent_sweep, codes, grid, target, curvature.hessian, curvature.order
    )
    swept_again, sweep_one = timed(sweep_one_by_one, codes, grid, target, curvature)
    return {
        "feedback": {"in blocks": in_blocks, "one by one": one_by_one},
        "sweep": {"in blocks": sweep_in_blocks, "one by one": sweep_one},
        "equal codes": {
            "feedback": (codes == again).double().mean().item(),
            "sweep": (swept == swept_again).double().mean().item(),
        },
    }


def measure(config: Config) -> dict[str, Any]:
    """Return the figures of all layers that are asked for."""
    torch.set_num_threads(config.threads)
    return {
        "command": sys.argv[1:],
        "torch": torch.__version__,
        "layers": {name: compare(*GROUPS[name], config) for name in config.layers},
    }


def table_of(result: dict[str, Any]) -> Table:
    """Return the ratios as a table."""
    table = Table("layers", "error feedback", "sweep", "both", "equal codes")
    for name, row in result["layers"].items():
        feedback, sweep = (row[step] for step in ("feedback", "sweep"))
        both = {way: feedback[way] + sweep[way] for way in feedback}
        steps = (feedback, sweep, both)
        cells = [f"{times['one by one'] / times['in blocks']:.1f}x" for times in steps]
        table.add_row(name, *cells, f"{min(row['equal codes'].values()):.3%}")
    return table


def run(config: Config) -> None:
    """Measure, print the table and write the figures."""
    path = Path(config.out) / "sliderquant-columns.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = measure(config)
    Console().print(table_of(result))
    atomic_write(path, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(run_script(Config, PROG, run))
