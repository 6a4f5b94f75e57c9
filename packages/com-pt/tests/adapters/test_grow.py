"""Growth against independent computations: slices written by hand, and the models' own outputs."""

import pytest
import torch
from com_pt_tiny import clip, features, llama, spec_with_swin, swin, vit

from com_pt.adapters.grow import grow, state_of
from com_pt.adapters.layouts import layout_of, register_layout
from com_pt.errors import ChainOrderError, GrowthError, LayoutError, NonFiniteWeightsError

BLOCK = "visual.transformer.resblocks.0"


def gap(one, other) -> float:
    a, b = features(one), features(other)
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def copies(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in state_of(model).items()}


def test_official_growth_equals_slices_written_by_hand_and_puts_keys_into_query_rows() -> None:
    small, large = clip(32), clip(64)
    fresh = copies(large)
    grow(small, large, "official")
    expected = {}
    for name, value in fresh.items():  # the released routine, in six lines
        source, target = state_of(small)[name], value.clone()
        if source.dim() == 0:
            target = source
        elif source.dim() != 3:
            target[tuple(slice(n) for n in source.shape)] = source
        expected[name] = target
    assert all(torch.equal(value, expected[name]) for name, value in state_of(large).items())
    packed = state_of(large)[f"{BLOCK}.attn.in_proj_weight"]
    of_small = state_of(small)[f"{BLOCK}.attn.in_proj_weight"]
    # The quirk: the small model's keys (rows 32 to 63) stand among the large one's queries (0 to 63),
    # its values among the keys, and the large values are untouched.
    assert torch.equal(packed[32:64, :32], of_small[32:64])
    assert torch.equal(packed[64:96, :32], of_small[64:96])
    assert torch.equal(packed[128:], fresh[f"{BLOCK}.attn.in_proj_weight"][128:])


def test_official_growth_skips_tensors_of_three_axes_as_the_release_does() -> None:
    small, large = vit(32), vit(64)
    before = copies(large)
    report = grow(small, large, "official")
    assert torch.equal(large.pos_embed, before["pos_embed"])
    assert {"pos_embed", "cls_token"} <= set(report.fresh)


def test_embed_growth_keeps_queries_keys_and_values_apart_and_leaves_the_rest_fresh() -> None:
    small, large = clip(32), clip(64)
    fresh = copies(large)
    grow(small, large, "embed")
    packed, old = (state_of(m)[f"{BLOCK}.attn.in_proj_weight"] for m in (large, small))
    for block in range(3):
        assert torch.equal(packed[64 * block :][:32, :32], old[32 * block :][:32])
    mask = torch.zeros_like(packed, dtype=torch.bool)
    for block in range(3):
        mask[64 * block : 64 * block + 32, :32] = True
    assert torch.equal(packed[~mask], fresh[f"{BLOCK}.attn.in_proj_weight"][~mask])
    head = slice(16, 32)  # head 1 of 2 stays head 1 of 4
    assert torch.equal(packed[64:128][head, :32], old[32:64][head])


def test_every_number_outside_the_mapped_ones_stays_fresh_in_embed_mode() -> None:
    small, large = vit(32), vit(48)
    fresh = copies(large)
    report = grow(small, large)
    changed = sum(int((v != fresh[n]).sum()) for n, v in state_of(large).items())
    total = sum(v.numel() for v in fresh.values())
    assert changed <= sum(v.numel() for v in state_of(small).values())
    assert report.inherited == pytest.approx(
        sum(v.numel() for v in state_of(small).values()) / total
    )


def test_swin_merging_keeps_the_four_neighbours_apart() -> None:
    small, large = swin(16), swin(32)
    grow(small, large)
    new, old = (m.layers[1].downsample.reduction.weight for m in (large, small))
    for quarter in range(4):
        mine = new[:32, 32 * quarter : 32 * quarter + 16]
        assert torch.equal(mine, old[:, 16 * quarter : 16 * quarter + 16])


@pytest.mark.parametrize("width", [64, 96])
def test_lossless_growth_keeps_clip_outputs_at_whole_ratios(width) -> None:
    small, large = clip(32), clip(width)
    grow(small, large, "lossless")
    assert gap(small, large) < 1e-5


def test_lossless_growth_keeps_outputs_when_towers_depths_and_class_of_the_model_all_change() -> (
    None
):
    small, large = clip(32), clip(64, 4, text=48, text_layers=5, custom=True)
    report = grow(small, large, "lossless")
    assert gap(small, large) < 1e-5
    assert report.layers["text.transformer.resblocks"] == [0, 0, 0, 1, 1]


