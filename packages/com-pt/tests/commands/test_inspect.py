"""``com-pt inspect``."""

import json

import pytest

from com_pt.cli import COMMANDS
from effml_common.cli import main


def call(*words: str) -> int:
    return main("com-pt", "com-pt", COMMANDS, list(words))


def test_inspect_describes_a_model_without_weights(capsys) -> None:
    assert call("inspect", "compt-ViT-S-16", "--captions", "7", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["forward GMAC"] == pytest.approx(16.43, abs=0.01)
    assert told["parameters"] == pytest.approx((21.86 + 40.49) * 1e6, rel=1e-3)
