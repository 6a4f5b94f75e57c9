"""Omni-contrasting: every local feature of the student against the teacher's, without augmentation.

Paper: "Augmentation-Free Dense Contrastive Knowledge Distillation for Efficient Semantic Segmentation"
(Fan, Li, Liu, Song, Yao; NeurIPS 2023, arXiv 2312.04168). This follows the released code and the
abstract; where the two differ there is an option for each.

Symbols: b images, c channels, M ``groups`` of D = c/M contiguous channels, patches of n = ph*pw pixels.
A patch gives K = n*M vectors; vector i = pixel*M + group. q counts patches over the whole batch.

    d_ij = |s_i - t_j|_p / tau
    L    = sum_i ( log sum_{j in {i} and negatives of i} exp(-d_ij)  +  d_ii ) / (number of pixels)

``cross_group`` negatives (the released code): all j of the patch whose group differs. ``all`` (the
paper's figure): every j other than i. One group and ``all`` is spatial contrast, patches of one
pixel are channel contrast.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from effml_common.errors import InputError
from effml_common.parsing import require

Negatives = Literal["cross_group", "all"]
Impl = Literal["chunked", "naive"]
BLOCK_BYTES = 64 * 2**20  # that one block of pairwise differences may take


def omni_contrastive_loss(
    student: Float[Tensor, "b c h w"],
    teacher: Float[Tensor, "b c h w"],
    *,
    groups: int = 16,
    patch: int | tuple[int, int] | None = 4,
    pool: int = 4,
    tau: float = 0.07,
    p: int = 1,
    negatives: Negatives = "cross_group",
    crop_to_fit: bool = False,
    impl: Impl = "chunked",
) -> Float[Tensor, ""]:
    """Contrast a student map with the teacher's map of the same shape.

    Args:
        student: Features in the teacher's channels; the gradient flows here only. Half precision is
            raised to float32.
        teacher: Detached inside.
        groups: M, channel groups; divides c.
        patch: Height and width of the patches, in pooled pixels; None takes the whole map as one.
        pool: Max-pooling before the patches are cut; 1 for none.
        tau: Temperature, above 0.
        p: Distance, 1 (released code) or 2 (the paper's ablation).
        negatives: ``cross_group`` or ``all``, see the module.
        crop_to_fit: Drop what patches leave over at the right and the bottom, instead of refusing.
        impl: ``chunked`` holds one block of pairwise differences at a time and recomputes in the
            backward pass; ``naive`` holds them all.

    Returns:
        Scalar, M times the mean over rows.

    Raises:
        InputError: If shapes and settings do not fit; the message says which would.

    >>> import torch
    >>> student = torch.randn(2, 8, 16, 16, requires_grad=True)
    >>> loss = omni_contrastive_loss(student, torch.randn(2, 8, 16, 16), groups=4, pool=2)
    >>> loss.backward()
    >>> student.grad.shape
    torch.Size([2, 8, 16, 16])
    """
    # Refuse what cannot be compared.
    if student.shape != teacher.shape or student.dim() != 4:
        raise InputError(
            f"contrast of maps {tuple(student.shape)} and {tuple(teacher.shape)}; "
            "give two [b, c, h, w] maps of one shape (AfDCDLoss aligns and resizes)"
        )
    require(tau > 0, f"tau is {tau}", "give a temperature above 0, such as 0.07")
    require(p in (1, 2), f"p is {p}", "give 1 or 2")

    # A sum of exponentials needs float32, also where the networks run in half precision.
    dtype = torch.promote_types(student.dtype, torch.float32)
    with without_autocast(student.device):
        s = patch_vectors(student.to(dtype), groups, patch, pool, crop_to_fit)
        t = patch_vectors(teacher.detach().to(dtype), groups, patch, pool, crop_to_fit)
        allowed = pair_mask(s.shape[1], groups, negatives, s.device)

        # Every pixel has M rows, and the loss counts pixels.
        if impl == "chunked":
            total = cast(Tensor, _ChunkedContrast.apply(s, t, allowed, tau, p))
        else:
            total = row_losses(s, t, allowed, tau, p).sum()
        return total * groups / (s.shape[0] * s.shape[1])


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Switch autocast off inside the block; works on devices that have none, too."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def patch_vectors(
    features: Float[Tensor, "b c h w"],
    groups: int,
    patch: int | tuple[int, int] | None,
    pool: int,
    crop_to_fit: bool = False,
) -> Float[Tensor, "q k d"]:
    """Pool a map, cut it into patches and split its channels into groups.

    Returns:
        For each of q patches k vectors of d channels, one for every pixel and group.

    Raises:
        InputError: If the patches or the groups do not divide the map.
    """
    # The contrast sees the strongest activation of every pool x pool square.
    if pool > 1:
        if min(features.shape[2:]) < pool:
            h, w = features.shape[2:]
            raise InputError(f"the {h}x{w} map is smaller than pool {pool}; use a smaller pool")
        features = F.max_pool2d(features, pool, pool)
    b, c, h, w = features.shape

    # Groups must divide the channels, and patches the pooled map.
    if groups < 1 or c % groups:
        fits = [m for m in range(1, min(c, 64) + 1) if c % m == 0]
        raise InputError(f"{c} channels do not split into {groups} groups; use one of {fits}")
    ph, pw = (h, w) if patch is None else (patch, patch) if isinstance(patch, int) else patch
    _check_patch((h, w), (ph, pw), pool, crop_to_fit)

    # With crop_to_fit, drop what patches leave over at the right and the bottom.
    if h % ph or w % pw:
        h, w = h // ph * ph, w // pw * pw
        features = features[:, :, :h, :w]

    # [b, M, D, rows, ph, columns, pw] to one row for each pixel and group of a patch.
    features = features.reshape(b, groups, c // groups, h // ph, ph, w // pw, pw)
    vectors = features.permute(0, 3, 5, 4, 6, 1, 2)
    return vectors.reshape(-1, ph * pw * groups, c // groups)


def _check_patch(
    size: tuple[int, int], patch: tuple[int, int], pool: int, crop_to_fit: bool
) -> None:
    """Refuse patches that do not divide the pooled map, and name a map that they would divide."""
    (h, w), (ph, pw) = size, patch
    require(ph >= 1 and pw >= 1, f"patch is {ph}x{pw}", "give 1 or more pixels each way")
    if h < ph or w < pw:
        raise InputError(
            f"the pooled map is {h}x{w}, smaller than one {ph}x{pw} patch; use a smaller pool "
            f"(now pool={pool}), a smaller patch, or larger crops"
        )
    if (h % ph or w % pw) and not crop_to_fit:
        near = [max(n, round(side / n) * n) * pool for side, n in ((h, ph), (w, pw))]
        raise InputError(
            f"the pooled map is {h}x{w}, which {ph}x{pw} patches do not divide; choose a crop that "
            f"gives a {near[0]}x{near[1]} feature map (its stride times that, in image pixels), "
            "or set crop_to_fit"
        )


def pair_mask(
    k: int, groups: int, negatives: Negatives, device: torch.device | None = None
) -> Bool[Tensor, "k k"]:
    """Mark which j stand in the softmax of row i: i itself and its negatives.

    Args:
        k: Vectors of a patch, pixels times groups.
        groups: M.
        negatives: ``cross_group`` or ``all``, see the module.
        device: Where the mask is built; default torch's.

    Raises:
        InputError: If a row would have no negative, where the loss is constantly zero.
    """
    choices = ("cross_group", "all")
    require(negatives in choices, f"negatives is {negatives!r}", "give cross_group or all")

    # Known from the counts: asking the mask itself would wait for the device at every step.
    if (groups if negatives == "cross_group" else k) == 1:
        raise InputError(
            f"{groups} group(s), {k} vectors a patch and {negatives} leave no negatives; "
            "use more groups, or larger patches with negatives=all"
        )

    # Vector i belongs to group i mod M.
    if negatives == "all":
        return torch.ones(k, k, dtype=torch.bool, device=device)
    group = torch.arange(k, device=device) % groups
    return (group[:, None] != group) | torch.eye(k, dtype=torch.bool, device=device)


def row_losses(
    s: Float[Tensor, "q r d"],
    t: Float[Tensor, "q k d"],
    allowed: Bool[Tensor, "r k"],
    tau: float,
    p: int,
    first: int = 0,
    pairwise: bool = True,
) -> Float[Tensor, "q r"]:
    """Compute the loss of rows ``first`` to ``first + r`` of each patch.

    Args:
        s: Vectors of the student.
        t: All vectors of the same patches, of the teacher.
        allowed: Rows of ``pair_mask``.
        tau: Temperature.
        p: Distance, 1 or 2.
        first: Place of the first row in its patch; its positive stands there.
        pairwise: Hold all differences at once, [q, r, k, d], as the definition is written.
    """
    d = _pairwise_distances(s, t, p) if pairwise else _block_distances(s, t, p)
    d = d / tau
    positive = torch.diagonal(d, first, 1, 2)
    return torch.logsumexp((-d).masked_fill(~allowed, -torch.inf), 2) + positive


def _pairwise_distances(s: Tensor, t: Tensor, p: int) -> Tensor:
    difference = s[:, :, None] - t[:, None]
    return difference.abs().sum(-1) if p == 1 else torch.linalg.vector_norm(difference, dim=-1)


def _block_distances(s: Tensor, t: Tensor, p: int) -> Tensor:
    # Through a matrix product small distances would be lost to cancellation.
    return torch.cdist(s, t, float(p), compute_mode="donot_use_mm_for_euclid_dist")


class _ChunkedContrast(torch.autograd.Function):
    """Sum of all row losses, block by block; keeps nothing but its inputs for the backward pass."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, t: Tensor, allowed: Tensor, tau: float, p: int) -> Tensor:
        ctx.save_for_backward(s, t, allowed)
        ctx.tau, ctx.p = tau, p
        total = s.new_zeros(())
        for patches, rows in _blocks(s):
            block = s[patches, rows], t[patches], allowed[rows]
            total += row_losses(*block, tau, p, rows.start, pairwise=False).sum()
        return total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        s, t, allowed = ctx.saved_tensors
        gradient = torch.empty_like(s)
        for patches, rows in _blocks(s):
            # Each block is computed again: what its gradient needs was not kept.
            with torch.enable_grad():
                student_rows = s[patches, rows].detach().requires_grad_()
                block = student_rows, t[patches], allowed[rows]
                loss = row_losses(*block, ctx.tau, ctx.p, rows.start, pairwise=False).sum()
            (gradient[patches, rows],) = torch.autograd.grad(loss, student_rows)
        return gradient * grad_outputs[0], None, None, None, None


def _blocks(s: Tensor) -> list[tuple[slice, slice]]:
    """List the patches and rows whose differences fit ``BLOCK_BYTES`` (on CUDA cdist holds them all)."""
    q, k, d = s.shape
    row_bytes = k * d * s.element_size()
    patches = max(1, BLOCK_BYTES // (k * row_bytes))
    rows = min(k, max(1, BLOCK_BYTES // row_bytes))
    return [
        (slice(patch, min(patch + patches, q)), slice(row, min(row + rows, k)))
        for patch in range(0, q, patches)
        for row in range(0, k, rows)
    ]
