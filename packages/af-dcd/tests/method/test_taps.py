"""The tap grammar, and reading what a tapped module returns."""

import pytest
import torch
from torch import nn

from af_dcd.method.taps import Tap, feature_map, find_module, record_outputs
from effml_common.errors import InputError


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("text", "tap"),
    [
        ("feat:-1", Tap("feat", entry="-1")), ("feat:2", Tap("feat", entry="2")),
        ("pre_cls", Tap("pre_cls")), ("module:backbone.layer4", Tap("module", "backbone.layer4")),
        ("module:a.b:3", Tap("module", "a.b", "3")), ("module:a:out", Tap("module", "a", "out")),
    ],
)  # fmt: skip
def test_taps_are_read(text, tap) -> None:
    assert Tap.parse(text) == tap


@pytest.mark.parametrize("text", ["", "feat", "feat:x", "layer4", "module:", "module:a b"])
def test_what_is_no_tap_is_refused_with_the_grammar(text) -> None:
    with pytest.raises(InputError, match="no tap; write feat:-1"):
        Tap.parse(text)


def test_a_module_that_is_not_there_is_answered_with_near_ones() -> None:
    model = nn.Sequential()
    model.add_module("layer4", nn.Conv2d(1, 1, 1))
    with pytest.raises(InputError, match="no module 'layr4'; try layer4"):
        find_module(model, "layr4")


def test_collections_need_an_entry_and_maps_four_dimensions() -> None:
    a, b = noise(1, 2, 3, 3), noise(1, 2, 4, 4)
    assert feature_map((a, b), Tap.parse("module:x:1")) is b
    assert feature_map({"low": a, "high": b}, Tap.parse("module:x:high")) is b
    with pytest.raises(InputError, match="append :<entry>, of 0 to 1"):
        feature_map((a, b), Tap.parse("module:x"))
    with pytest.raises(InputError, match="no entry 5; it has 0 to 1"):
        feature_map((a, b), Tap.parse("module:x:5"))
    with pytest.raises(InputError, match="no entry mid; it has low, high"):
        feature_map({"low": a, "high": b}, Tap.parse("module:x:mid"))
    with pytest.raises(InputError, match=r"gives \(1, 2\); tap a module"):
        feature_map(a[:, :, 0, 0], Tap.parse("module:x"))


def test_recording_leaves_no_hook_behind() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1))
    with record_outputs(model, Tap.parse("module:0")) as seen:
        model(torch.zeros(1, 1, 2, 2))
    assert len(seen) == 1
    assert not model[0]._forward_hooks
