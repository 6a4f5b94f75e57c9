"""What calibration trains in a block: channel scaling, a low-rank correction, a clipping range.

Paper: "SliderQuant" (ICLR 2026, arXiv 2603.25284), learnable parameters; clipping as in the authors'
code. With the frozen weight W [out, in], W~ = scaled(W) + B A / r is what gets rounded, so nothing of it
remains at inference. A: [r, in], B: [out, r], u and l: one logit per row and group. Experts carry a
leading axis [experts] on all of them. Of weights that are rounded already, the scales are trained alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sliderquant.method.layout import ScalingSite, scale_channels
from sliderquant.method.packing import PackedCodes
from sliderquant.method.pieces import row_pieces, views_of_piece
from sliderquant.method.precision import product_dtype, without_autocast
from sliderquant.method.quantizer import (
    INITIAL_LOGIT,
    QuantizedWeight,
    WeightFormat,
    fake_quantize,
    quantize_weight,
    rescale,
    simulate_scale,
    simulate_storage,
)

UNQUANTIZED_BITS = 16
OPEN_LOGIT = 50.0  # its sigmoid is exactly one in float32: no clipping


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
        self.upper = nn.Parameter(torch.full((*experts, out_features, groups), INITIAL_LOGIT))
        self.lower = nn.Parameter(torch.full((*experts, out_features, groups), INITIAL_LOGIT))

        # The weight as ``error_compensation`` rounded it. Then nothing above is trained, and only
        # ``combined`` trains this: ln of a factor on each of its scales.
        self._closed_form: QuantizedWeight | PackedCodes | None = None
        self.log_rescale = nn.Parameter(torch.zeros_like(self.upper), requires_grad=False)

    @property
    def closed_form(self) -> QuantizedWeight | None:
        """The weight as ``error_compensation`` rounded it, ``None`` if it did not."""
        kept = self._closed_form
        return kept.unpack() if isinstance(kept, PackedCodes) else kept

    @closed_form.setter
    def closed_form(self, weight: QuantizedWeight | None) -> None:
        self._closed_form = weight

    @property
    def is_rounded(self) -> bool:
        """Whether there is a ``closed_form``."""
        return self._closed_form is not None

    def pack_codes(self) -> None:
        """Keep the codes of ``closed_form`` packed, in main memory; each reading unpacks them."""
        if isinstance(self._closed_form, QuantizedWeight):
            self._closed_form = PackedCodes.of(self._closed_form)

    def unpack_codes(self, device: torch.device) -> None:
        """Keep the codes of ``closed_form`` on a device, ready to be read many times."""
        if isinstance(self._closed_form, PackedCodes):
            self._closed_form = self._closed_form.unpack(device)

    @property
    def is_exact(self) -> bool:
        """Whether the weight is not rounded at all."""
        return self.fmt.bits == UNQUANTIZED_BITS

    def add_correction(self, weight: Float[Tensor, "*experts out in"]) -> Tensor:
        """Return W~ = W + B A / r in float32; W itself if the format keeps full precision."""
        if self.is_exact:
            return weight
        return _add_low_rank(weight, self.lora_a, self.lora_b)

    def forward(self, weight: Float[Tensor, "*experts out in"], ratio: float = 1.0) -> Tensor:
        """Return the simulated weight at intra-layer ratio ``ratio``, in float32."""
        if self.is_exact:
            return weight
        if (rounded := self._closed_form) is not None:
            # Packed codes go to the device as they are: they are the smallest there.
            packed = isinstance(rounded, PackedCodes)
            codes = rounded.unpack(weight.device) if packed else rounded.to(weight.device)
            values = simulate_storage(rescale(codes, self._trained_scale(codes)), self.fmt.dtype)
            return values.to(self.lora_b.dtype)
        return fake_quantize(self.add_correction(weight), self.fmt, self.upper, self.lower, ratio)

    def _trained_scale(self, weight: QuantizedWeight) -> Float[Tensor, "*experts out groups"]:
        """Return D exp(s) as it is stored, with a gradient for s; D itself where s is zero."""
        factor = self.log_rescale.exp().to(weight.scale.device)
        dtype = torch.promote_types(weight.scale.dtype, factor.dtype)
        return simulate_scale(weight.scale.to(dtype) * factor, self.fmt)

    def rescaled(self) -> QuantizedWeight | None:
        """Return ``closed_form`` with the scales that windows trained."""
        weight = self.closed_form
        if weight is None:
            return None
        return replace(weight, scale=self._trained_scale(weight).detach().to(self.fmt.scale_dtype))

    def forward_in_pieces(self, weight: Float[Tensor, "*experts out in"], ratio: float) -> Tensor:
        """Return what ``forward`` does, keeping nothing of the weight's size for the backward pass."""
        if self.is_exact:
            return weight
        trained = (self.lora_a, self.lora_b, self.upper, self.lower)
        return _SimulationInPieces.apply(self.fmt, ratio, weight, *trained)


