"""Settings and their defaults."""

from com_pt.training.chain import parse_chain


def test_missing_epochs_follow_the_linear_rule() -> None:
    stages = [{"name": str(i), "model": "x"} for i in range(4)]
    chain = parse_chain({"task": "clip", "stages": stages, "individual_epochs": 128})
    assert [chain.epochs_of(i) for i in range(4)] == [128, 25, 20, 16]
