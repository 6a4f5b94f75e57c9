"""Where the numbers of a small tensor go in a large one."""

from torch import Tensor

from com_pt.errors import ChainOrderError, GrowthError
from com_pt.layout import BLOCKS, NEVER_GROWN, Axis, Rule


def block_count(axis: Axis, small: int, large: int) -> int:
    """Number of blocks of an axis, each of which keeps its own leading entries: 3 for QKV, 4 for CAT4.

    Raises:
        ChainOrderError: If the axis shrinks.
        GrowthError: If it must not change, or does not split into its blocks.
    """
    if axis.role in NEVER_GROWN and small != large:
        raise GrowthError(
            f"a {axis.role} axis has {small} entries in the small model and {large} in the large one; "
            "keep vocabulary, positions, patch size and channels the same along a chain"
        )
    if small > large:
        raise ChainOrderError(
            f"a {axis.role} axis shrinks from {small} to {large}; order the chain from small to large"
        )
    blocks = BLOCKS.get(axis.role, 1)
    if small % blocks or large % blocks:
        raise GrowthError(
            f"{axis.role} axes of {small} and {large} do not split into {blocks}; check the layout"
        )
    return blocks


def top_left(small: Tensor, fresh: Tensor) -> Tensor | None:
    """The released routine: leading entries whatever the axes mean; None for what it leaves alone.

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


def embed(small: Tensor, fresh: Tensor, rule: Rule) -> Tensor:
    """Entries of ``small`` where its roles say, the rest of ``fresh`` untouched."""
    grown = fresh.clone()
    if small.dim() == 0:
        return small.to(grown.dtype)
    # A view of each axis as blocks, of which the leading entries are taken: no index on the device.
    leading, source = grown, small
    for dim in reversed(range(small.dim())):
        s, n = small.shape[dim], fresh.shape[dim]
        blocks = block_count(rule.axes[dim], s, n)
        leading = leading.unflatten(dim, (blocks, n // blocks)).narrow(dim + 1, 0, s // blocks)
        source = source.unflatten(dim, (blocks, s // blocks))
    leading.copy_(source)
    return grown
