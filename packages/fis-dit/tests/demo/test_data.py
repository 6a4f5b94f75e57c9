"""The demo's clips."""

import pytest
import torch

from fis_dit.demo.data import CLIP_SETS, FRAMES, MAX_SPEED, draw_clips, to_pixels

each_data = pytest.mark.parametrize("data", CLIP_SETS)


@each_data
def test_clips_are_standardised_and_move_at_most_at_the_top_speed(data: str) -> None:
    values, labels, speeds = draw_clips(data, 128, seed=0)
    size = CLIP_SETS[data].size
    assert values.shape == (128, 1, FRAMES, size, size)
    assert abs(values.mean()) < 0.15
    assert 0.8 < values.std() < 1.2
    assert labels.max() < CLIP_SETS[data].classes
    assert speeds.max() <= MAX_SPEED
    pixels = to_pixels(data, values)
    assert pixels.min() == 0
    assert pixels.max() <= 1
    assert torch.equal(draw_clips(data, 128, seed=0)[0], values)


def test_a_shape_moves_by_its_speed_between_walls() -> None:
    values, _, speeds = draw_clips("shapes", 64, seed=1)
    mass = to_pixels("shapes", values)[:, 0]
    grid = torch.arange(9.0)
    total = mass.sum((2, 3))
    centre = torch.stack(
        [(mass.sum(3) * grid).sum(2) / total, (mass.sum(2) * grid).sum(2) / total], -1
    )
    moved = centre.diff(dim=1).norm(dim=-1).median(dim=1).values
    torch.testing.assert_close(moved, speeds, atol=0.12, rtol=0.15)
