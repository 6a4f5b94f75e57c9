"""In which precision a device computes: bfloat16 where it multiplies that faster, else float32.

Blocks run forward under bfloat16 autocast, as in the released code of SliderQuant, on CUDA and on
processors with instructions for it. Weights, scales, clipping, losses and statistics stay in float32,
on CUDA with products in TF32. All contexts are left as they were found.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def is_accelerator(device: torch.device) -> bool:
    """Whether a device computes beside the host, which hands it one operation at a time."""
    return device.type != "cpu"


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 faster; a processor needs instructions for it."""
    if device.type != "cpu":
        return device.type == "cuda"
    # Older releases of torch do not say what a processor can do.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


@contextmanager
def forward_precision(device: torch.device) -> Iterator[None]:
    """Run forward passes in bfloat16 on devices that multiply it faster; else does nothing.

    Gradients are computed outside of the context, in the types of the forward pass.

    Example:
        >>> with forward_precision(torch.device("cpu")):
        ...     product = torch.ones(2, 2) @ torch.ones(2, 2)
        >>> (product.dtype == torch.bfloat16) == multiplies_bfloat16(torch.device("cpu"))
        True
    """
    if not multiplies_bfloat16(device):
        yield
        return
    with _autocast(device.type, torch.bfloat16):
        yield


def stream_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the type in which hidden states wait between blocks: bfloat16 on CUDA, else their own."""
    return torch.bfloat16 if device.type == "cuda" else dtype


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Compute in the types of the operands, also inside of ``forward_precision``."""
    if not _has_autocast_on(device):
        yield
        return
    with _autocast(device.type, None):
        yield


def product_dtype(matrix: Tensor) -> torch.dtype:
    """Return the type in which a matrix is multiplied: that of autocast if it is on, else its own."""
    if matrix.dtype == torch.float32 and _has_autocast_on(matrix.device):
        return torch.get_autocast_dtype(matrix.device.type)
    return matrix.dtype


@contextmanager
def tf32_products(device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices in TF32 on CUDA: 10 bits of mantissa, sums in float32."""
    if device.type != "cuda" or torch.backends.cuda.matmul.fp32_precision == "tf32":
        yield
        return
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def _has_autocast_on(device: torch.device) -> bool:
    """Whether autocast is on for a device, which may know none."""
    is_available = torch.amp.is_autocast_available(device.type)
    return is_available and torch.is_autocast_enabled(device.type)


@contextmanager
def _autocast(device_type: str, dtype: torch.dtype | None) -> Iterator[None]:
    """Switch autocast to a type, or off; ``torch.autocast`` refuses CUDA where there is no driver.

    Fake CUDA devices, which need none, so take the types that a card takes.
    """
    enabled_before = torch.is_autocast_enabled(device_type)
    dtype_before = torch.get_autocast_dtype(device_type)
    torch.set_autocast_enabled(device_type, dtype is not None)
    if dtype is not None:
        torch.set_autocast_dtype(device_type, dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        # Casts of weights are remembered up to the end of the outermost context.
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device_type, enabled_before)
        torch.set_autocast_dtype(device_type, dtype_before)
