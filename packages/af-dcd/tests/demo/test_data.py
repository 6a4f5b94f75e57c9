"""The drawn scenes."""

import torch

from af_dcd.demo.data import CLASSES, draw_scenes


def test_scenes_are_those_of_their_seed_and_hold_every_class() -> None:
    a, b, c = draw_scenes(12, 3), draw_scenes(12, 3), draw_scenes(12, 4)
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.labels, b.labels)
    assert not torch.equal(a.labels, c.labels)
    counts = torch.bincount(draw_scenes(60, 0).labels.flatten(), minlength=len(CLASSES))
    assert (counts > 0).all()
    # Imbalance: the ground covers most, the rarest stripes little.
    assert counts[:2].sum() > counts.sum() / 2
    assert counts[9] < counts[2] / 3


def test_crops_cut_image_and_labels_at_the_same_place() -> None:
    scenes = draw_scenes(3, 0, side=40)
    marked = type(scenes)(scenes.labels[:, None].float().expand(-1, 3, -1, -1), scenes.labels)
    images, labels = marked.crops(8, 16, torch.Generator().manual_seed(0))
    assert images.shape == (8, 3, 16, 16)
    assert torch.equal(images[:, 0], labels.float())
