"""Which latent frames a sparse block computes, and how the others are filled in.

Paper: "Frame Interleaved Sparsity" (arXiv 2605.11869). The residue rule is the published one as others
cite it; the linear lift of the *residual*, not of the state, is our reading (README). Pure torch.
"""

import random
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def anchors(
    frames: int, stride: int, residue: int, *, boundaries: bool = True, equalize: bool = False
) -> tuple[int, ...]:
    """Frames f with (f - r) mod n = 0, and the first and last one.

    Args:
        frames: F, number of latent frames.
        stride: n >= 1; more than F counts as F, so that boundaries and one frame remain.
        residue: r, any integer; taken modulo n.
        boundaries: Always include frames 0 and F - 1.
        equalize: Add the frames farthest from any anchor until all residues have equally many.

    Returns:
        Ascending frame numbers; all of them if F <= 2 or n = 1.
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


def random_anchors(
    frames: int, count: int, seed: int, *, boundaries: bool = True
) -> tuple[int, ...]:
    """``count`` frames drawn without replacement; a rival of the residue rule at equal cost."""
    fixed = {0, frames - 1} if boundaries else set()
    rest = [f for f in range(frames) if f not in fixed]
    drawn = random.Random(seed).sample(rest, max(0, min(count - len(fixed), len(rest))))
    return tuple(sorted(fixed | set(drawn)))


@dataclass(frozen=True)
class Neighbours:
    """For every skipped frame the two anchors it is filled from.

    Attributes:
        anchors: Ascending computed frames.
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


def neighbours(
    frames: int, chosen: tuple[int, ...], *, lift: str = "residual", excluded: tuple[int, ...] = ()
) -> Neighbours:
    """Interpolation sources of the skipped frames; constant beyond the outermost source.

    Args:
        frames: F.
        chosen: The anchors, ascending.
        lift: "hold" takes the nearest source alone (the earlier of two); others both linearly.
        excluded: Anchors that are no sources (condition frames), unless none would remain.
    """
    sources = [a for a in chosen if a not in excluded] or list(chosen)
    place = {a: k for k, a in enumerate(chosen)}
    skipped = tuple(f for f in range(frames) if f not in place)
    left, right, weight = [], [], []
    for f in skipped:
        before = max((a for a in sources if a < f), default=None)
        after = min((a for a in sources if a > f), default=before)
        before = after if before is None else before
        assert before is not None
        assert after is not None
        u = (f - before) / (after - before) if after != before else 0.0
        left.append(place[before])
        right.append(place[after])
        weight.append(float(u > 0.5) if lift == "hold" else u)
    return Neighbours(chosen, skipped, tuple(left), tuple(right), tuple(weight))


@dataclass(frozen=True)
class FrameTensors:
    """``Neighbours`` as tensors on one device; a block's hook reads nothing else.

    ``order`` puts anchors followed by skipped frames back into their places.
    """

    anchors: Tensor
    skipped: Tensor
    left: Tensor
    right: Tensor
    weight: Tensor
    order: Tensor
    frames: Tensor  # arange(F): a tensor, so that compiled code is not specialised on the phase

    def to(self, device: torch.device) -> "FrameTensors":
        """The same on another device; itself where it is there already."""
        if self.anchors.device == device:
            return self
        return FrameTensors(**{name: value.to(device) for name, value in vars(self).items()})


def frame_tensors(plan: Neighbours, device: torch.device) -> FrameTensors:
    """Build the tensors of one phase."""
    places = (*plan.anchors, *plan.skipped)

    def index(values: tuple[int, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    order = torch.empty(len(places), dtype=torch.long)
    order[torch.tensor(places)] = torch.arange(len(places))
    return FrameTensors(
        anchors=index(plan.anchors),
        skipped=index(plan.skipped),
        left=index(plan.left),
        right=index(plan.right),
        weight=torch.tensor(plan.weight, device=device).view(-1, 1, 1),
        order=order.to(device),
        frames=torch.arange(len(places), device=device),
    )


def gather_frames(tokens: Tensor, plan: FrameTensors, dim: int = 1) -> Tensor:
    """Keep the anchors' tokens; ``dim`` has F * P frame-major entries and afterwards K * P.

    The result is on the device of the tokens, wherever the plan is.
    """
    split = tokens.unflatten(dim, (plan.frames.shape[0], -1))
    return split.index_select(dim, plan.anchors.to(tokens.device)).flatten(dim, dim + 1)


def lift_block(
    hidden: Float[Tensor, "b s d"],
    computed: Float[Tensor, "b k d"],
    plan: FrameTensors,
    lift: str = "residual",
) -> Float[Tensor, "b s d"]:
    """Fill the frames that a block skipped.

    With d = block(x) - x at the anchors, a skipped frame f between anchors a and b becomes
    h[f] + (1-u) d[a] + u d[b] ("residual", "hold"), stays h[f] ("carry"), or is replaced by
    (1-u) y[a] + u y[b] ("state"). Anchors are copied exactly. The result is on the device of the block's
    output, as it is for a dense block whose weights are on another device than its input.

    Args:
        hidden: The block's input, all frames, frame-major.
        computed: The block's output y at the anchors.
        plan: Of the phase.
        lift: As above.
    """
    hidden, plan = hidden.to(computed.device), plan.to(computed.device)
    frames = hidden.unflatten(1, (plan.frames.shape[0], -1))
    kept = computed.unflatten(1, (plan.anchors.shape[0], -1))
    if lift == "state":
        filled = _mixed(kept, plan)
    else:
        filled = frames.index_select(1, plan.skipped)
        if lift != "carry":
            filled = filled + _mixed(kept - frames.index_select(1, plan.anchors), plan)
    return torch.cat([kept, filled], 1).index_select(1, plan.order).flatten(1, 2)


def lift_attention(
    computed: Float[Tensor, "b k d"], plan: FrameTensors, lift: str = "residual"
) -> Float[Tensor, "b s d"]:
    """Fill an attention output, which is itself a residual: (1-u) o[a] + u o[b], or 0 ("carry")."""
    plan = plan.to(computed.device)
    kept = computed.unflatten(1, (plan.anchors.shape[0], -1))
    filled = _mixed(kept, plan)
    filled = torch.zeros_like(filled) if lift == "carry" else filled
    return torch.cat([kept, filled], 1).index_select(1, plan.order).flatten(1, 2)


def _mixed(values: Tensor, plan: FrameTensors) -> Tensor:
    left, right = values.index_select(1, plan.left), values.index_select(1, plan.right)
    return torch.lerp(left, right, plan.weight.to(values.dtype))