class _SimulationInPieces(torch.autograd.Function):
    """Simulates a weight in pieces of some rows, and computes each again for the gradient.

    Rows do not depend on each other, so a piece is exact. The temporaries of autograd, about six times
    the weight, shrink to those of one piece.
    """

    @staticmethod
    def forward(ctx: Any, fmt: WeightFormat, ratio: float, *tensors: Tensor) -> Tensor:
        ctx.fmt, ctx.ratio = fmt, ratio
        ctx.save_for_backward(*tensors)
        weight = tensors[0]
        pieces = row_pieces(weight.shape, weight.device)
        if len(pieces) == 1:
            return _simulate_piece(fmt, ratio, *tensors).to(weight.dtype)

        result = torch.empty_like(weight)
        for index in pieces:
            result[index] = _simulate_piece(fmt, ratio, *views_of_piece(tensors, index))
        return result

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        # One gradient for the weight, A, B, u and l, where it is asked for.
        tensors = ctx.saved_tensors
        pieces = row_pieces(tensors[0].shape, tensors[0].device)
        if len(pieces) == 1:
            return (None, None, *_gradients_of_piece(ctx, tensors, outputs[0]))
        gradients = [
            torch.zeros_like(tensor) if is_needed else None
            for tensor, is_needed in zip(tensors, ctx.needs_input_grad[2:], strict=True)
        ]

        # Add the gradients of the pieces up; A belongs to all pieces of an expert.
        for index in pieces:
            of_piece = _gradients_of_piece(ctx, views_of_piece(tensors, index), outputs[0][index])
            for total, gradient in zip(views_of_piece(gradients, index), of_piece, strict=True):
                if gradient is not None:
                    total += gradient
        return (None, None, *gradients)


def _gradients_of_piece(ctx: Any, tensors: Sequence[Tensor], output: Tensor) -> list[Tensor | None]:
    """Compute a piece again, this time with a graph; return the gradients that are asked for."""
    views = [
        tensor.detach().requires_grad_(is_needed)
        for tensor, is_needed in zip(tensors, ctx.needs_input_grad[2:], strict=True)
    ]
    with torch.enable_grad():
        piece = _simulate_piece(ctx.fmt, ctx.ratio, *views)
    leaves = [view for view in views if view.requires_grad]
    gradients = iter(torch.autograd.grad(piece, leaves, output))
    return [next(gradients) if view.requires_grad else None for view in views]


def _simulate_piece(
    fmt: WeightFormat,
    ratio: float,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    upper: Tensor,
    lower: Tensor,
) -> Tensor:
    """Return some rows of the simulated weight, from the same rows of what it is made of."""
    return fake_quantize(_add_low_rank(weight, a, b), fmt, upper, lower, ratio)


def _add_low_rank(
    weight: Float[Tensor, "*experts out in"],
    a: Float[Tensor, "*experts r in"],
    b: Float[Tensor, "*experts out r"],
) -> Float[Tensor, "*experts out in"]:
    """Return W~ = W + B A / r, in the type of A and B whatever autocast says."""
    with without_autocast(weight.device):
        return weight.to(b.dtype) + b @ a / a.shape[-2]


