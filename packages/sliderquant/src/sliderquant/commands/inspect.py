"""What a calibration will do and need, known before it starts: the ``inspect`` command."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from sliderquant.adapters.layer_bits import (
    BlockFormats,
    block_formats,
    describe_bits,
    layer_bits,
    mean_bits_per_weight,
)
from sliderquant.adapters.shapes import ModelShape, check_linears, model_shape
from sliderquant.config import FULL_BITS, InspectConfig, SliderConfig
from sliderquant.method.expert_rounding import expert_passes
from sliderquant.method.window_training import RECOMPUTE_ABOVE
from sliderquant.method.windows import block_visits, make_windows

PLANNED_DTYPE = torch.bfloat16  # of scales and of layers that are left out


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Windows, cost and memory of a calibration.

    Attributes:
        windows: Block numbers per window.
        block_visits: Sum of the window sizes; times the epochs it is the cost of the windows.
        stages: Passes over the windows (intra-layer stages).
        rounded_blocks: Blocks that are rounded in closed form, before any window.
        updates: Optimizer updates in all.
        rounding_steps: Updates that take about as long as it takes to round one block.
        bits_per_weight: Stored bits per linear weight, scales included; needs a model.
        layer_bits: How many layers have how many bits, where they differ.
        memory_gib: Peak memory by part, GiB; needs a model.
        lean: Whether blocks are computed again in the backward pass to save memory.
    """

    windows: list[list[int]]
    block_visits: int
    stages: int
    updates: int
    rounded_blocks: int
    rounding_steps: int = 1
    bits_per_weight: float | None = None
    layer_bits: str | None = None
    memory_gib: dict[str, float] | None = None
    lean: bool = False

    @property
    def steps(self) -> int:
        """Steps of a progress bar: updates, and rounded blocks as many as take as long."""
        return self.rounded_blocks * self.rounding_steps + self.updates

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        return asdict(self)

    def __rich__(self) -> Table:
        """Return the plan as a table."""
        table = Table(title="calibration plan", show_header=False)
        spans = (f"{w[0]}-{w[-1]}" if len(w) > 1 else str(w[0]) for w in self.windows)
        table.add_row("blocks rounded one after the other", str(self.rounded_blocks))
        if self.windows:
            table.add_row("windows", " ".join(spans))
            table.add_row("number of windows", str(len(self.windows)))
            table.add_row("block visits per epoch", str(self.block_visits))
            table.add_row("intra-layer stages", str(self.stages))
            table.add_row("optimizer updates", str(self.updates))
        if self.bits_per_weight is not None:
            table.add_row("bits per quantized weight", f"{self.bits_per_weight:.3f}")
        if self.layer_bits is not None:
            table.add_row("bits of layers", self.layer_bits)
        for part, size in (self.memory_gib or {}).items():
            table.add_row(f"memory: {part}", f"{size:.2f} GiB")
        if self.memory_gib:
            total = sum(self.memory_gib.values())
            table.add_row("memory in all, in float32 as on a CPU, at most", f"{total:.2f} GiB")
        return table


