"""Bandwidth of the packed product on a GPU, beside the dense one and beside a plain copy.

    uv run python -m benchmarks.sliderquant.kernels --device cuda

Shapes are linear layers of 7 and 70 billion parameter Llamas, one row at a time (decoding). ``share``
is the achieved part of the copy's bandwidth. Needs a CUDA device.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.script import run_script
from effml_common.errors import InputError
from sliderquant.method.packing import packed_tensors
from sliderquant.method.quantizer import WeightFormat, quantize_weight

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (28672, 8192))  # out, in


@dataclass(frozen=True, kw_only=True)
class Config:
    """Time the packed kernel at decoding shapes."""

    device: str = field(default="cuda", metadata={"help": "CUDA device"})
    repeats: int = field(default=50, metadata={"help": "timed launches of each product"})


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Return the time of one call, from many in a row, after a warm-up."""
    for _ in range(5):
        run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / repeats


def measure(config: Config) -> Table:
    """Return the table of all shapes and bits."""
    if not torch.cuda.is_available():
        raise InputError("no CUDA device; the kernel is only timed on one")
    from sliderquant.kernels.packed_gemv import packed_gemv

    source = torch.empty(2**28, dtype=torch.bfloat16, device=config.device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / seconds(lambda: target.copy_(source), config.repeats)
    table = Table("layer", "weight", "microseconds", "GB/s", "share of copy", "against bfloat16")
    for out, columns in SHAPES:
        weight = torch.randn(out, columns, device=config.device)
        dense, x = weight.bfloat16(), torch.randn(1, columns, device=config.device).bfloat16()
        base = seconds(lambda: torch.nn.functional.linear(x, dense), config.repeats)  # noqa: B023
        runs = [("bfloat16", base, dense.nbytes)]
        for bits, group in ((8, None), (4, 128), (2, 64)):
            fmt = WeightFormat(bits=bits, group_size=group, sym=True, dtype=torch.bfloat16)
            tensors = packed_tensors(quantize_weight(weight, fmt))
            args = tensors["weight_packed"], tensors["weight_scale"], None, bits
            took = seconds(lambda: packed_gemv(x, *args), config.repeats)  # noqa: B023
            runs.append((f"W{bits}", took, args[0].nbytes + args[1].nbytes))
        for name, took, size in runs:
            rate = size / took
            cells = (f"{took * 1e6:.1f}", f"{rate / 1e9:.0f}", f"{rate / copied:.0%}")
            table.add_row(f"{out} x {columns}", name, *cells, f"{base / took:.2f}x")
    return table


if __name__ == "__main__":
    raise SystemExit(
        run_script(
            Config,
            "python -m benchmarks.sliderquant.kernels",
            lambda config: Console().print(measure(config)),
        )
    )
