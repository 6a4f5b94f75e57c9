"""Shards."""

from com_pt_tiny import spec, task_of

from com_pt.adapters.sharding import blocks_of


def test_the_blocks_of_a_tower_are_sharded_one_by_one(pictures) -> None:
    model = task_of(pictures).build(spec(32))
    kinds = [type(block).__name__ for block in blocks_of(model)]
    assert kinds == ["ResidualAttentionBlock"] * 4
