"""Find the anchors from which every skipped frame is interpolated, and index tensors that say so."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Neighbours:
    """For every skipped frame, the two anchors from which it is interpolated.

    Attributes:
        anchors: Computed frames, ascending.
        skipped: The other frames, ascending.
        left: Position in ``anchors`` of the source at or before each skipped frame.
        right: Same for the source after it; equal to ``left`` outside the outermost sources.
        weight: u in [0, 1], the share of the right source.
    """

    anchors: tuple[int, ...]
    skipped: tuple[int, ...]
    left: tuple[int, ...]
    right: tuple[int, ...]
    weight: tuple[float, ...]


def find_neighbours(
    frames: int, anchors: tuple[int, ...], *, lift: str = "residual", excluded: tuple[int, ...] = ()
) -> Neighbours:
    """Find the interpolation sources of the skipped frames; beyond the outermost source, hold it.

    Args:
        frames: F, the number of latent frames.
        anchors: Computed frames, ascending.
        lift: "hold" takes the nearest source alone (the earlier one of two that are equally near);
            every other lift mixes both linearly.
        excluded: Anchors that are no sources (condition frames), unless no source would remain.

    >>> find_neighbours(5, (0, 1, 4)).skipped
    (2, 3)
    """
    sources = [a for a in anchors if a not in excluded] or list(anchors)
    position = {anchor: k for k, anchor in enumerate(anchors)}
    skipped = tuple(f for f in range(frames) if f not in position)
    left, right, weight = [], [], []
    for f in skipped:
        before = max((a for a in sources if a < f), default=None)
        after = min((a for a in sources if a > f), default=before)
        before = after if before is None else before
        assert before is not None
        assert after is not None
        u = (f - before) / (after - before) if after != before else 0.0
        left.append(position[before])
        right.append(position[after])
        weight.append(float(u > 0.5) if lift == "hold" else u)
    return Neighbours(anchors, skipped, tuple(left), tuple(right), tuple(weight))


@dataclass(frozen=True)
class FrameIndex:
    """``Neighbours`` as tensors on one device; the hook of a sparse block reads nothing else.

    Attributes:
        anchors: Computed frames, "k".
        skipped: The other frames, "m".
        left: Position in ``anchors`` of the left source of each skipped frame, "m".
        right: Same for the right source, "m".
        weight: Share of the right source, "m 1 1", float32.
        order: Puts anchors followed by skipped frames back into their places, "f".
        frames: 0 to F - 1, "f": a tensor, so that compiled code is not specialised on the phase.
    """

    anchors: Tensor
    skipped: Tensor
    left: Tensor
    right: Tensor
    weight: Tensor
    order: Tensor
    frames: Tensor

    def to(self, device: torch.device) -> "FrameIndex":
        """Return the same index on another device, or itself if it is there already."""
        if self.anchors.device == device:
            return self
        return FrameIndex(**{name: value.to(device) for name, value in vars(self).items()})


def make_frame_index(neighbours: Neighbours, device: torch.device) -> FrameIndex:
    """Build the index tensors of one phase on a device."""
    places = (*neighbours.anchors, *neighbours.skipped)

    def positions(values: tuple[int, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    order = torch.empty(len(places), dtype=torch.long)
    order[torch.tensor(places)] = torch.arange(len(places))
    return FrameIndex(
        anchors=positions(neighbours.anchors),
        skipped=positions(neighbours.skipped),
        left=positions(neighbours.left),
        right=positions(neighbours.right),
        weight=torch.tensor(neighbours.weight, device=device).view(-1, 1, 1),
        order=order.to(device),
        frames=torch.arange(len(places), device=device),
    )
