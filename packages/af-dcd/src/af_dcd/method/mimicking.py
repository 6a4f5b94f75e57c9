"""Masked feature mimicking: the student's masked map must regenerate the teacher's.

    A = align(F_s),  F^ = G(A * m),  L_fd = sum (F^ - F_t)^2 / b

The form of MGD (masked generative distillation), which Af-DCD builds on. Features enter raw: no
normalisation anywhere. Shapes: b images, c_s and c_t channels, h x w positions.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effml_common.parsing import require


def random_mask(like: Float[Tensor, "b c h w"], ratio: float) -> Float[Tensor, "b 1 h w"]:
    """Draw one for each position that is kept and zero for a share ``ratio``, image by image."""
    b, _, h, w = like.shape
    draw = torch.rand((b, 1, h, w), device=like.device)
    return (draw <= 1 - ratio).to(like.dtype)


def center_mask(like: Float[Tensor, "b c h w"]) -> Float[Tensor, "1 1 h w"]:
    """Make a mask that is zero in the middle third of both sides and one elsewhere."""
    h, w = like.shape[2:]
    mask = torch.ones((1, 1, h, w), device=like.device, dtype=like.dtype)
    mask[..., h // 3 : 2 * h // 3, w // 3 : 2 * w // 3] = 0
    return mask


class Generator(nn.Module):
    """Two 3x3 convolutions with a ReLU between them.

    A ``hidden`` below ``channels`` makes it cheap; the paper has none.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(channels, hidden, 3, padding=1)
        self.leave = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Regenerate a masked map."""
        return self.leave(self.enter(x).relu())


class EnhancedGenerator(Generator):
    """Two depths whose outputs are averaged; twice the weights of the plain block."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__(channels, hidden)
        self.deepen = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.leave_deep = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Regenerate a masked map."""
        shallow = self.enter(x).relu()
        deep = self.deepen(shallow).relu()
        return (self.leave(shallow) + self.leave_deep(deep)) / 2


class MaskedGeneration(nn.Module):
    """Align, mask and regenerate a student map in the teacher's channels; dropped at inference.

    Args:
        c_s: Channels of the student; equal to ``c_t``, no alignment is made.
        c_t: Channels of the teacher.
        mask_ratio: Share of positions that ``random`` zeroes, in [0, 1).
        mask: ``random`` draws anew at each call, ``center`` always zeroes the middle third.
        enhanced: The two-depth generator.
        hidden: Inner channels of the generator; None for ``c_t``, as in the paper.

    Raises:
        ConfigError: If ``mask_ratio`` or ``mask`` is out of range.

    >>> import torch
    >>> MaskedGeneration(4, 8, mask_ratio=0.5)(torch.randn(2, 4, 6, 6)).shape
    torch.Size([2, 8, 6, 6])
    """

    def __init__(
        self,
        c_s: int,
        c_t: int,
        *,
        mask_ratio: float = 0.75,
        mask: Literal["random", "center"] = "random",
        enhanced: bool = False,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        problem = f"mask_ratio is {mask_ratio}, and 1 would zero everything"
        require(0 <= mask_ratio < 1, problem, "give a share in [0, 1)")
        require(mask in ("random", "center"), f"mask is {mask!r}", "give random or center")

        # Equal widths need no alignment.
        self.mask_ratio, self.mask = mask_ratio, mask
        self.align = nn.Identity() if c_s == c_t else nn.Conv2d(c_s, c_t, 1)
        self.generator = (EnhancedGenerator if enhanced else Generator)(c_t, hidden or c_t)

    def forward(self, features: Float[Tensor, "b c_s h w"]) -> Float[Tensor, "b c_t h w"]:
        """Regenerate the teacher's map from a masked student map."""
        aligned = self.align(features)
        if self.mask == "center":
            return self.generator(aligned * center_mask(aligned))
        return self.generator(aligned * random_mask(aligned, self.mask_ratio))


def feature_loss(
    generated: Float[Tensor, "b c h w"],
    teacher: Float[Tensor, "b c h w"],
    reduction: Literal["sum", "mean"] = "sum",
) -> Float[Tensor, ""]:
    """Add up the squared error over the whole map, at masked positions and at others.

    Args:
        generated: The student's side; the gradient flows here only.
        teacher: Detached inside.
        reduction: ``sum`` over c, h and w and mean over images (the paper's weights belong to it), or
            ``mean`` over everything.
    """
    squared_error = (generated - teacher.detach()).square()
    return squared_error.sum() / len(generated) if reduction == "sum" else squared_error.mean()
