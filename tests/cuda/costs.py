"""What one operation costs a GPU: bytes, FLOPs, and attention as the one call that it is there."""

import functools
import math
from collections import Counter as Tally
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

# Read as much of the first argument as they return, or write as much of it as they are given.
LOOKUPS = {"embedding", "index", "index_select", "gather", "take"}
SCATTERS = {"index_put_", "index_add_", "index_copy_", "scatter_", "scatter_add_"}
SCATTERS |= {"scatter_reduce_", "index_fill_"}
# The old values of what they write do not matter.
_WRITES_ONLY = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_"}
_WRITES_ONLY |= {"exponential_", "_foreach_copy_", "_foreach_zero_"}


@dataclass(frozen=True)
class Launch:
    """Cost of one launch; ``dtype`` is that of the operands, or "tf32"."""

    nbytes: int
    flops: int
    dtype: str


@dataclass
class Cost:
    """What one run would ask of a device; lines are "file.py:function"."""

    launches: Tally[Launch] = field(default_factory=Tally)
    read: int = 0
    written: int = 0
    peak: int = 0
    copies: Tally[str] = field(default_factory=Tally)  # "to host" or "to device", and the line
    waits: Tally[str] = field(default_factory=Tally)
    lines: Tally[str] = field(default_factory=Tally)  # launches by the line that caused them

    @property
    def launch_count(self) -> int:
        """Number of launches."""
        return self.launches.total()

    @property
    def flops(self) -> dict[str, int]:
        """FLOPs by type of the operands."""
        totals: Tally[str] = Tally()
        for launch, count in self.launches.items():
            if launch.flops:
                totals[launch.dtype] += launch.flops * count
        return dict(totals)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Stand in for ``F.scaled_dot_product_attention``: one flash or one memory-efficient call.

    Without this a fake device decomposes attention into its matrices, and both the number of
    launches and the peak memory are wrong.

    Args:
        query: Shape [batch, heads, queries, channels]; missing leading dimensions count as one.
        key: Shape [batch, key heads, keys, channels].
        value: As ``key``.
        attn_mask: Boolean or additive, broadcastable to [batch, heads, queries, keys].
        dropout_p: Probability of dropping a weight.
        is_causal: Whether a query sees only the keys up to its own place.
        scale: Factor of the scores; default 1 / sqrt(channels).
        enable_gqa: Whether several query heads share one key head.

    Returns:
        Tensor of the shape of ``query``.
    """
    # Autocast treats attention as it treats a matrix product.
    kind = query.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        lower = torch.get_autocast_dtype(kind)
        query, key, value = (t.to(lower) for t in (query, key, value))
    if len({t.dtype for t in (query, key, value)}) > 1:
        raise RuntimeError(f"attention of {query.dtype}, {key.dtype} and {value.dtype}")
    if attn_mask is not None and (is_causal or not _can_mask(attn_mask)):
        raise RuntimeError("attention takes a boolean or additive mask, or is_causal, not both")
    if query.dim() > 3 and query.shape[-3] != key.shape[-3] and not enable_gqa:
        raise RuntimeError("attention with shared key heads needs enable_gqa=True")

    q, k, v = (t.reshape(-1, *t.shape[-3:]) if t.dim() != 4 else t for t in (query, key, value))
    if query.dim() == 3:
        q, k, v = (t.unsqueeze(0) for t in (query, key, value))

    # Flash takes half precision without a mask, and shares key heads by itself.
    if attn_mask is None and q.dtype in (torch.float16, torch.bfloat16):
        out = aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[
            0
        ]
        return out.reshape(query.shape[:-1] + value.shape[-1:])

    # The memory-efficient kernel wants one key head per query head and an additive mask.
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            zero = torch.zeros((), dtype=q.dtype, device=q.device)
            attn_mask = torch.where(attn_mask, zero, float("-inf"))
        attn_mask = attn_mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
    efficient = aten._scaled_dot_product_efficient_attention
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    out = efficient(q, k, v, attn_mask, needs_grad, dropout_p, is_causal, scale=scale)[0]
    return out.reshape(query.shape[:-1] + value.shape[-1:])


def _can_mask(mask: Tensor) -> bool:
    return mask.dtype == torch.bool or mask.dtype.is_floating_point


def traffic(name: str, read: list[Tensor], written: list[Tensor]) -> tuple[int, int]:
    """Bytes that an operation reads and writes.

    Args:
        name: Of the operation, without namespace.
        read: Its arguments on the device.
        written: What it writes there.
    """
    wrote = sum(map(nbytes, written))
    if name in LOOKUPS:  # the rows that are looked up, not the table
        return wrote + sum(map(nbytes, read[1:])), wrote
    if name in SCATTERS:
        return _scattered(read[0], read[1:])
    if name.endswith("_like") or name.startswith("new_"):  # only the shape is looked at
        return 0, wrote
    if name in _WRITES_ONLY:
        old = {id(tensor) for tensor in written}
        return sum(nbytes(tensor) for tensor in read if id(tensor) not in old), wrote
    return sum(map(nbytes, {id(t): t for t in read}.values())), wrote


def _scattered(table: Tensor, others: list[Tensor]) -> tuple[int, int]:
    """Bytes of indices and values, and of what they touch: one value may be written to many places."""
    indices = [tensor for tensor in others if tensor.dtype in (torch.int32, torch.int64)]
    values = [tensor for tensor in others if tensor.dtype not in (torch.int32, torch.int64)]
    given = sum(map(nbytes, others))
    if all(tensor.dim() == 0 for tensor in values) and indices:
        rows = max(index.numel() for index in indices)
        return given, min(rows * nbytes(table) // max(len(table), 1), nbytes(table))
    return given, given


def nbytes(tensor: Tensor) -> int:
    """Bytes of the elements that a tensor really has: an expanded dimension is stored once."""
    stored = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(stored) * tensor.element_size() if tensor.numel() else 0


def work(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, inputs: list[Tensor]
) -> tuple[int, str]:
    """FLOPs of an operation and the type of its operands ("tf32" where float32 may use it)."""
    name = func._schema.name.split("::")[1]
    floating = [t.dtype for t in inputs if t.dtype.is_floating_point]
    if name == "_int_mm":
        floating = [torch.int8]
    dtype = str(floating[0] if floating else "none").removeprefix("torch.")
    if name.startswith("_scaled_dot_product"):
        return _attention_flops(name, func, args, kwargs), dtype
    formula = flop_registry.get(func._overloadpacket) or _FORMULAS.get(name)
    flops = int(formula(*args, **kwargs, out_val=out)) if formula else 0
    if dtype == "float32" and flops and _tf32(name):
        dtype = "tf32"
    return flops, dtype


def _two_per_element(matrix: Tensor, *others: Any, out_val: Any) -> int:
    return 2 * matrix.numel()


# Products that torch's own table leaves out.
_FORMULAS: dict[str, Any] = {
    "mv": _two_per_element,
    "dot": _two_per_element,
    "addmv": lambda bias, matrix, *others, out_val, **kwargs: 2 * matrix.numel(),
    "_int_mm": lambda a, b, out_val: 2 * a.numel() * b.shape[1],
}


def _tf32(name: str) -> bool:
    if "conv" in name:
        return torch.backends.cudnn.conv.fp32_precision == "tf32"
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _attention_flops(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Two products forward, five backward; half of that where a query sees half of the keys."""
    backward = "backward" in name
    named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    query, key, value = named["query"], named["key"], named["value"]
    batch, heads, queries, channels = query.shape
    products = (
        2 * (channels * 3 + value.shape[-1] * 2) if backward else 2 * (channels + value.shape[-1])
    )
    flops = batch * heads * queries * key.shape[2] * products
    return flops // 2 if named.get("is_causal") else flops


def is_mask(value: object) -> bool:
    """Whether an index is a boolean tensor, whose number of rows depends on its values."""
    return isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)


def rows_for_masks(indices: list[Tensor | None], rows: int) -> list[Tensor | None]:
    """Indices in which each mask has become the positions of ``rows`` elements."""
    replaced: list[Tensor | None] = []
    for index in indices:
        if index is not None and is_mask(index):
            replaced += [index.new_empty(rows, dtype=torch.long) for _ in range(index.dim())]
        else:
            replaced.append(index)
    return replaced


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Tensors among arguments or results, and in the lists among them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


@functools.cache
def is_view(func: Any) -> bool:
    """Whether an operation returns its argument, seen otherwise."""
    return any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)


def mutated(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Arguments that an operation changes in place, such as the lists of a fused optimizer."""
    changed: list[Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info and argument.alias_info.is_write:
            changed += tensors_in([args[place] if place < len(args) else kwargs.get(argument.name)])
    return changed
