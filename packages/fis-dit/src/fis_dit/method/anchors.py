"""Choose the anchors: the latent frames that a sparse block computes.

Paper: "Frame Interleaved Sparsity" (arXiv 2605.11869). The residue rule is the published one as later
papers cite it; the authors' code is not public.
"""

import random


def choose_anchors(
    frames: int, stride: int, residue: int, *, boundaries: bool = True, equalize: bool = False
) -> tuple[int, ...]:
    """Return the frames f with (f - r) mod n = 0, and the first and the last frame.

    Args:
        frames: F, the number of latent frames, 1 or more.
        stride: n, 1 or more. More than F counts as F, so that the boundaries and one frame remain.
        residue: r, any integer; it is taken modulo n.
        boundaries: Whether frames 0 and F - 1 are always included.
        equalize: Whether to add the frames that are farthest from any anchor, until all residues have
            equally many anchors.

    Returns:
        Frame numbers in ascending order; all F of them if F <= 2 or n = 1.

    >>> choose_anchors(frames=7, stride=3, residue=1)
    (0, 1, 4, 6)
    """
    if frames <= 2 or stride == 1:
        return tuple(range(frames))
    n = min(stride, frames)
    chosen = _residue_class(frames, n, residue % n, boundaries)
    if equalize:
        most = max(len(_residue_class(frames, n, r, boundaries)) for r in range(n))
        while len(chosen) < most:
            rest = [f for f in range(frames) if f not in chosen]
            chosen.add(max(rest, key=lambda f: min(abs(f - a) for a in chosen)))
    return tuple(sorted(chosen))


def _residue_class(frames: int, n: int, residue: int, boundaries: bool) -> set[int]:
    return set(range(residue, frames, n)) | ({0, frames - 1} if boundaries else set())


def draw_random_anchors(
    frames: int, count: int, seed: int, *, boundaries: bool = True
) -> tuple[int, ...]:
    """Draw ``count`` frames without replacement, to compare with the residue rule at equal cost.

    Args:
        frames: F, the number of latent frames.
        count: K, the number of anchors, those at the boundaries included.
        seed: Seed of the draw.
        boundaries: Whether frames 0 and F - 1 are always included.

    Returns:
        Frame numbers in ascending order.
    """
    boundary_frames = {0, frames - 1} if boundaries else set()
    rest = [f for f in range(frames) if f not in boundary_frames]
    to_draw = max(0, min(count - len(boundary_frames), len(rest)))
    return tuple(sorted(boundary_frames | set(random.Random(seed).sample(rest, to_draw))))
