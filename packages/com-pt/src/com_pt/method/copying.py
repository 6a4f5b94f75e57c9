"""Where the numbers of a small tensor go in a large one."""

from torch import Tensor

from com_pt.errors import ChainOrderError, GrowthError
from com_pt.method.layout import BLOCKS, NEVER_GROWN, Axis, Rule


def copy_corner_block(small: Tensor, fresh: Tensor) -> Tensor | None:
    """Put a small tensor into the leading entries of a large one, whatever its axes mean.

    This is the released routine. It leaves tensors of three axes alone.

    Args:
        small: Tensor of the small model.
        fresh: The large model's, as it was initialised; not changed.

    Returns:
        The grown tensor; None for what the routine leaves alone.

    Raises:
        GrowthError: If the kernel or input channels of a convolution differ.
    """
    if small.dim() == 3:
        return None
    if small.dim() == 4 and small.shape[1:] != fresh.shape[1:]:
        raise GrowthError(
            f"kernels {tuple(small.shape[1:])} and {tuple(fresh.shape[1:])} differ; "
            "use equal patch sizes"
        )
    grown = fresh.clone()
    corner = tuple(slice(0, n) for n in small.shape)
    grown[corner] = small
    return grown


def copy_leading_entries(small: Tensor, fresh: Tensor, rule: Rule) -> Tensor:
    """Put a small tensor where its axis roles say, and leave the rest of the large one fresh.

    Args:
        small: Tensor of the small model.
        fresh: The large model's, as it was initialised; not changed.
        rule: Roles of the axes of both.

    Raises:
        ChainOrderError: If an axis shrinks.
        GrowthError: If an axis must not change, or does not split into its blocks.
    """
    grown = fresh.clone()
    if small.dim() == 0:
        return small.to(grown.dtype)

    # A view of each axis as blocks, of which the leading entries are taken: no index on the device.
    target, source = grown, small
    for dim in reversed(range(small.dim())):
        small_size, large_size = small.shape[dim], fresh.shape[dim]
        blocks = block_count(rule.axes[dim], small_size, large_size)
        target = target.unflatten(dim, (blocks, large_size // blocks))
        target = target.narrow(dim + 1, 0, small_size // blocks)
        source = source.unflatten(dim, (blocks, small_size // blocks))
    target.copy_(source)
    return grown


def block_count(axis: Axis, small: int, large: int) -> int:
    """Return the number of blocks of an axis, each of which keeps its own leading entries.

    Args:
        axis: Role of the axis: 3 blocks for QKV, 4 for CAT4, 1 for the others.
        small: Its entries in the small model.
        large: Its entries in the large model.

    Raises:
        ChainOrderError: If the axis shrinks.
        GrowthError: If it must not change, or does not split into its blocks.
    """
    # What the axis stands for decides whether it may grow at all.
    if axis.role in NEVER_GROWN and small != large:
        raise GrowthError(
            f"a {axis.role} axis has {small} entries in the small model and {large} in the large one; "
            "keep vocabulary, positions, patch size and channels the same along a chain"
        )
    if small > large:
        raise ChainOrderError(
            f"a {axis.role} axis shrinks from {small} to {large}; order the chain from small to large"
        )

    # Both sizes must hold whole blocks.
    blocks = BLOCKS.get(axis.role, 1)
    if small % blocks or large % blocks:
        raise GrowthError(
            f"{axis.role} axes of {small} and {large} do not split into {blocks}; check the layout"
        )
    return blocks
