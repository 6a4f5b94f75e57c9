"""How the parts are joined: which gradients exist, and what each switch takes away."""

import pytest
import torch
from torch import nn

from scalekd.method.feature_mimicking import mimic_loss
from scalekd.method.parameter_perception import MimicShape, Projectors

SHAPE = MimicShape(
    student=((6, (4, 4)), (8, (2, 2))),
    split=(8, (4, 4)),
    final=(12, (2, 2)),
    heads=(2, 3),
    tau=1.0,
    weights={("s3", "full"): 1.0, ("s4", "full"): 1.0, ("s3", "ac"): 1.0, ("s4", "ac"): 1.0},
)


class PoolingTail(nn.Module):
    """Like patch merging: four tokens to one, wider."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 12).requires_grad_(False)
        self.calls = 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = tokens.unflatten(1, (2, 2, 2, 2)).mean((2, 4)).flatten(1, 2)
        return torch.tanh(self.linear(x))


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    s3 = torch.randn(2, 6, 4, 4, requires_grad=True)
    s4 = torch.randn(2, 8, 2, 2, requires_grad=True)
    return s3, s4, torch.randn(2, 4, 12)


def gradient(term: torch.Tensor, of: torch.Tensor | nn.Parameter) -> float:
    found = torch.autograd.grad(term, of, retain_graph=True, allow_unused=True)[0]
    return 0.0 if found is None else float(found.abs().max())


def test_terms_are_the_losses_of_the_chained_projections() -> None:
    projectors, tail = Projectors(SHAPE).eval(), PoolingTail()
    s3, s4, final = inputs()
    terms = projectors(s3, s4, final, tail)
    for view in ("full", "ac"):
        z = tail(projectors.s3[view](s3))
        assert torch.allclose(terms[f"s3_{view}"], mimic_loss(z, final, view), atol=1e-6)
        y = projectors.s4[view](s4, z)
        assert torch.allclose(terms[f"s4_{view}"], mimic_loss(y, final, view), atol=1e-6)


def test_both_views_pass_the_tail_in_one_call() -> None:
    tail = PoolingTail()
    Projectors(SHAPE)(*inputs(), tail)
    assert tail.calls == 1


@pytest.mark.parametrize("view", ["full", "ac"])
def test_gradient_map(view: str) -> None:
    projectors, tail = Projectors(SHAPE), PoolingTail()
    s3, s4, final = inputs()
    terms = projectors(s3, s4, final, tail)
    other = "ac" if view == "full" else "full"
    # Stage 3 learns through the frozen tail.
    assert gradient(terms[f"s3_{view}"], s3) > 0
    assert gradient(terms[f"s3_{view}"], s4) == 0
    # The queries of stage 4 are not detached: its term trains the stage-3 projector and S3 as well.
    assert gradient(terms[f"s4_{view}"], s3) > 0
    assert gradient(terms[f"s4_{view}"], s4) > 0
    assert gradient(terms[f"s4_{view}"], projectors.s3[view].queries) > 0
    # The views have projectors of their own.
    assert gradient(terms[f"s4_{view}"], projectors.s4[other].key.weight) == 0
    assert gradient(terms[f"s4_{view}"], projectors.s3[other].queries) == 0
    assert not tail.linear.weight.requires_grad


def test_every_parameter_has_a_gradient() -> None:
    for weights in (SHAPE.weights, {k: v for k, v in SHAPE.weights.items() if k != ("s4", "ac")}):
        projectors = Projectors(MimicShape(**{**vars(SHAPE), "weights": weights}))
        sum(projectors(*inputs(), PoolingTail()).values()).backward()
        assert [n for n, p in projectors.named_parameters() if p.grad is None] == []


def test_without_tpp_stage_4_has_its_own_queries_and_stage_3_is_gone() -> None:
    weights = {("s4", "full"): 1.0, ("s4", "ac"): 1.0}
    projectors = Projectors(MimicShape(**{**vars(SHAPE), "weights": weights, "tpp": False}))
    s3, s4, final = inputs()
    terms = projectors(s3, s4, final, None)
    assert set(terms) == {"s4_full", "s4_ac"}
    assert gradient(terms["s4_full"], s3) == 0
    assert gradient(terms["s4_full"], projectors.s4["full"].queries) > 0
    assert not hasattr(projectors, "s3")


def test_without_dfm_only_the_full_view_stays() -> None:
    weights = {("s3", "full"): 1.0, ("s4", "full"): 1.0}
    projectors = Projectors(MimicShape(**{**vars(SHAPE), "weights": weights}))
    assert set(projectors(*inputs(), PoolingTail())) == {"s3_full", "s4_full"}
    assert set(projectors.s3) == {"full"}
