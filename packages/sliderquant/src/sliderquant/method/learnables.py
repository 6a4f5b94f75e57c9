"""What calibration trains in a block: channel scaling, a low-rank correction, a clipping range.

Paper: "SliderQuant" (ICLR 2026, arXiv 2603.25284), learnable parameters; clipping as in the authors'
code. Frozen weight W [out, in]; W~ = scaled(W) + B A / r is what gets rounded, so nothing of it remains
at inference. A: [r, in], B: [out, r], u and l: one logit per row and group. Experts carry a leading axis
[experts] on all of them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sliderquant.method.layout import Site, scale_channels
from sliderquant.method.quantizer import (
    LOGIT_INIT,
    QuantizedWeight,
    WeightFormat,
    fake_quantize,
    stored,
)

UNQUANTIZED_BITS = 16
PIECE = 2**17
OPEN_LOGIT = 50.0  # its sigmoid is exactly one in float32


class LinearLearnables(nn.Module):
    """Trainable parameters of one linear layer, in float32 whatever the weight's type.

    Args:
        shape: Of the weight, [out, in] or [experts, out, in].
        fmt: Storage format; sets the number of groups.
        rank: Rank r of the correction.
        generator: Source of the initial A; B starts at zero, so calibration starts at
            round-to-nearest with a clipping of 0.982.
    """

    def __init__(
        self, shape: Sequence[int], fmt: WeightFormat, rank: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.fmt = fmt
        self.rank = rank
        *experts, out_features, in_features = shape
        groups = in_features // fmt.columns_per_group(in_features)
        # Kaiming-uniform with a = sqrt(5), torch's own default for nn.Linear.
        bound = 1 / math.sqrt(in_features)
        a = torch.empty(*experts, rank, in_features).uniform_(-bound, bound, generator=generator)
        self.lora_a = nn.Parameter(a)
        self.lora_b = nn.Parameter(torch.zeros(*experts, out_features, rank))
        self.upper = nn.Parameter(torch.full((*experts, out_features, groups), LOGIT_INIT))
        self.lower = nn.Parameter(torch.full((*experts, out_features, groups), LOGIT_INIT))
        # Codes that were decided otherwise, see ``error_compensation``; then nothing here is trained.
        self.rounded: QuantizedWeight | None = None

    def corrected(self, weight: Float[Tensor, "*experts out in"]) -> Tensor:
        """Return W~ = W + B A / r in float32; W itself if the format keeps full precision."""
        if self.fmt.bits == UNQUANTIZED_BITS:
            return weight
        return weight.to(self.lora_b.dtype) + self.lora_b @ self.lora_a / self.rank

    def forward(self, weight: Float[Tensor, "*experts out in"], ratio: float = 1.0) -> Tensor:
        """Return the simulated weight at intra-layer ratio ``ratio``, in float32."""
        if self.fmt.bits == UNQUANTIZED_BITS:
            return weight
        if self.rounded is not None:
            return self.rounded.to(weight.device).dequantize().to(self.lora_b.dtype)
        return fake_quantize(self.corrected(weight), self.fmt, self.upper, self.lower, ratio)

    def lean(self, weight: Float[Tensor, "*experts out in"], ratio: float) -> Tensor:
        """Return what ``forward`` does, keeping nothing of the weight's size for the backward pass."""
        if self.fmt.bits == UNQUANTIZED_BITS:
            return weight
        trained = (self.lora_a, self.lora_b, self.upper, self.lower)
        return _RowByRow.apply(self.fmt, ratio, weight, *trained)


