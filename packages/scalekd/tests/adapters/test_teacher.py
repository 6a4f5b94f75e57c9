"""The tail that is recorded and replayed is the teacher's own end, for values and for gradients."""

import pytest
import torch
from scalekd_tiny import TEACHERS, Foreign, tiny_teacher
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from effml_common.errors import ConfigError, InputError
from scalekd.adapters.layouts import token_grid
from scalekd.adapters.teacher import TeacherSplit


def spatial(model: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """Final tokens by family, written out here rather than asked from the code under test."""
    if isinstance(model, VisionTransformer) or hasattr(model, "blocks"):
        return features[:, model.num_prefix_tokens :]
    if "Swin" in type(model).__name__:
        return features.reshape(len(features), -1, features.shape[-1])
    return features.reshape(*features.shape[:2], -1).mT


@pytest.mark.parametrize("family", TEACHERS)
def test_replay_equals_the_teacher_with_gradients_in_every_family(family: str) -> None:
    model = tiny_teacher(family)
    x = torch.randn(2, 3, 32, 32)
    split = TeacherSplit.from_timm(model)
    out = split.forward(x)
    # Reference: timm's own forward, with the input of the split replaced by a leaf.
    leaf: list[torch.Tensor] = []

    def swap(_module, args):
        leaf.append(args[0].detach().clone().requires_grad_())
        return (leaf[0], *args[1:])

    handle = split.modules[0].register_forward_pre_hook(swap)
    expected = spatial(model, model.forward_features(x))
    handle.remove()
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    tokens = out.split.clone().requires_grad_()
    replayed = split.tail(tokens, out.context)
    (replayed * weights).sum().backward()
    assert torch.allclose(out.tokens, expected, atol=1e-5)
    assert torch.allclose(replayed, expected, atol=1e-5)
    assert leaf[0].grad is not None
    reference = leaf[0].grad
    if split.plain:
        reference = reference[:, model.num_prefix_tokens :]
    elif split.layout == "NHWC":
        reference = reference.flatten(1, 2)
    else:
        reference = reference.flatten(2).mT
    assert tokens.grad is not None
    assert torch.allclose(tokens.grad, reference, atol=1e-5)
    assert tokens.grad.abs().max() > 1e-3


@pytest.mark.parametrize("family", TEACHERS)
def test_logits_are_the_teachers_own_and_no_hook_stays(family: str) -> None:
    model = tiny_teacher(family)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    out = TeacherSplit.from_timm(model).forward(x)
    assert out.logits is not None
    assert torch.equal(out.logits, expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_two_views_in_one_call_equal_two_calls() -> None:
    for family in ("swin", "dinov3", "beit"):
        split = TeacherSplit.from_timm(tiny_teacher(family))
        out = split.forward(torch.randn(2, 3, 32, 32))
        a, b = torch.randn_like(out.split), torch.randn_like(out.split)
        both = split.tail(torch.cat([a, b]), out.context)
        apart = torch.cat([split.tail(a, out.context), split.tail(b, out.context)])
        assert torch.allclose(both, apart, atol=1e-5)


def test_the_teachers_class_token_of_the_same_image_takes_part_unless_switched_off() -> None:
    model = tiny_teacher("vit")
    x = torch.randn(2, 3, 32, 32)
    outs = []
    for prefix in ("teacher", "none"):
        split = TeacherSplit.from_timm(model, prefix=prefix)
        out = split.forward(x)
        outs.append(split.tail(out.split, out.context))
    assert outs[0].shape == outs[1].shape
    assert not torch.allclose(*outs, atol=1e-3)


def test_a_wide_image_keeps_its_rows_and_columns() -> None:
    model = SwinTransformer(
        img_size=(16, 32),
        patch_size=2,
        window_size=4,
        embed_dim=16,
        depths=(1, 1),
        num_heads=(1, 1),
    )
    out = TeacherSplit.from_timm(model).forward(torch.randn(1, 3, 16, 32))
    assert (out.context.grid, out.grid) == ((8, 16), (4, 8))
    model = VisionTransformer(img_size=(16, 32), patch_size=8, embed_dim=16, depth=3, num_heads=2)
    assert TeacherSplit.from_timm(model).forward(torch.randn(1, 3, 16, 32)).grid == (2, 4)


def test_the_teacher_is_put_into_evaluation_mode_without_gradients() -> None:
    model = TEACHERS["swin"]().train()
    TeacherSplit.from_timm(model)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_any_network_can_teach_with_named_modules() -> None:
    model = Foreign()
    split = TeacherSplit(model, [model.body], layout="NCHW")
    out = split.forward(torch.randn(2, 3, 32, 32))
    assert out.grid == (4, 4)
    assert split.check_replay(torch.randn(2, 3, 32, 32)) < 1e-6


def test_a_family_without_a_known_tail_is_refused_with_advice() -> None:
    with pytest.raises(
        InputError, match=r"no tail is known for Foreign \(tried blocks, layers, stages\)"
    ):
        TeacherSplit.from_timm(Foreign())


def test_a_tail_that_is_not_the_whole_end_is_refused() -> None:
    model = tiny_teacher("vit")
    split = TeacherSplit.from_timm(model, tail=[model.blocks[0], model.norm])
    with pytest.raises(InputError, match="replaying the tail differs from the teacher"):
        split.check_replay(torch.randn(1, 3, 32, 32))


def test_a_tail_longer_than_the_teacher_is_refused() -> None:
    with pytest.raises(ConfigError, match="tail_blocks is 9 but VisionTransformer has 3 blocks"):
        TeacherSplit.from_timm(tiny_teacher("vit"), tail_blocks=9)


def test_tokens_that_fill_no_grid_are_refused() -> None:
    assert token_grid(32, (16, 32)) == (4, 8)
    with pytest.raises(InputError, match="17 tokens fill no grid"):
        token_grid(17, (32, 32))


def test_a_teacher_that_drops_patches_is_refused() -> None:
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=3, num_heads=2, patch_drop_rate=0.5
    )
    with pytest.raises(InputError, match="drops patches"):
        TeacherSplit.from_timm(model)


@pytest.mark.slow
def test_the_tail_compiles_without_a_graph_break() -> None:
    for family in ("swin", "vit", "dinov3"):
        split = TeacherSplit.from_timm(tiny_teacher(family))
        out = split.forward(torch.randn(2, 3, 32, 32))
        plain = split.tail(out.split, out.context)
        split.compile(backend="aot_eager", fullgraph=True)
        assert torch.allclose(split.tail(out.split, out.context), plain, atol=1e-5)