def make_plan(config: SliderConfig, shape: ModelShape | None, layers: int) -> Plan:
    """Return what a calibration with ``config`` does to a model of ``layers`` blocks.

    Args:
        config: Method settings.
        shape: Sizes of the model, if known: adds bits per weight and memory.
        layers: Number of decoder blocks.

    Raises:
        ConfigError: If the windows do not fit.
    """
    # Blocks in which nothing is rounded need no window of their own.
    all_bits = [] if shape is None else layer_bits(config, shape.blocks)
    is_rounded = [set(of_block.values()) != {FULL_BITS} for of_block in all_bits]
    is_rounded = is_rounded or [config.wbits != FULL_BITS] * layers
    trained = [block for block in range(layers) if is_rounded[block] or config.only_scales]
    windows = []
    if trained and config.method != "compensated":
        windows = [w for w in make_windows(layers, config) if not set(trained).isdisjoint(w)]

    # Updates follow from the windows.
    batches = -(-config.nsamples // config.batch_size)
    updates = config.stages * len(windows) * (config.window_epochs // config.stages) * batches

    # A sample costs about as many passes through a block in either phase.
    visits = block_visits(windows)
    rounding_steps = max(1, batches * len(windows) // visits) if windows else 1

    # Bits and memory need the sizes of the weights.
    bits = memory = None
    lean = False
    if shape is not None:
        formats = [block_formats(config, of_block, PLANNED_DTYPE) for of_block in all_bits]
        bits = mean_bits_per_weight(shape.blocks, formats, PLANNED_DTYPE)
        largest = _largest_window(windows, shape)
        lean = sum(shape.weights()[block] for block in largest) > RECOMPUTE_ABOVE
        memory = _memory(config, shape, largest, lean, formats)

    return Plan(
        windows=windows,
        block_visits=visits,
        stages=config.stages,
        updates=updates,
        rounded_blocks=0 if config.method == "slider" else sum(is_rounded),
        rounding_steps=rounding_steps,
        bits_per_weight=bits,
        layer_bits=describe_bits(all_bits) if config.has_mixed_bits else None,
        memory_gib=memory,
        lean=lean,
    )


def _largest_window(windows: list[list[int]], shape: ModelShape) -> list[int]:
    """Return the blocks that hold the most weights together; a single one without windows."""
    weights = shape.weights()
    candidates = windows or [[block] for block in range(shape.layers)]
    return max(candidates, key=lambda window: sum(weights[block] for block in window))


def _memory(
    config: SliderConfig,
    shape: ModelShape,
    largest_window: list[int],
    lean: bool,
    formats: Sequence[BlockFormats],
) -> dict[str, float]:
    """Return the parts of the peak, in float32: with rounding and windows, those of the larger one."""
    rounded = [
        (shapes[name], fmt)
        for shapes, of_block in zip(shape.blocks, formats, strict=True)
        for name, fmt in of_block.items()
        if fmt.bits != FULL_BITS
    ]
    phases = []
    if config.method != "compensated":
        phases.append(_memory_of_windows(config, shape, largest_window, lean))
    if config.method != "slider":
        phases.append(_memory_of_rounding(config, shape, [weight for weight, _ in rounded]))

    # Codes stay for what comes behind the rounding; the embedding is in memory at the start and the end.
    parts = max(phases, key=lambda phase: sum(phase.values()))
    weights = shape.weights()
    if config.method == "combined":
        of_window = sum(weights[block] for block in largest_window)
        parts["codes of the window"] = 2 * of_window / 2**30
    codes = sum(fmt.bits / 8 * math.prod(weight) for weight, fmt in rounded)
    if config.method != "slider" and codes:
        condition = " (with eval text)" if config.method == "compensated" else ""
        parts[f"codes of all blocks{condition}"] = codes / 2**30
    parts["embedding, as it is and as it is written"] = 2 * 4 / 2**30 * shape.embedding
    return parts


def _memory_of_windows(
    config: SliderConfig, shape: ModelShape, largest_window: list[int], lean: bool
) -> dict[str, float]:
    """Caches, and the working copies of the largest window."""
    float32 = 4 / 2**30
    seqlen = min(config.seqlen, shape.context)
    of_blocks = shape.weights()
    window = sum(of_blocks[block] for block in largest_window)
    # Autograd keeps about six temporaries of a weight's size through its fake quantizer; where blocks
    # are computed again, it keeps one block's simulated weights and a gradient or two.
    largest = max(map(math.prod, shape.linears.values()))
    simulated = max(of_blocks) + 2 * largest if lean else 6 * window
    return {
        "weights of the window": float32 * window,
        "simulation of the window": float32 * simulated,
        "activation caches": float32 * 3 * config.nsamples * seqlen * shape.hidden,
    }


def _memory_of_rounding(
    config: SliderConfig, shape: ModelShape, weights: Sequence[tuple[int, ...]]
) -> dict[str, float]:
    """What compensated rounding holds: one block, and what it takes to round its largest layer.

    Args:
        config: How many tokens there are.
        shape: Sizes of the model.
        weights: Shapes of the weights that are rounded.
    """
    of_block = max(shape.weights())
    # The block once more as it is rounded, eight tensors of the size of the largest layer or expert, and
    # two copies of the codes and one of the values of all experts.
    solved = [weight[-2:] for weight in weights]
    fused = [weight for weight in weights if len(weight) > 2]
    rounded = 4 * (of_block + 8 * max(map(math.prod, solved), default=0))
    rounded += 8 * max(map(math.prod, fused), default=0)
    # X^T X, a reordered copy, its factor and X^T E in float64; X^T X of many experts.
    moments = 4 * 8 * max((columns**2 for _, columns in solved), default=0)
    moments += max(
        (8 * columns**2 * len(expert_passes(n, columns)[0]) for n, _, columns in fused), default=0
    )
    # What the attention's output projection reads, in both models.
    tokens = config.nsamples * min(config.seqlen, shape.context)
    return {
        "weights of the block": 4 * of_block / 2**30,
        "rounding of the largest layer": rounded / 2**30,
        "moments of the largest layer": moments / 2**30,
        "activation caches": 4 * 4 * tokens * shape.hidden / 2**30,
    }


def inspect(config: InspectConfig) -> Plan:
    """Return windows, cost and memory for a model directory or a number of layers.

    Raises:
        InputError: If the model is not supported or the settings do not fit it.

    >>> from sliderquant.config import InspectConfig
    >>> plan = inspect(InspectConfig(layers=4, method="slider", shallow=2, deep=2))
    >>> plan.windows
    [[0], [0, 1], [1, 2], [2, 3], [3]]
    >>> plan.block_visits
    8
    """
    if config.model is None:
        assert config.layers is not None  # checked by the config
        return make_plan(config, None, config.layers)
    from sliderquant.adapters.hub import model_directory

    shape = model_shape(model_directory(config.model, weights=False))
    for linears, bits in zip(shape.blocks, layer_bits(config, shape.blocks), strict=True):
        kept = config.has_mixed_bits  # layers that are left out fit any group size
        rounded = {n: s for n, s in linears.items() if not (kept and bits[n] == FULL_BITS)}
        check_linears(rounded, config)
    return make_plan(config, shape, shape.layers)