def _pieces(shape: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """Yield indices of row blocks of about a hundred thousand weights, never of two experts."""
    *experts, rows, columns = shape
    step = max(1, PIECE // columns)
    for expert in range(experts[0]) if experts else [None]:
        for first in range(0, rows, step):
            block = slice(first, first + step)
            yield (block,) if expert is None else (expert, block)


def _cut(tensors: Sequence[Tensor | None], index: tuple[Any, ...]) -> list[Tensor | None]:
    """Return the views of (weight, A, B, u, l) that belong to a piece; all its rows share A."""
    expert = index[:-1]
    return [
        None if t is None else t[expert] if position == 1 else t[index]
        for position, t in enumerate(tensors)
    ]


def _simulated_piece(
    fmt: WeightFormat,
    ratio: float,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    upper: Tensor,
    lower: Tensor,
) -> Tensor:
    return fake_quantize(weight + b @ a / a.shape[0], fmt, upper, lower, ratio)


class _RowByRow(torch.autograd.Function):
    """Simulates a weight a few rows at a time, and computes them again for the gradient.

    Rows do not depend on each other, so a piece is exact. The temporaries of autograd, about six times
    the weight, shrink to those of one piece, which also stay in the processor's cache.
    """

    @staticmethod
    def forward(ctx: Any, fmt: WeightFormat, ratio: float, *tensors: Tensor) -> Tensor:
        ctx.fmt, ctx.ratio = fmt, ratio
        ctx.save_for_backward(*tensors)
        weight = tensors[0]
        result = torch.empty_like(weight)
        for index in _pieces(weight.shape):
            result[index] = _simulated_piece(fmt, ratio, *_cut(tensors, index))
        return result

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        gradients = [
            torch.zeros_like(t) if w else None for t, w in zip(tensors, wanted, strict=True)
        ]
        for index in _pieces(tensors[0].shape):
            parts = [
                part.detach().requires_grad_(w)
                for part, w in zip(_cut(tensors, index), wanted, strict=True)
            ]
            with torch.enable_grad():
                piece = _simulated_piece(ctx.fmt, ctx.ratio, *parts)
            found = iter(
                torch.autograd.grad(piece, [p for p in parts if p.requires_grad], outputs[0][index])
            )
            for target in _cut(gradients, index):
                if target is not None:
                    target += next(found)
        return (None, None, *gradients)


class BlockLearnables(nn.Module):
    """Trainable parameters of one decoder block.

    Args:
        weights: The block's linear weights by parameter name; only their shapes are read.
        fmt: Storage format.
        rank: Rank of the correction.
        generator: Source of the initial values.
        sites: Channel scalings to train; alpha starts at one.
        clipping: Train the clipping range; else it is open and stays so.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        fmt: WeightFormat,
        rank: int,
        generator: torch.Generator,
        sites: Sequence[Site] = (),
        clipping: bool = True,
    ) -> None:
        super().__init__()
        self.fmt = fmt
        self.clipping = clipping
        self.names = tuple(weights)
        self.linears = nn.ModuleList(
            LinearLearnables(weight.shape, fmt, rank, generator) for weight in weights.values()
        )
        if not clipping:
            for linear in self.linears:
                nn.init.constant_(linear.upper, OPEN_LOGIT)
                nn.init.constant_(linear.lower, OPEN_LOGIT)
        self.sites = tuple(sites)
        self.factors = nn.ParameterList(torch.ones(site.size) for site in sites)
        self.trained_experts: Bool[Tensor, " experts"] | None = None
        # Simulating a weight leaves about six copies of it for the backward pass; recomputed instead
        # for models of which a window would not fit.
        self.recompute = False

    def forward(self, tensors: Mapping[str, Tensor], ratio: float = 1.0) -> dict[str, Tensor]:
        """Return the simulated parameters by name, for ``torch.func.functional_call`` on the block.

        Args:
            tensors: Parameters of the block; with sites all of them, else the linear weights suffice.
            ratio: Share of columns that are quantized.
        """
        scaled = scale_channels(tensors, self.sites, list(self.factors))
        # Scaled gains and biases are stored in the checkpoint's type; simulate that too.
        simulated = {name: stored(value, self.fmt) for name, value in scaled.items()}
        for name, linear in zip(self.names, self.linears, strict=True):
            weight = scaled.get(name, tensors[name])
            if self.recompute and torch.is_grad_enabled():
                simulated[name] = linear.lean(weight, ratio)
            else:
                simulated[name] = linear(weight, ratio)
        return simulated

    @torch.no_grad()
    def merged(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters that changed, before rounding: W~ and scaled gains and biases.

        Weights whose codes were decided in closed form have no correction.
        """
        scaled = scale_channels(tensors, self.sites, list(self.factors))
        for name, linear in zip(self.names, self.linears, strict=True):
            if linear.rounded is None:
                scaled[name] = linear.corrected(scaled.get(name, tensors[name]))
        return scaled

    def linear(self, name: str) -> LinearLearnables:
        """Return what is trained for one weight."""
        return self.linears[self.names.index(name)]

    def codes_to(self, device: torch.device | str) -> None:
        """Keep the codes that were decided in closed form on a device."""
        for linear in self.linears:
            if linear.rounded is not None:
                linear.rounded = linear.rounded.to(device)

    def forget_codes(self) -> None:
        """Free the codes that were decided in closed form."""
        for linear in self.linears:
            linear.rounded = None

    def parameter_groups(self, lr_lora: float, lr_lwc: float, lr_scale: float = 0.0) -> list[dict]:
        """Return the optimizer's groups: corrections, clipping logits and factors, with their rates."""
        groups = []
        if self.fmt.bits != UNQUANTIZED_BITS:
            lora = [p for linear in self.linears for p in (linear.lora_a, linear.lora_b)]
            groups.append({"params": lora, "lr": lr_lora})
            if self.clipping:
                logits = [p for linear in self.linears for p in (linear.upper, linear.lower)]
                groups.append({"params": logits, "lr": lr_lwc})
        if self.sites:
            groups.append({"params": list(self.factors), "lr": lr_scale})
        return groups

    def mask_gradients_(self) -> None:
        """Zero the gradients of experts that saw too few tokens: they stay as they were made."""
        if self.trained_experts is None:
            return
        for linear in self.linears:
            for parameter in linear.parameters():
                if parameter.ndim == 3 and parameter.grad is not None:
                    parameter.grad[~self.trained_experts] = 0
