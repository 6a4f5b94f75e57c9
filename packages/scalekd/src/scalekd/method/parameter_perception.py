"""Teacher parameter perception (TPP): student features pass through the frozen end of the teacher.

Here all parts of the method meet. ``g`` is the teacher's frozen tail, S3 and S4 are the student's maps
of its last two stages, F is the teacher's final tokens, and each view has projectors of its own:

    z3[view] = g(CAP3[view](S3))            y4[view] = CAP4[view](S4, queries=z3[view])
    terms: v_view(z3[view], F), v_view(y4[view], F)

z3 is not detached, so the terms of stage 4 also train stage 3 through the tail.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scalekd.method.feature_mimicking import View, mimic_loss
from scalekd.method.projector import CAP, StemNorm

Tail = Callable[[Tensor], Tensor]  # [2b, n3, d3] on the grid of the tail's input -> [2b, n, d]


@dataclass(frozen=True, kw_only=True)
class MimicShape:
    """All that the projectors are built from.

    Attributes:
        student: (channels, (h, w)) of S3 and S4.
        split: (channels, (h, w)) at the input of the teacher's tail.
        final: (channels, (h, w)) at the output of the teacher's tail.
        heads: Heads of the stage-3 and of the stage-4 projectors.
        tau: Sharpness of their attention.
        weights: Factor of each term, by stage ("s3", "s4") and view; a term without one is absent.
        stem_norm: Norm in the stem of the projectors.
        tpp: Whether stage 3 and the tail take part; otherwise only stage 4, with its own queries.
    """

    student: tuple[tuple[int, tuple[int, int]], tuple[int, tuple[int, int]]]
    split: tuple[int, tuple[int, int]]
    final: tuple[int, tuple[int, int]]
    heads: tuple[int, int]
    tau: float
    weights: dict[tuple[str, View], float]
    stem_norm: StemNorm = "bn"
    tpp: bool = True

    @property
    def views(self) -> tuple[View, ...]:
        """Views that some term uses."""
        used = {view for _, view in self.weights}
        return tuple(view for view in ("full", "ac") if view in used)


class Projectors(nn.Module):
    """The training-only networks; nothing of them stays in the student."""

    def __init__(self, shape: MimicShape) -> None:
        super().__init__()
        self.shape = shape
        (c3, hw3), (c4, hw4) = shape.student
        stage3 = (c3, shape.split[0], hw3, shape.split[1], shape.heads[0], shape.tau)
        stage4 = (c4, shape.final[0], hw4, shape.final[1], shape.heads[1], shape.tau)
        norm, views = shape.stem_norm, shape.views

        if shape.tpp:
            self.s3 = nn.ModuleDict({view: CAP(*stage3, norm) for view in views})

        # A view without a stage-4 term (Swin-S) gets no stage-4 projector: it would have no gradient.
        stage4_views = [view for view in views if ("s4", view) in shape.weights]
        self.s4 = nn.ModuleDict(
            {view: CAP(*stage4, norm, own_queries=not shape.tpp) for view in stage4_views}
        )

    def forward(
        self,
        s3: Float[Tensor, "b c3 h3 w3"],
        s4: Float[Tensor, "b c4 h4 w4"],
        final: Float[Tensor, "b n d"],
        tail: Tail | None,
    ) -> dict[str, Tensor]:
        """Return the unweighted terms, named ``s3_full``, ``s3_ac``, ``s4_full`` and ``s4_ac``.

        Args:
            s3: Student map of the last but one stage.
            s4: Student map of the last stage.
            final: The teacher's final tokens.
            tail: The teacher's frozen end; None only without TPP.
        """
        views, terms = self.shape.views, {}
        queries: dict[str, Tensor] = {}

        # Stage 3 through the teacher: both views in one call, since the tail is the same for them.
        if self.shape.tpp:
            assert tail is not None
            perceived = tail(torch.cat([self.s3[view](s3) for view in views]))
            queries = dict(zip(views, perceived.chunk(len(views)), strict=True))
            for view in views:
                terms[f"s3_{view}"] = mimic_loss(queries[view], final, view)

        # Stage 4 asks with what stage 3 has become.
        for view in views:
            if view in self.s4:
                projected = self.s4[view](s4, queries.get(view))
                terms[f"s4_{view}"] = mimic_loss(projected, final, view)
        return terms