class BlockLearnables(nn.Module):
    """Trainable parameters of one decoder block.

    Args:
        weights: The block's linear weights by parameter name; only their shapes are read.
        fmt: Storage format.
        rank: Rank of the correction.
        generator: Source of the initial values.
        sites: Channel scalings to train; alpha starts at one.
        clipping: Train the clipping range; else it is open and stays so.
        formats: Storage formats of weights that differ; those of 16 bits are stored as they are.
        dtype: Type of gains, biases and weights that are not rounded; default that of ``fmt``.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        fmt: WeightFormat,
        rank: int,
        generator: torch.Generator,
        sites: Sequence[ScalingSite] = (),
        clipping: bool = True,
        *,
        formats: Mapping[str, WeightFormat] = MappingProxyType({}),
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fmt, self.dtype = fmt, dtype or fmt.dtype
        self.clipping = clipping

        # Of each linear layer: its correction and its clipping range.
        self.names = tuple(weights)
        self.linears: Any = nn.ModuleList(
            LinearLearnables(weight.shape, formats.get(name, fmt), rank, generator)
            for name, weight in weights.items()
        )
        self.ignored = frozenset(n for n, f in formats.items() if f.bits == UNQUANTIZED_BITS)
        if not clipping:
            for linear in self.linears:
                nn.init.constant_(linear.upper, OPEN_LOGIT)
                nn.init.constant_(linear.lower, OPEN_LOGIT)

        # Of each site: the factors of its channels.
        self.sites = tuple(sites)
        self.factors = nn.ParameterList(torch.ones(site.size) for site in sites)

        # Which experts see enough tokens to be trained; ``None`` for all, or without experts.
        self.trained_experts: Bool[Tensor, " experts"] | None = None

        # Simulating a weight leaves about six copies of it for the backward pass; it is recomputed
        # instead for models of which a window would not fit.
        self.recompute = False

    def forward(self, tensors: Mapping[str, Tensor], ratio: float = 1.0) -> dict[str, Tensor]:
        """Return the simulated parameters by name, for ``torch.func.functional_call`` on the block.

        Args:
            tensors: Parameters of the block; with sites all of them, else the linear weights suffice.
            ratio: Share of columns that are quantized.
        """
        scaled = scale_channels(tensors, self.sites, list(self.factors))
        # Scaled gains and biases are stored in the checkpoint's type; simulate that too.
        simulated = {name: simulate_storage(value, self.dtype) for name, value in scaled.items()}
        for name, linear in zip(self.names, self.linears, strict=True):
            weight = scaled.get(name, tensors[name])
            if linear.is_exact:  # scaled or rotated, it reads back in the checkpoint's type
                weight = simulate_storage(weight, self.dtype)
            if self.recompute and torch.is_grad_enabled() and not linear.is_rounded:
                value = linear.forward_in_pieces(weight, ratio)
            else:
                value = linear(weight, ratio)
            # Autocast would convert the weight of a linear layer at each use, this does it once.
            simulated[name] = value.to(product_dtype(value)) if value.ndim == 2 else value
        return simulated

    @torch.no_grad()
    def merge(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters that changed, before rounding: W~ and scaled gains and biases.

        Weights whose codes were solved in closed form have no correction.
        """
        merged = scale_channels(tensors, self.sites, list(self.factors))
        for name, linear in zip(self.names, self.linears, strict=True):
            if not linear.is_rounded:
                merged[name] = linear.add_correction(merged.get(name, tensors[name]))
        return merged

    @torch.no_grad()
    def to_storage(
        self, tensors: Mapping[str, Tensor], rounded: bool = True
    ) -> dict[str, Tensor | QuantizedWeight]:
        """Return every parameter as it is to be stored: codes, or floats in the stored type.

        Args:
            tensors: All parameters of the block.
            rounded: Round the weights; else W~ is returned, for another quantizer to finish.
        """
        stored: dict[str, Tensor | QuantizedWeight] = {}
        for name, value in (dict(tensors) | self.merge(tensors)).items():
            linear = self.linear(name) if rounded and name in self.names else None
            if linear is None or linear.is_exact:
                stored[name] = value.to(self.dtype)
            else:
                stored[name] = linear.rescaled() or quantize_weight(
                    value, linear.fmt, linear.upper, linear.lower
                )
        return stored

    def linear(self, name: str) -> LinearLearnables:
        """Return what is trained for one weight."""
        return self.linears[self.names.index(name)]

    def rounded_formats(self) -> dict[str, WeightFormat]:
        """Return the storage formats of the weights that are rounded, by name."""
        pairs = zip(self.names, self.linears, strict=True)
        return {name: linear.fmt for name, linear in pairs if not linear.is_exact}

    def pack_codes(self) -> None:
        """Keep the codes of weights that were solved in closed form packed, in main memory."""
        for linear in self.linears:
            linear.pack_codes()

    def unpack_codes(self, device: torch.device) -> None:
        """Keep the codes of weights that were solved in closed form on a device, to train with them."""
        for linear in self.linears:
            linear.unpack_codes(device)

    def forget_codes(self) -> None:
        """Free the weights that were solved in closed form."""
        for linear in self.linears:
            linear.closed_form = None

    def train_scales(self) -> None:
        """Train the scales of the codes that are there, and nothing else."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.endswith("log_rescale"))

    def trained_by(self, method: str) -> dict[str, Tensor]:
        """Return by name what the windows of a method train, or choose before them."""
        return {
            name: value
            for name, value in self.state_dict().items()
            if name.endswith("log_rescale") == (method == "combined")
        }

    def parameter_groups(
        self, lr_lora: float, lr_lwc: float, lr_scale: float = 0.0, lr_range: float = 0.0
    ) -> list[dict]:
        """Return the optimizer's groups: corrections, clipping logits, channel factors, and their rates.

        Where weights are rounded already, the factors on their scales alone: everything else is final.
        """
        rounded = [linear.log_rescale for linear in self.linears if linear.is_rounded]
        if rounded:
            return [{"params": rounded, "lr": lr_range}]

        groups = []
        if corrected := [linear for linear in self.linears if not linear.is_exact]:
            lora = [p for linear in corrected for p in (linear.lora_a, linear.lora_b)]
            groups.append({"params": lora, "lr": lr_lora})
            if self.clipping:
                logits = [p for linear in corrected for p in (linear.upper, linear.lower)]
                groups.append({"params": logits, "lr": lr_lwc})
        if self.sites:
            groups.append({"params": list(self.factors), "lr": lr_scale})
        return groups

    def mask_gradients_(self) -> None:
        """Zero the gradients of experts that saw too few tokens: they keep their initial values."""
        if self.trained_experts is None:
            return
        for linear in self.linears:
            for parameter in linear.parameters():
                if parameter.ndim == 3 and parameter.grad is not None:
                    parameter.grad.masked_fill_(~self.trained_experts[:, None, None], 0)