def test_lossless_growth_keeps_layer_scale_models_at_whole_ratios() -> None:
    small, large = clip(32, ls_init_value=0.3), clip(64, ls_init_value=0.3)
    grow(small, large, "lossless")
    assert gap(small, large) < 1e-5


@pytest.mark.parametrize(("small", "large"), [(48, 80), (32, 64), (32, 96)])
def test_lossless_growth_keeps_a_vits_logits_at_any_ratio(small, large) -> None:
    one, other = vit(small), vit(large, 4)
    for (
        name,
        value,
    ) in one.named_parameters():  # biases and gains of a trained model are not 0 and 1
        torch.nn.init.normal_(value, 1.0 if "norm" in name else 0.0, 0.1)
    grow(one, other, "lossless")
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        assert (one(x) - other(x)).abs().max() < 1e-5


def test_lossless_growth_keeps_a_swins_logits() -> None:
    small, large = swin(16), swin(32, (2, 3))
    report = grow(small, large, "lossless")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert (small(x) - large(x)).abs().max() < 1e-5
    assert report.layers == {"layers.0.blocks": [0, 0], "layers.1.blocks": [0, 0, 0]}


@pytest.mark.parametrize("tied", [False, True])
def test_lossless_growth_keeps_a_llamas_logits_and_its_config_knows_the_new_eps(tied) -> None:
    small = llama(32, tie_word_embeddings=tied)
    large = llama(48, 4, tie_word_embeddings=tied)
    ids = torch.randint(0, 257, (2, 9))
    grow(small, large, "lossless")
    with torch.no_grad():
        assert (small(ids).logits - large(ids).logits).abs().max() < 1e-5
        assert large.config.rms_norm_eps == pytest.approx(1e-6 * 32 / 48)
        for module in large.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = 1e-6
        without = (small(ids).logits - large(ids).logits).abs().max()
        assert 1e-6 < without < 1e-3
        half = large.to(torch.bfloat16)
        assert (small(ids).logits - half(ids).logits).abs().max() < 2e-2


def test_duplicated_units_are_shared_unevenly_so_that_they_can_part() -> None:
    small, large = clip(32), clip(64)
    grow(small, large, "lossless")
    weight = state_of(large)[f"{BLOCK}.mlp.c_fc.weight"]
    assert not torch.allclose(weight[:128], weight[128:], atol=1e-4)
    sums = weight[:, :32] + weight[:, 32:]
    torch.testing.assert_close(sums[:128], state_of(small)[f"{BLOCK}.mlp.c_fc.weight"])


