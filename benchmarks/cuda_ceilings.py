"""What this machine can do at most: copy bandwidth, matrix rates, the cost of one launch.

    python -m benchmarks.cuda_ceilings --out FILE [--device cpu] [--tiny]

The timings of the packages are read as shares of these. Writes one JSON file that also names the
card and the versions of the libraries.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

from effml_common.device import resolve_device, synchronize

LIBRARIES = (
    *("torch", "torchvision", "triton", "transformers", "timm", "accelerate", "peft", "numpy"),
    *("diffusers", "open-clip-torch", "mmengine", "mmsegmentation", "compressed-tensors"),
    *("huggingface-hub", "safetensors", "tokenizers"),
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
REPEATS = 20


def seconds(step: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Mean seconds of one call, after three that do not count."""
    for _ in range(3):
        step()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def copy_rate(device: torch.device, tiny: bool) -> float:
    """Bytes read and written a second by a copy on the device."""
    source = torch.zeros(2**20 if tiny else 2**31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device)


def host_copy_rate(device: torch.device, tiny: bool) -> float:
    """Bytes a second from pinned host memory to the device."""
    source = torch.zeros(2**20 if tiny else 2**28, dtype=torch.uint8)
    source = source.pin_memory() if device.type == "cuda" else source
    target = torch.empty_like(source, device=device)
    return source.numel() / seconds(lambda: target.copy_(source, non_blocking=True), device)


def matrix_rate(dtype: torch.dtype, tf32: bool, device: torch.device, tiny: bool) -> float:
    """FLOPs a second of a square matrix product on random data (zeros run faster)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    side = 256 if tiny else 8192
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    try:
        return 2 * side**3 / seconds(lambda: torch.mm(left, right, out=out), device)
    finally:
        torch.set_float32_matmul_precision(before)


def launch_seconds(device: torch.device) -> float:
    """Seconds from one small operation to the next, when many are queued."""
    one = torch.zeros(1, device=device)
    return seconds(lambda: one.add_(1), device, repeats=2000)


def versions() -> dict[str, str]:
    """Versions of the libraries that are here."""
    # A folder that a removal left behind has neither name nor version.
    found = [
        d for d in metadata.distributions() if "Name" in d.metadata and "Version" in d.metadata
    ]
    here = {d.name.lower().replace("_", "-"): d.version for d in found}
    return {name: here[name] for name in LIBRARIES if name in here}


def card(device: torch.device) -> dict[str, object]:
    """Name and size of the device."""
    if device.type != "cuda":
        return {"card": platform.processor() or platform.machine()}
    about = torch.cuda.get_device_properties(device)
    return {
        "card": about.name,
        "memory_bytes": about.total_memory,
        "multiprocessors": about.multi_processor_count,
        "capability": f"{about.major}.{about.minor}",
        "cuda": torch.version.cuda,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args()
    device = resolve_device(flags.device)

    rates = {name: matrix_rate(dtype, False, device, flags.tiny) for name, dtype in DTYPES.items()}
    if device.type == "cuda":
        rates["tf32"] = matrix_rate(torch.float32, True, device, flags.tiny)
    ceilings = {
        "copy_bytes_per_second": copy_rate(device, flags.tiny),
        "host_copy_bytes_per_second": host_copy_rate(device, flags.tiny),
        "matrix_flops_per_second": rates,
        "launch_seconds": launch_seconds(device),
    }
    result = {**card(device), "python": platform.python_version(), "versions": versions()}
    text = json.dumps({**result, "ceilings": ceilings}, indent=1)
    flags.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
