"""The masks, the generators and the mimicking loss."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from af_dcd import (
    MaskedGeneration,
)
from af_dcd.method.mimicking import center_mask, feature_loss, random_mask


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_random_mask_zeroes_its_share_anew_for_each_image_and_alike_for_all_channels() -> None:
    torch.manual_seed(0)
    mask = random_mask(torch.zeros(4, 3, 100, 100), 0.75)
    assert mask.shape == (4, 1, 100, 100)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert mask.mean().item() == pytest.approx(0.25, abs=0.01)
    assert not torch.equal(mask[0], mask[1])


def test_a_mask_ratio_of_zero_keeps_everything() -> None:
    assert random_mask(torch.zeros(1, 2, 50, 50), 0.0).min() == 1


def test_the_centre_mask_zeroes_the_middle_third_of_both_sides() -> None:
    mask = center_mask(torch.zeros(2, 3, 9, 7))[0, 0]
    for y in range(9):
        for x in range(7):
            assert mask[y, x] == (0 if 3 <= y < 6 and 2 <= x < 4 else 1)


def test_the_generator_is_two_convolutions_with_a_relu_on_the_masked_aligned_map() -> None:
    module = MaskedGeneration(3, 5, mask="center").double()
    x = noise(2, 3, 6, 6)
    aligned = torch.einsum("bchw,dc->bdhw", x, module.align.weight[:, :, 0, 0])
    aligned = aligned + module.align.bias[:, None, None]
    masked = aligned.clone()
    masked[:, :, 2:4, 2:4] = 0
    a, b = module.generator.enter, module.generator.leave
    inner = F.conv2d(masked, a.weight, a.bias, padding=1).clamp(min=0)
    torch.testing.assert_close(module(x), F.conv2d(inner, b.weight, b.bias, padding=1))


def test_the_enhanced_generator_averages_two_depths() -> None:
    module = MaskedGeneration(5, 5, mask_ratio=0.0, enhanced=True).double()
    x, g = noise(1, 5, 4, 4), module.generator
    first = F.conv2d(x, g.enter.weight, g.enter.bias, padding=1).clamp(min=0)
    second = F.conv2d(first, g.deepen.weight, g.deepen.bias, padding=1).clamp(min=0)
    expected = F.conv2d(first, g.leave.weight, g.leave.bias, padding=1)
    expected = expected + F.conv2d(second, g.leave_deep.weight, g.leave_deep.bias, padding=1)
    torch.testing.assert_close(module(x), expected / 2)


def test_equal_channels_need_no_alignment() -> None:
    assert isinstance(MaskedGeneration(4, 4).align, nn.Identity)


def test_the_papers_generator_has_as_many_weights_as_counted_from_its_shapes() -> None:
    with torch.device("meta"):
        plain, enhanced = (MaskedGeneration(512, 2048, enhanced=e).generator for e in (False, True))
    counts = [sum(p.numel() for p in g.parameters()) for g in (plain, enhanced)]
    assert counts == [2 * (9 * 2048**2 + 2048), 4 * (9 * 2048**2 + 2048)]


def test_mimicking_sums_over_the_map_and_averages_over_images() -> None:
    a, b = noise(2, 3, 4, 5), noise(2, 3, 4, 5, seed=1)
    by_hand = sum(
        (x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)
    )
    assert feature_loss(a, b).item() == pytest.approx(by_hand / 2)
    assert feature_loss(a, b, "mean").item() == pytest.approx(by_hand / 120)
