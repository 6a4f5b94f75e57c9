"""``official`` growth, tensor by tensor, against the released routine written on flat state dicts."""

import re
from unittest.mock import patch

import pytest
import torch
from com_pt_tiny import clip, features, llama, spec, swin, vit

from com_pt.adapters.grow import grow
from com_pt.adapters.open_clip_models import build_clip
from com_pt.errors import ChainOrderError, GrowthError

COPIED_AXES = (1, 2, 4)  # tensors of three axes are left alone


def released_routine(small: dict, large: dict, *, deepen: bool) -> dict:
    """Every tensor goes where its name is; with the flag, layer l of the image tower goes twice."""
    grown = {name: value.clone() for name, value in large.items()}
    for name, value in small.items():
        targets = [name]
        if deepen and name.startswith("visual.transformer"):
            layer = int(name.split(".")[3])
            targets = [name.replace(f".{layer}.", f".{2 * layer + k}.", 1) for k in (0, 1)]
        for target in targets:
            if value.dim() == 0:
                grown[target] = value
            elif value.dim() in COPIED_AXES:
                grown[target][tuple(slice(n) for n in value.shape)] = value
    return grown


def randomize(model):
    """Give every parameter other numbers than its initialisation, so that no two are equal."""
    for value in model.parameters():
        torch.nn.init.normal_(value)
    return model


def clip_with_swin(width: int, depths: tuple[int, ...], text: int = 32, text_layers: int = 2):
    """A CLIP of open_clip whose image tower is a tiny Swin of timm."""
    settings = spec(32, text=text, text_layers=text_layers)
    settings["vision_cfg"] = {"timm_model_name": "swin_tiny_patch4_window7_224", "timm_pool": "avg",
                              "timm_proj": "linear", "image_size": 32}  # fmt: skip
    trunk = swin(width, depths)
    with patch("timm.create_model", return_value=trunk):
        return build_clip(settings).eval()


SHALLOW, DEEP = (2, 2, 2, 2), (2, 2, 6, 2)
PAIRS = {
    "Swin, wider": (lambda: swin(16, SHALLOW), lambda: swin(32, SHALLOW), False),
    "Swin, deeper": (lambda: swin(16, SHALLOW), lambda: swin(16, DEEP), False),
    "Swin, both": (lambda: swin(16, SHALLOW), lambda: swin(48, DEEP), False),
    "CLIP with Swin, wider": (lambda: clip_with_swin(16, SHALLOW),
                              lambda: clip_with_swin(32, SHALLOW, 48), False),
    "CLIP with Swin, deeper": (lambda: clip_with_swin(16, SHALLOW),
                               lambda: clip_with_swin(16, DEEP, text_layers=4), False),
    "CLIP with Swin, both": (lambda: clip_with_swin(16, SHALLOW),
                             lambda: clip_with_swin(32, DEEP, 64, 3), False),
    "CLIP, wider": (lambda: clip(32), lambda: clip(64, text=48), False),
    "CLIP, twice as deep": (lambda: clip(32, 3), lambda: clip(32, 6), True),
    "CLIP, both": (lambda: clip(32, 3), lambda: clip(64, 6, text=48), True),
    "CLIP, text deeper too": (lambda: clip(32, 2), lambda: clip(48, 4, text_layers=4), True),
    "CLIP with a text module, both": (lambda: clip(32, 2, custom=True),
                                      lambda: clip(48, 4, custom=True, text_layers=3), True),
    "timm ViT, both": (lambda: vit(32, 2), lambda: vit(64, 4), False),
    "Llama, both": (lambda: llama(32, 2), lambda: llama(64, 4), False),
}  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS)
def test_every_tensor_equals_that_of_the_released_routine(pair) -> None:
    build_small, build_large, deepen = PAIRS[pair]
    small, large = randomize(build_small()), randomize(build_large())
    expected = released_routine(small.state_dict(), large.state_dict(), deepen=deepen)
    grow(small, large, "official")
    differing = [
        n for n, value in large.state_dict().items() if not torch.equal(value, expected[n])
    ]
    assert differing == []


def test_extra_blocks_of_a_swin_stay_fresh_and_are_reported() -> None:
    small, large = randomize(swin(16, SHALLOW)), randomize(swin(16, DEEP))
    before = {name: value.clone() for name, value in large.state_dict().items()}
    report = grow(small, large, "official")
    extra = [name for name in before if re.match(r"layers\.2\.blocks\.[2-5]\.", name)]
    assert len(extra) == 4 * 13
    assert all(torch.equal(large.state_dict()[name], before[name]) for name in extra)
    assert set(report.fresh) == set(extra)
    assert report.layers["layers.2.blocks"] == [0, 1, None, None, None, None]
    assert report.depth == "released"
    assert report.inherited == pytest.approx(
        sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in large.parameters())
    )


SOURCES = {
    "interleave": [0, 0, 0, 1, 1, 1],
    "stack": [0, 1, 0, 1, 0, 1],
    "leading": [0, 1, None, None, None, None],
}


@pytest.mark.parametrize("depth", SOURCES)
@pytest.mark.parametrize("mode", ["official", "embed"])
@pytest.mark.parametrize("family", ["CLIP", "Swin"])
def test_a_depth_rule_that_is_asked_for_holds_in_every_stack(family, mode, depth) -> None:
    if family == "Swin":
        small, large, stacks = swin(16, (1, 2)), swin(16, (1, 6)), ["layers.1.blocks"]
    else:
        small, large = clip(32, 2, text_layers=2), clip(32, 6, text_layers=6)
        stacks = ["visual.transformer.resblocks", "transformer.resblocks"]
    old, before = randomize(small).state_dict(), dict(randomize(large).state_dict())
    before = {name: value.clone() for name, value in before.items()}
    assert grow(small, large, mode, depth).depth == depth
    for stack in stacks:
        for layer, source in enumerate(SOURCES[depth]):
            for name, value in large.state_dict().items():
                if not name.startswith(f"{stack}.{layer}."):
                    continue
                origin = name.replace(f"{stack}.{layer}.", f"{stack}.{source}.")
                assert torch.equal(value, before[name] if source is None else old[origin]), name


@pytest.mark.parametrize("mode", ["official", "embed", "lossless"])
def test_idle_copies_leave_the_outputs_of_a_deeper_model_as_they_were(mode) -> None:
    small, large = randomize(clip(32, 2)), randomize(clip(32, 5, text_layers=3))
    grow(small, large, mode, "identity")
    one, other = features(small), features(large)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("depth", ["interleave", "stack", "leading"])
def test_lossless_growth_refuses_a_depth_rule_that_changes_the_outputs(depth) -> None:
    with pytest.raises(
        GrowthError, match=rf"from 2 to 4 layers .* depth {depth}; use depth identity"
    ):
        grow(clip(32, 2), clip(64, 4), "lossless", depth)
    small, large = clip(32, 2), clip(64, 2)
    grow(small, large, "lossless", depth)  # no layer is added
    one, other = features(small), features(large)
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


@pytest.mark.parametrize("mode", ["official", "embed"])
def test_an_embedding_that_shrinks_is_refused(mode) -> None:
    with pytest.raises(ChainOrderError, match="order the chain from small to large"):
        grow(clip(32, embed=48), clip(64, embed=32), mode)
