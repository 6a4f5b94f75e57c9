"""CAP against its formula written with einsum, and its parts one by one."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from scalekd.method.projector import CAP


def reference(cap: CAP, x: torch.Tensor, queries: torch.Tensor, tau: float) -> torch.Tensor:
    """The published pseudo-code, term by term, in float64."""
    p = dict(cap.named_parameters())
    u = F.conv2d(x, p["conv.weight"], p["conv.bias"], padding=1)
    mean, var = u.mean((0, 2, 3), keepdim=True), u.var((0, 2, 3), correction=0, keepdim=True)
    weight, bias = p["norm.weight"].view(1, -1, 1, 1), p["norm.bias"].view(1, -1, 1, 1)
    u = torch.relu((u - mean) / (var + 1e-5).sqrt() * weight + bias) + p["position"]
    kv = torch.einsum("bchw->bhwc", u).flatten(1, 2)

    def linear(name: str, y: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...i,oi->...o", y, p[f"{name}.weight"]) + p[f"{name}.bias"]

    heads, width = cap.num_heads, queries.shape[-1] // cap.num_heads
    q = linear("query", torch.relu(linear("query_in", queries)))
    k, v = linear("key", kv), linear("value", kv)
    q, k, v = (y.reshape(len(x), -1, heads, width) for y in (q, k, v))
    scores = tau * torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(width)
    mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(
        len(x), -1, heads * width
    )
    z = linear("out", mixed)
    z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    z = z * p["out_norm.weight"] + p["out_norm.bias"]
    return z + linear("mlp_out", torch.relu(linear("mlp_in", z)))


def randomised(cap: CAP) -> CAP:
    """No parameter at a value, 0 or 1, that would hide its absence."""
    for p in cap.parameters():
        nn.init.normal_(p, std=0.5)
    return cap.double()


@pytest.mark.parametrize("tau", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("outside", [False, True])
def test_cap_equals_its_formula(tau: float, outside: bool) -> None:
    cap = randomised(CAP(6, 8, (4, 5), (2, 3), num_heads=2, tau=tau))
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    outer = torch.randn(3, 6, 8, dtype=torch.float64)
    assert cap.queries is not None
    queries = outer if outside else cap.queries.expand(3, -1, -1)
    assert torch.allclose(
        cap(x, outer if outside else None), reference(cap, x, queries, tau), atol=1e-10
    )


def test_the_number_of_queries_sets_the_resolution() -> None:
    cap = CAP(6, 8, (14, 14), (7, 7), num_heads=2)
    assert cap(torch.randn(2, 6, 14, 14)).shape == (2, 49, 8)


def test_initial_positions_are_small_and_queries_standard_normal() -> None:
    cap = CAP(64, 64, (8, 8), (16, 16), num_heads=4)
    assert cap.queries is not None
    assert cap.position.std().item() == pytest.approx(0.02, rel=0.05)
    assert cap.queries.std().item() == pytest.approx(1, rel=0.05)


def test_layer_norm_in_the_stem_makes_images_independent() -> None:
    cap = CAP(6, 8, (4, 4), (2, 2), num_heads=2, stem_norm="ln").train()
    x = torch.randn(3, 6, 4, 4)
    assert torch.allclose(cap(x)[:1], cap(x[:1]), atol=1e-5)
    u = cap.norm(x)
    assert torch.allclose(u.mean(1), torch.zeros(3, 4, 4), atol=1e-5)


@pytest.mark.parametrize(
    ("student", "teacher", "kv", "queries", "own", "millions"),
    [  # Swin-L to ResNet-50, counted by hand from the formula: 17.9M and 70.1M
        (1024, 768, (14, 14), (14, 14), True, 17.9),
        (2048, 1536, (7, 7), (7, 7), False, 70.1),
    ],
)
def test_parameter_count_of_the_published_projectors(
    student, teacher, kv, queries, own, millions
) -> None:
    with torch.device("meta"):
        cap = CAP(student, teacher, kv, queries, 8, own_queries=own)
    s, t = student, teacher
    by_hand = 9 * s * s + s + 2 * s + s * kv[0] * kv[1]  # stem
    by_hand += 2 * (t * t + t) + 2 * (s * t + t) + (t * t + t) + 2 * t + 8 * t * t + 5 * t
    by_hand += queries[0] * queries[1] * t if own else 0
    count = sum(p.numel() for p in cap.parameters())
    assert count == by_hand
    assert round(count / 1e6, 1) == millions


def test_heads_that_do_not_divide_are_refused_with_those_that_do() -> None:
    with pytest.raises(
        ValueError, match=r"5 heads do not divide the 8 channels .* use one of 1, 2, 4, 8"
    ):
        CAP(6, 8, (4, 4), (2, 2), num_heads=5)


def test_another_grid_is_refused_with_both() -> None:
    cap = CAP(6, 8, (4, 4), (2, 2), num_heads=2)
    with pytest.raises(
        ValueError, match=r"grid is \(5, 5\) but the projector was built for \(4, 4\)"
    ):
        cap(torch.randn(2, 6, 5, 5))


def test_missing_queries_are_refused() -> None:
    cap = CAP(6, 8, (4, 4), (2, 2), num_heads=2, own_queries=False)
    with pytest.raises(ValueError, match="no queries of its own"):
        cap(torch.randn(2, 6, 4, 4))


@pytest.mark.slow
def test_cap_compiles_without_a_graph_break() -> None:
    cap = CAP(6, 8, (4, 4), (2, 2), num_heads=2).eval()
    x = torch.randn(2, 6, 4, 4)
    compiled = torch.compile(cap, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), cap(x), atol=1e-6)
