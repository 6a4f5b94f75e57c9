"""Modules whose weight stays packed in memory and is dequantized when it is used.

A forward pass unpacks one weight at a time; between passes a 2-bit weight in groups of 64 takes 2.25
bits per entry. ``packed_linear`` is all the arithmetic there is.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sliderquant.method.packing import unpacked_weight, words
from sliderquant.method.quantizer import QuantizedWeight, WeightFormat


def packed_linear(
    x: Float[Tensor, "*batch in"],
    packed: Int[Tensor, "out w"],
    scale: Float[Tensor, "out groups"],
    zero: Int[Tensor, "z groups"] | None,
    bias: Float[Tensor, " out"] | None,
    fmt: WeightFormat,
) -> Float[Tensor, "*batch out"]:
    """Dequantize and multiply: y = x ((q - z) D)^T + bias, in the dtype of ``x``."""
    weight = unpacked_weight(packed, scale, zero, x.shape[-1], fmt).dequantize()
    return nn.functional.linear(x, weight.to(x.dtype), bias)


class PackedWeight(nn.Module):
    """The stored tensors of one weight, named as in the files.

    Args:
        shape: [out, in], or [experts, out, in].
        fmt: Storage format.
        dtype: Type in which ``weight`` is returned; ``to`` changes it with that of the model.
        device: Where the (empty) tensors are created.
    """

    def __init__(
        self,
        shape: torch.Size,
        fmt: WeightFormat,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.shape, self.fmt = shape, fmt
        # Holds nothing but a type: that of what the weight is multiplied with.
        like = torch.empty(0, dtype=dtype or fmt.dtype)
        self.register_buffer("like", like, persistent=False)
        *experts, rows, columns = shape
        groups = columns // fmt.columns_per_group(columns)

        def empty(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(*experts, *size, dtype=dtype, device=device)

        # Buffers, because no gradient flows to them.
        self.register_buffer("weight_packed", empty(rows, words(columns, fmt.bits)))
        self.register_buffer("weight_scale", empty(rows, groups, dtype=fmt.scale_dtype))
        zero = None if fmt.sym else empty(words(rows, fmt.bits), groups)
        self.register_buffer("weight_zero_point", zero)
        self.register_buffer(
            "weight_shape", torch.empty(len(shape), dtype=torch.int64, device=device)
        )

    @property
    def weight(self) -> Float[Tensor, "*experts out in"]:
        """The dequantized weight, computed anew at every access."""
        return self.unpack().dequantize().to(self.get_buffer("like").dtype)

    def unpack(self) -> QuantizedWeight:
        """Return codes and grid."""
        return unpacked_weight(
            self.get_buffer("weight_packed"),
            self.get_buffer("weight_scale"),
            self._buffers["weight_zero_point"],
            self.shape[-1],
            self.fmt,
        )

    def extra_repr(self) -> str:
        """Shape and format, for printing."""
        group = self.fmt.group_size or "row"
        return f"{list(self.shape)}, {self.fmt.bits} bits per {group}, sym={self.fmt.sym}"


class PackedLinear(PackedWeight):
    """A linear layer with a packed weight.

    Args:
        linear: The layer it stands in for; its bias is taken over.
        fmt: Storage format.
        kernel: Use the Triton kernel for few rows.
    """

    def __init__(self, linear: nn.Linear, fmt: WeightFormat, kernel: bool = False) -> None:
        super().__init__(linear.weight.shape, fmt, linear.weight.dtype)
        self.kernel = kernel
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Dequantize and multiply."""
        packed, scale = self.get_buffer("weight_packed"), self.get_buffer("weight_scale")
        zero = self._buffers["weight_zero_point"]

        # Few rows, as in decoding: the kernel multiplies without writing the weight out.
        if self.kernel:
            from sliderquant.kernels.packed_gemv import ROWS, packed_gemv

            rows = x.reshape(-1, self.in_features)
            if len(rows) <= ROWS:
                y = packed_gemv(rows, packed, scale, zero, self.fmt.bits)
                y = y if self.bias is None else y + self.bias
                return y.view(*x.shape[:-1], self.out_features)

        return packed_linear(x, packed, scale, zero, self.bias, self.fmt)


def pack_parameter_(module: nn.Module, name: str, fmt: WeightFormat) -> None:
    """Replace a parameter of a module by packed tensors; reading it dequantizes, in place.

    The module gets a class of its own, in which ``name`` is a property: its code goes on to read
    ``self.<name>`` as before. Meant for the fused weights of experts.
    """
    parameter = module.get_parameter(name)
    packed = PackedWeight(parameter.shape, fmt, parameter.dtype)
    del module._parameters[name]
    # Not add_module, which refuses a name that the class has a property for.
    module._modules[name] = packed

    def read(self: nn.Module) -> Tensor:
        return self._modules[name].weight  # pyright: ignore[reportOptionalMemberAccess, reportReturnType]

    own_class = type(module)
    module.__class__ = type(own_class.__name__, (own_class,), {name: property(read)})
