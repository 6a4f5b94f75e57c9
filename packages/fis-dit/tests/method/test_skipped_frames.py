"""Filling skipped frames, against formulas written out by hand."""

import pytest
import torch

from fis_dit.method.anchors import choose_anchors
from fis_dit.method.neighbours import find_neighbours, make_frame_index
from fis_dit.method.skipped_frames import fill_skipped_attention, fill_skipped_frames, gather_frames

CPU = torch.device("cpu")


def residual_by_hand(h: torch.Tensor, y: dict[int, torch.Tensor]) -> torch.Tensor:
    """Section by section, with Python floats: h "f p d", y the outputs of the anchors."""
    out = h.clone()
    keys = sorted(y)
    for f in range(len(h)):
        if f in y:
            out[f] = y[f]
            continue
        a = max(k for k in keys if k < f)
        b = min(k for k in keys if k > f)
        u = (f - a) / (b - a)
        out[f] = h[f] + (1 - u) * (y[a] - h[a]) + u * (y[b] - h[b])
    return out


def test_the_residual_lift_is_the_formula() -> None:
    torch.manual_seed(0)
    h = torch.randn(2, 7 * 3, 4, dtype=torch.float64)
    chosen = choose_anchors(7, 3, 1)
    plan = make_frame_index(find_neighbours(7, chosen), CPU)
    y = torch.randn(2, len(chosen) * 3, 4, dtype=torch.float64)
    got = fill_skipped_frames(h, y, plan).unflatten(1, (7, 3))
    for sample in range(2):
        outputs = dict(zip(chosen, y.unflatten(1, (-1, 3))[sample], strict=True))
        want = residual_by_hand(h.unflatten(1, (7, 3))[sample], outputs)
        torch.testing.assert_close(got[sample], want, rtol=1e-6, atol=1e-6)


def test_anchors_are_copied_bit_for_bit() -> None:
    torch.manual_seed(0)
    h, y = torch.randn(1, 14, 8), torch.randn(1, 8, 8)
    plan = make_frame_index(find_neighbours(7, (0, 2, 4, 6)), CPU)
    for lift in ("residual", "hold", "carry", "state"):
        assert torch.equal(gather_frames(fill_skipped_frames(h, y, plan, lift), plan), y)


def test_the_other_lifts_are_what_their_names_say() -> None:
    h = torch.arange(5.0).view(1, 5, 1)
    y = torch.tensor([10.0, 21.0, 44.0]).view(1, 3, 1)  # at frames 0, 1, 4: residuals 10, 20, 40
    chosen = (0, 1, 4)

    def lifted(lift: str) -> list[float]:
        plan = make_frame_index(find_neighbours(5, chosen, lift=lift), CPU)
        return fill_skipped_frames(h, y, plan, lift).flatten().tolist()

    assert lifted("residual") == pytest.approx([10, 21, 2 + 20 + 20 / 3, 3 + 20 + 40 / 3, 44])
    assert lifted("hold") == [10, 21, 22, 43, 44]
    assert lifted("carry") == [10, 21, 2, 3, 44]
    assert lifted("state") == pytest.approx([10, 21, 21 + 23 / 3, 21 + 46 / 3, 44])


def test_an_attention_output_is_interpolated_itself() -> None:
    plan = make_frame_index(find_neighbours(3, (0, 2)), CPU)
    out = torch.tensor([1.0, 3.0]).view(1, 2, 1)
    assert fill_skipped_attention(out, plan).flatten().tolist() == [1, 2, 3]
    assert fill_skipped_attention(out, plan, "carry").flatten().tolist() == [1, 0, 3]


def test_gathering_keeps_whole_frames_along_any_dimension() -> None:
    plan = make_frame_index(find_neighbours(3, (0, 2)), CPU)
    table = torch.arange(6.0).view(6, 1)
    assert gather_frames(table, plan, 0).flatten().tolist() == [0, 1, 4, 5]
    assert gather_frames(table.T, plan, 1).flatten().tolist() == [0, 1, 4, 5]