@pytest.mark.parametrize("mode", ["embed", "official", "lossless"])
def test_growth_to_the_same_size_is_the_identity(mode) -> None:
    for small, large in ((clip(32), clip(32)), (vit(32), vit(32)), (swin(16), swin(16))):
        grow(small, large, mode)
        if mode == "official" and hasattr(small, "pos_embed"):
            continue  # the release skips three axes
        pairs = zip(state_of(small).values(), state_of(large).values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_idle_copies_of_layers_change_nothing_at_all() -> None:
    small, large = clip(32, 2), clip(32, 5)
    grow(small, large, "embed", depth="identity")
    assert gap(small, large) == 0


def test_interleaved_layers_equal_their_source() -> None:
    small, large = vit(32, 2), vit(32, 4)
    grow(small, large)
    for j, source in enumerate((0, 0, 1, 1)):
        assert torch.equal(large.blocks[j].mlp.fc1.weight, small.blocks[source].mlp.fc1.weight)


def test_random_growth_takes_nothing() -> None:
    small, large = clip(32), clip(64)
    before = copies(large)
    report = grow(small, large, "random")
    assert report.inherited == 0
    assert all(torch.equal(v, before[n]) for n, v in state_of(large).items())


def test_positions_are_interpolated_when_the_picture_grows_and_asked_for() -> None:
    small, large = clip(32, size=(16, 16)), clip(32, size=(32, 32))
    with pytest.raises(GrowthError, match="image size is"):
        grow(small, large)
    grow(small, large, resize_pos=True)
    from open_clip.model import resize_pos_embed

    expected = {"visual.positional_embedding": small.visual.positional_embedding.detach().clone()}
    resize_pos_embed(expected, large)
    torch.testing.assert_close(
        large.visual.positional_embedding.detach(), expected["visual.positional_embedding"]
    )


def test_a_bias_of_one_side_only_stays_fresh_and_is_named() -> None:
    small, large = clip(32), clip(64)
    large.logit_bias = torch.nn.Parameter(torch.full((), -10.0))
    assert grow(small, large).fresh == ["logit_bias"]
    small.logit_bias, large.logit_bias = large.logit_bias, None
    assert grow(small, large).skipped == ["logit_bias"]


@pytest.mark.parametrize(
    ("small", "large", "mode", "error", "message"),
    [
        (lambda: clip(64), lambda: clip(32), "embed", ChainOrderError, r"\w.*shrinks from"),
        (lambda: clip(64), lambda: clip(32), "official", ChainOrderError, "does not fit into"),
        (lambda: clip(32, 4), lambda: clip(32, 2), "embed", GrowthError, "depth falls from 4 to 2"),
        (lambda: clip(32), lambda: clip(64, head_width=32), "embed", GrowthError, "add heads"),
        (lambda: clip(32), lambda: clip(64, patch=2), "embed", GrowthError, "patch size is"),
        (lambda: clip(32), lambda: clip(64, vocab=12), "embed", GrowthError, "vocabulary is 10"),
        (lambda: clip(32), lambda: clip(64, length=9), "embed", GrowthError, "context length is 8"),
        (lambda: clip(32), lambda: clip(48), "lossless", GrowthError, "a norm stands before"),
        (lambda: clip(32), lambda: clip(64, embed=48), "lossless", GrowthError, "EMBED axis of 32"),
        (lambda: vit(32), lambda: swin(32), "embed", GrowthError, "cannot grow into timm Swin"),
        (lambda: vit(32), lambda: vit(48, block_fn=_post_norm()), "lossless", GrowthError,
         "normalises after its branches; use mode embed"),
        (lambda: vit(32, init_values=0.1), lambda: vit(48, init_values=0.1), "lossless",
         GrowthError, "LayerScale does not allow"),
        (lambda: llama(32), lambda: llama(64, num_key_value_heads=2), "embed", GrowthError,
         "query heads share a key head"),
        (lambda: llama(32), lambda: llama(48, rope_theta=5.0), "embed", GrowthError, "rope is"),
        (lambda: clip(32), lambda: clip(32).to("meta"), "embed", GrowthError, "meta device"),
        (lambda: clip(32).to("meta"), lambda: clip(32), "embed", GrowthError, "meta device"),
    ],
)  # fmt: skip
def test_pairs_that_cannot_be_connected_are_refused_with_the_reason(
    small, large, mode, error, message
) -> None:
    one, other = small(), large()
    before = copies(other)
    with pytest.raises(error, match=message) as caught:
        grow(one, other, mode)
    assert "; " in str(caught.value)
    if not any(v.is_meta for v in before.values()):
        assert all(torch.equal(v, before[n]) for n, v in state_of(other).items())


def _post_norm():
    from timm.models.vision_transformer import ResPostBlock

    return ResPostBlock


def test_depths_that_are_no_multiple_are_refused_only_when_strict() -> None:
    with pytest.raises(GrowthError, match="3 layers are no multiple of 2"):
        grow(clip(32, 2), clip(32, 3), strict=True)
    assert grow(clip(32, 2), clip(32, 3)).layers["visual.transformer.resblocks"] == [0, 0, 1]


def test_a_parameter_without_roles_or_without_a_partner_is_refused_unless_allowed() -> None:
    small, large = clip(32), clip(64)
    large.extra = torch.nn.Linear(2, 2)
    with pytest.raises(LayoutError, match=r"extra\.weight has no axis roles"):
        grow(small, large)
    assert {"extra.weight", "extra.bias"} <= set(
        grow(small, large, allow_missing=["extra.*"]).fresh
    )
    del large.extra
    del large.visual.class_embedding
    with pytest.raises(LayoutError, match=r"no place for visual\.class_embedding"):
        grow(small, large)
    with pytest.raises(LayoutError, match=r"the small model has no blocks\.0\.ls1\.gamma"):
        grow(vit(32), vit(48, init_values=0.1))


def test_numbers_that_are_not_finite_are_refused_before_anything_is_written() -> None:
    small, large = clip(32), clip(64)
    small.visual.proj.data[0, 0] = float("nan")
    before = copies(large)
    with pytest.raises(FloatingPointError, match=r"visual\.proj holds NaN"):
        grow(small, large)
    with pytest.raises(NonFiniteWeightsError):
        grow(small, large)
    assert all(torch.equal(v, before[n]) for n, v in state_of(large).items())


def test_half_precision_sources_are_upcast_with_a_warning(capsys) -> None:
    small, large = clip(32).to(torch.bfloat16), clip(64)
    grow(small, large)
    assert "half precision" in capsys.readouterr().err
    assert large.visual.proj.dtype == torch.float32
    assert torch.equal(large.visual.proj[:32], small.visual.proj.float())


def test_batch_norm_towers_and_unknown_classes_are_refused_with_advice() -> None:
    import timm

    with pytest.raises(GrowthError, match="has BatchNorm and cannot be grown"):
        layout_of(timm.create_model("resnet10t"))
    with pytest.raises(GrowthError, match="BatchNorm cannot be grown"):
        layout_of(clip(32, [1, 1, 1, 1], size=64))
    with pytest.raises(LayoutError, match="no layout for Linear; use"):
        layout_of(torch.nn.Linear(2, 2))


def test_a_layout_of_ones_own_makes_another_architecture_grow() -> None:
    from com_pt.method.layout import Layout, Tower, rules

    class Net(torch.nn.Sequential):
        pass

    def make(model):
        table = rules({"0.weight": "MLP FIXED", "0.bias": "MLP", "1.weight": "CLASS <MLP"})
        return Layout("net", table, {"": Tower(width=1, head_dim=1, heads=1)})

    register_layout(lambda model: isinstance(model, Net), make)
    nets = [Net(torch.nn.Linear(3, n), torch.nn.Linear(n, 2, bias=False)) for n in (4, 6)]
    grow(nets[0], nets[1])
    old, new = (state_of(net)["0.weight"] for net in nets)
    assert torch.equal(new[:4], old)


def test_growth_composes_along_a_chain_and_nearness_orders_the_modes() -> None:
    small = clip(32)
    first = features(small)
    cosines = {}
    for mode in ("random", "official", "embed", "lossless"):
        torch.manual_seed(3)
        middle, large = clip(64), clip(128, 4)
        grow(small, middle, mode)
        grow(middle, large, mode)
        made = features(large)
        cosines[mode] = sum(float(torch.cosine_similarity(first[k], made[k]).mean()) for k in first)
    assert cosines["random"] < cosines["official"] < cosines["embed"] < cosines["lossless"]
    assert cosines["lossless"] == pytest.approx(2, abs=1e-5)


def every_model():
    from pathlib import Path

    import timm

    from com_pt.adapters.open_clip_models import OWN_CONFIGS, build_clip, clip_config

    for name in sorted(Path(OWN_CONFIGS).glob("*.json")):
        yield name.stem, lambda name=name: build_clip(clip_config(name.stem))
    names = [f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")]
    names += [f"swin_{size}_patch4_window7_224" for size in ("tiny", "small", "base", "large")]
    for name in names:
        yield name, lambda name=name: timm.create_model(name)


@pytest.mark.parametrize(("name", "build"), list(every_model()))
def test_every_parameter_of_the_families_has_roles_that_fit_its_axes(name, build) -> None:
    with torch.device("meta"):
        model = build()
    layout = layout_of(model)
    for parameter, value in state_of(model).items():
        assert len(layout.rule_of(parameter).axes) == value.dim(), parameter


def test_every_parameter_of_llama_and_of_a_clip_with_a_swin_has_roles() -> None:
    from com_pt.adapters.open_clip_models import build_clip

    settings = spec_with_swin()
    with torch.device("meta"):
        models = [llama(32, attention_bias=True, mlp_bias=True), build_clip(settings)]
    for model in models:
        layout = layout_of(model)
        for parameter, value in state_of(model).items():
            assert len(layout.rule_of(parameter).axes) == value.dim(), parameter


@pytest.mark.parametrize("mode", ["embed", "official", "lossless"])
def test_growth_needs_no_device_of_its_own(mode) -> None:
    """A default device must not matter: every helper tensor stands beside the weights."""
    grown = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        small, large = clip(32), clip(64)
        with torch.device(device):
            grow(small, large, mode)
        grown.append(features(large))
    for name, value in grown[0].items():
        torch.testing.assert_close(grown[1][name], value, atol=0, rtol=0)
