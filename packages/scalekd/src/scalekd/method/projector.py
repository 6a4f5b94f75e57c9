"""The cross attention projector (CAP): student maps in, tokens of the teacher's shape out.

Paper: ScaleKD (arXiv 2411.06786), section on CAP. Shapes: b batch, c student channels, h w student grid,
n query tokens, d teacher channels.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

StemNorm = Literal["bn", "ln"]


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map [b, c, h, w]."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """Normalise each position of the map by itself."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class CAP(nn.Module):
    """One block of cross attention from teacher-shaped queries to a student map.

    The queries are trainable and shared by the batch, or they come from outside: at stage 4 they are
    what the teacher's tail computes from stage 3. There is no residual connection from the queries to
    the output. The two resolutions may differ, because there are as many output tokens as queries.

    Args:
        student_dim: c.
        teacher_dim: d.
        kv_hw: Grid of the student map, (h, w).
        query_hw: Grid of the queries; n is its product.
        num_heads: Heads of the attention; must divide ``teacher_dim``.
        tau: Multiplier of the usual scale 1/sqrt(d / heads): above 1 sharper, below 1 flatter.
        stem_norm: ``bn`` (the paper) or ``ln`` over channels, for batches of one and for DDP.
        own_queries: Whether there are trainable queries.

    Raises:
        ValueError: If ``num_heads`` does not divide ``teacher_dim``.

    >>> import torch
    >>> projector = CAP(8, 12, kv_hw=(4, 4), query_hw=(2, 2), num_heads=3)
    >>> projector(torch.randn(5, 8, 4, 4)).shape  # 4 tokens of the teacher's 12 channels
    torch.Size([5, 4, 12])
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        kv_hw: tuple[int, int],
        query_hw: tuple[int, int],
        num_heads: int,
        tau: float = 1.0,
        stem_norm: StemNorm = "bn",
        own_queries: bool = True,
    ) -> None:
        super().__init__()
        if num_heads < 1 or teacher_dim % num_heads:
            valid = [h for h in range(1, teacher_dim + 1) if teacher_dim % h == 0]
            raise ValueError(
                f"{num_heads} heads do not divide the {teacher_dim} channels of the teacher; "
                f"use one of {', '.join(map(str, valid))}"
            )
        self.kv_hw, self.query_hw, self.num_heads = kv_hw, query_hw, num_heads
        self.scale = tau / math.sqrt(teacher_dim / num_heads)

        # The stem turns a student map into keys and values that know their position.
        self.conv = nn.Conv2d(student_dim, student_dim, 3, padding=1)
        self.norm = nn.BatchNorm2d(student_dim) if stem_norm == "bn" else ChannelNorm(student_dim)
        self.position = nn.Parameter(torch.empty(1, student_dim, *kv_hw))

        # Queries of the teacher's shape, and the attention between them and the student.
        n_queries = query_hw[0] * query_hw[1]
        self.queries = nn.Parameter(torch.empty(n_queries, teacher_dim)) if own_queries else None
        self.query_in = nn.Linear(teacher_dim, teacher_dim)
        self.query = nn.Linear(teacher_dim, teacher_dim)
        self.key = nn.Linear(student_dim, teacher_dim)
        self.value = nn.Linear(student_dim, teacher_dim)
        self.out = nn.Linear(teacher_dim, teacher_dim)

        # The feed-forward part.
        self.out_norm = nn.LayerNorm(teacher_dim)
        self.mlp_in = nn.Linear(teacher_dim, 4 * teacher_dim)
        self.mlp_out = nn.Linear(4 * teacher_dim, teacher_dim)

        # As released: small positions, queries as an embedding starts; the rest is torch's default.
        nn.init.trunc_normal_(self.position, std=0.02)
        if self.queries is not None:
            nn.init.normal_(self.queries)

    def forward(
        self, x: Float[Tensor, "b c h w"], queries: Float[Tensor, "b n d"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """Project a student map to tokens of the teacher's shape.

        Args:
            x: Student map on the grid ``kv_hw``.
            queries: Queries from outside, not detached; None uses the trainable ones.

        Raises:
            ValueError: If the grid differs from ``kv_hw``, or there are no queries.
        """
        # A map of another size would need other positions, and without queries nothing is asked.
        if tuple(x.shape[-2:]) != tuple(self.kv_hw):
            raise ValueError(
                f"the student's grid is {tuple(x.shape[-2:])} but the projector was built for "
                f"{tuple(self.kv_hw)}; keep the image size, or build it anew"
            )
        if queries is None:
            if self.queries is None:
                raise ValueError("this CAP has no queries of its own; pass queries")
            queries = self.queries.expand(len(x), -1, -1)

        # Keys and values are the student's positions, after a convolutional stem.
        stem = F.relu(self.norm(self.conv(x))) + self.position
        student_tokens = stem.flatten(2).transpose(1, 2)

        # Each query of the teacher's shape gathers what it needs from the student.
        q = self._split_heads(self.query(F.relu(self.query_in(queries))))
        k = self._split_heads(self.key(student_tokens))
        v = self._split_heads(self.value(student_tokens))
        attended = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        z = self.out_norm(self.out(attended.transpose(1, 2).flatten(2)))

        # The residual goes around the feed-forward part only, from the normed tokens.
        return z + self.mlp_out(F.relu(self.mlp_in(z)))

    def _split_heads(self, x: Tensor) -> Tensor:
        """Turn [b, n, d] into [b, heads, n, d / heads]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
