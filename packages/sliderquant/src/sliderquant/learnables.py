"""What calibration trains: a low-rank weight correction and a clipping range per linear layer.

Paper: "SliderQuant" (ICLR 2026, arXiv 2603.25284), learnable parameters; clipping as in the authors'
code. Frozen weight W [out, in]; W~ = W + B A / r is what gets rounded, so nothing of it remains at
inference. A: [r, in], B: [out, r], u and l: one logit per row and group.
"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sliderquant.quantizer import LOGIT_INIT, WeightFormat, fake_quantize


class LinearLearnables(nn.Module):
    """Trainable parameters of one linear layer, in float32 whatever the weight's type.

    Args:
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        fmt: Storage format; sets the number of groups.
        rank: Rank r of the correction.
        generator: Source of the initial A; B starts at zero, so calibration starts at
            round-to-nearest with a clipping of 0.982.
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        fmt: WeightFormat,
        rank: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.fmt = fmt
        self.rank = rank
        groups = in_features // fmt.columns_per_group(in_features)
        # Kaiming-uniform with a = sqrt(5), torch's own default for nn.Linear.
        bound = 1 / math.sqrt(in_features)
        a = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
        self.lora_a = nn.Parameter(a)
        self.lora_b = nn.Parameter(torch.zeros(out_features, rank))
        self.upper = nn.Parameter(torch.full((out_features, groups), LOGIT_INIT))
        self.lower = nn.Parameter(torch.full((out_features, groups), LOGIT_INIT))

    def corrected(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return W~ = W + B A / r in float32."""
        return weight.float() + self.lora_b @ self.lora_a / self.rank

    def forward(
        self, weight: Float[Tensor, "out in"], ratio: float = 1.0
    ) -> Float[Tensor, "out in"]:
        """Return the simulated weight at intra-layer ratio ``ratio``, in float32."""
        return fake_quantize(self.corrected(weight), self.fmt, self.upper, self.lower, ratio)


class BlockLearnables(nn.Module):
    """Trainable parameters of one decoder block.

    Args:
        weights: The block's linear weights [out, in] by parameter name, as in ``named_parameters``.
        fmt: Storage format.
        rank: Rank of the correction.
        generator: Source of the initial values.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        fmt: WeightFormat,
        rank: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.names = tuple(weights)
        self.linears = nn.ModuleList(
            LinearLearnables(*weight.shape, fmt, rank, generator) for weight in weights.values()
        )

    def forward(self, weights: Mapping[str, Tensor], ratio: float = 1.0) -> dict[str, Tensor]:
        """Return the simulated weights by name, for ``torch.func.functional_call`` on the block."""
        return {
            name: learnables(weights[name], ratio)
            for name, learnables in zip(self.names, self.linears, strict=True)
        }

    def parameter_groups(self, lr_lora: float, lr_lwc: float) -> list[dict]:
        """Return the optimizer's groups: corrections and clipping logits with their own rates."""
        lora = [p for linear in self.linears for p in (linear.lora_a, linear.lora_b)]
        clipping = [p for linear in self.linears for p in (linear.upper, linear.lower)]
        return [{"params": lora, "lr": lr_lora}, {"params": clipping, "lr": lr_lwc}]
