"""Offline rotations: the same function in a basis where outliers are spread over all channels.

Paper: "SliderQuant" (ICLR 2026, arXiv 2603.25284), appendix on SliderQuant+; the layout is QuaRot's. R1
turns the residual stream, R2 every value head; both vanish into the weights. Unlike the released code,
the mean of the embeddings is not subtracted: that is wrong for RMSNorm. All in float64.
"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from sliderquant.method.layout import BlockLayout

ROWS_AT_ONCE = 4096  # rows of an embedding that are float64 at a time


def _paley_core(q: int) -> Float[Tensor, "q q"]:
    """Jacobsthal matrix of a prime q: entry (i, j) is 1 where i - j is a square mod q, else -1, 0."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)])
    difference = (torch.arange(q)[:, None] - torch.arange(q)[None]) % q
    return character[difference].double()


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _odd_hadamard(order: int) -> Float[Tensor, "n n"] | None:
    """Hadamard matrix of order 1, or by one of Paley's constructions; ``None`` where both fail."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    q = order - 1
    if _is_prime(q) and q % 4 == 3:  # Paley I: order q + 1
        skew = torch.zeros(order, order, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, _paley_core(q)
        return skew + torch.eye(order, dtype=torch.float64)
    q = order // 2 - 1
    if order % 2 == 0 and _is_prime(q) and q % 4 == 1:  # Paley II: order 2 (q + 1)
        symmetric = torch.zeros(q + 1, q + 1, dtype=torch.float64)
        symmetric[0, 1:], symmetric[1:, 0], symmetric[1:, 1:] = 1, 1, _paley_core(q)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(symmetric, plus) + torch.kron(torch.eye(q + 1).double(), minus)
    return None


def hadamard(size: int) -> Float[Tensor, "n n"] | None:
    """Return a matrix of +-1 with orthogonal rows, or ``None`` if no construction here reaches ``size``.

    Sylvester doubling of an order 1 or Paley matrix: every 2^k, 12 * 2^k, 20 * 2^k, 28 * 2^k and so on.

    Args:
        size: Rows and columns.

    Example:
        >>> matrix = hadamard(12)
        >>> torch.equal(matrix @ matrix.T, 12 * torch.eye(12).double())
        True
    """
    # Halve the size until a construction reaches it.
    doublings = 0
    while True:
        core = _odd_hadamard(size)
        if core is not None:
            break
        if size % 2:
            return None
        size, doublings = size // 2, doublings + 1

    # Each doubling puts the matrix four times beside itself, once with the opposite sign.
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    for _ in range(doublings):
        core = torch.kron(pair, core)
    return core


def random_rotation(size: int, generator: torch.Generator) -> Float[Tensor, "n n"]:
    """Return an orthogonal matrix in float64: Hadamard with random signs, else Gram-Schmidt of noise.

    Args:
        size: Rows and columns.
        generator: Source of signs or noise.
    """
    matrix = hadamard(size)
    if matrix is not None:
        signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        return matrix * signs / math.sqrt(size)
    noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(noise)
    return q * r.diagonal().sign()  # signs make the distribution uniform over rotations


def rotate_block(
    tensors: Mapping[str, Tensor],
    layout: BlockLayout,
    r1: Float[Tensor, "h h"] | None,
    r2: Float[Tensor, "d d"] | None,
) -> dict[str, Tensor]:
    """Return the block's parameters in the rotated basis, in their own dtype.

    R1 (residual stream x -> x R1): norm gains are folded into their readers, W <- W diag(gain) R1;
    writers W <- R1^T W, b <- R1^T b. R2 (each value head v -> v R2): value rows <- R2^T W, output
    columns <- W R2.

    Args:
        tensors: All parameters of the block.
        layout: Their roles.
        r1: Orthogonal [hidden, hidden], float64, or ``None``.
        r2: Orthogonal [head_dim, head_dim], float64, or ``None``.
    """
    rotated = {name: value.double() for name, value in tensors.items()}

    # The residual stream: its readers take R1 and the gain of their norm, its writers take R1^T.
    if r1 is not None:
        for gain, readers in layout.readers.items():
            factor = rotated[gain] + layout.gain_offset
            for name in readers:
                rotated[name] = (rotated[name] * factor) @ r1
            rotated[gain] = torch.full_like(rotated[gain], 1 - layout.gain_offset)
        for name in layout.writers:
            # [out, in] and [experts, out, in] turn their rows; a bias is a row vector itself.
            weight = rotated[name]
            rotated[name] = r1.T @ weight if weight.ndim > 1 else weight @ r1

    # The value heads: the value projection takes R2^T, the output projection R2, head by head.
    if r2 is not None:
        size = layout.head_dim
        for name, start, rows in layout.values:
            values = rotated[name].narrow(0, start, rows)
            if values.ndim == 1:
                values.copy_((values.unflatten(0, (-1, size)) @ r2).flatten())
            else:
                values.copy_((r2.T @ values.unflatten(0, (-1, size))).flatten(0, 1))
        for name in layout.outputs:
            heads = rotated[name].unflatten(1, (-1, size))
            rotated[name] = (heads @ r2).flatten(1)
    return {name: value.to(tensors[name].dtype) for name, value in rotated.items()}


def rotate_rows(
    rows: Float[Tensor, "v h"], r1: Float[Tensor, "h h"], gain: Float[Tensor, " h"] | None = None
) -> Float[Tensor, "v h"]:
    """Return embedding E R1, or head W diag(gain) R1, in their dtype; some thousand rows at a time.

    Args:
        rows: Embedding or head.
        r1: Orthogonal, float64.
        gain: Of the norm in front of the head, which is folded into it.
    """
    rotated = torch.empty_like(rows)
    for part, out in zip(rows.split(ROWS_AT_ONCE), rotated.split(ROWS_AT_ONCE), strict=True):
        exact = part.double() if gain is None else part.double() * gain.double()
        out.copy_(exact @ r1)
    return rotated
