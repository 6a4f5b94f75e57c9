"""Mimicking, logits KD, the rivals, the presets and the tap grammar."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from af_dcd import (
    PRESETS,
    AfDCDLoss,
    DistillConfig,
    MaskedGeneration,
    cwd_loss,
    feature_mse_loss,
    logits_kd_loss,
    omni_contrastive_loss,
)
from af_dcd.distillation import kd_term, same_size
from af_dcd.mimicking import center_mask, feature_loss, random_mask
from af_dcd.presets import changed, options
from af_dcd.taps import Tap, as_map, find_module, recording
from effml_common.errors import ConfigError, InputError


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


def test_logits_kd_is_the_kl_divergence_from_the_teacher_per_pixel() -> None:
    zs, zt, t = noise(2, 4, 3, 2), noise(2, 4, 3, 2, seed=1), 2.5
    total = 0.0
    for b in range(2):
        for y in range(3):
            for x in range(2):
                s, p = ([math.exp(v / t) for v in z[b, :, y, x].tolist()] for z in (zs, zt))
                total += sum(
                    u / sum(p) * math.log((u / sum(p)) / (v / sum(s)))
                    for u, v in zip(p, s, strict=True)
                )
    assert logits_kd_loss(zs, zt, t).item() == pytest.approx(t * t * total / 12)


def test_logits_kd_leaves_ignored_pixels_out_and_survives_when_all_are() -> None:
    zs, zt = noise(1, 4, 2, 2), noise(1, 4, 2, 2, seed=1)
    ignore = torch.tensor([[[True, False], [False, False]]])
    apart = [logits_kd_loss(zs[:, :, y, x, None, None], zt[:, :, y, x, None, None]) for y, x in
             ((0, 1), (1, 0), (1, 1))]  # fmt: skip
    value = logits_kd_loss(zs, zt, ignore=ignore)
    assert value.item() == pytest.approx(torch.stack(apart).mean().item())
    assert logits_kd_loss(zs, zt, ignore=torch.ones_like(ignore)).item() == 0


def test_cwd_compares_where_each_channel_is_active() -> None:
    s, t = noise(2, 3, 2, 2), noise(2, 3, 2, 2, seed=1)
    total = 0.0
    for b in range(2):
        for c in range(3):
            p, q = ((x[b, c].flatten() / 4).softmax(0) for x in (t, s))
            total += float((p * (p / q).log()).sum())
    assert cwd_loss(s, t).item() == pytest.approx(16 * total / 6)
    assert cwd_loss(t + 3, t).item() == pytest.approx(0, abs=1e-12)


def test_feature_mse_is_a_plain_mean() -> None:
    assert feature_mse_loss(noise(1, 2, 2, 2) * 0, noise(1, 2, 2, 2) * 0 + 3).item() == 9


def test_the_branch_returns_both_weighted_terms_and_contrasts_the_generated_map() -> None:
    config = DistillConfig(lambda_fd=0.5, lambda_ctr=0.25, mask="center", pool=1, groups=4)
    branch = AfDCDLoss(3, 8, config).double()
    fs, ft = noise(2, 3, 4, 4).requires_grad_(), noise(2, 8, 4, 4, seed=1).requires_grad_()
    terms = branch(fs, ft)
    generated = branch.generation(fs)
    assert terms["loss_fd"].item() == pytest.approx(0.5 * feature_loss(generated, ft).item())
    contrast = omni_contrastive_loss(generated, ft, pool=1, groups=4).item()
    assert terms["loss_ctr"].item() == pytest.approx(0.25 * contrast)
    terms["loss_ctr"].backward()
    assert ft.grad is None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in branch.parameters())
    assert fs.grad is not None
    assert fs.grad.abs().sum() > 0


def test_spatial_and_channel_contrast_are_cases_of_the_omni_form() -> None:
    base = {"groups": 4, "patch": 2, "pool": 1}
    s, t = noise(1, 8, 4, 4), noise(1, 8, 4, 4, seed=1)
    spatial = DistillConfig(contrast="spatial", **base).contrast_settings()
    channel = DistillConfig(contrast="channel", **base).contrast_settings()
    whole = {"pool": 1, "tau": 0.07}
    assert omni_contrastive_loss(s, t, **spatial) == omni_contrastive_loss(
        s, t, groups=1, patch=2, negatives="all", **whole
    )
    assert omni_contrastive_loss(s, t, **channel) == omni_contrastive_loss(
        s, t, groups=4, patch=1, **whole
    )


def test_the_contrast_falls_when_it_is_followed() -> None:
    t = noise(1, 8, 4, 4).relu()
    s = noise(1, 8, 4, 4, seed=1).requires_grad_()
    optimizer = torch.optim.SGD([s], lr=1.0)
    values = []
    for _ in range(30):
        loss = omni_contrastive_loss(s, t, groups=4, patch=2, pool=1, tau=1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.9 * values[0]


@pytest.mark.parametrize(
    ("name", "kd", "fd", "ctr"),
    [
        ("cityscapes", 1, 2e-6, 5e-3), ("voc", 1, 1e-6, 5e-3), ("camvid", 1, 8e-6, 1e-2),
        ("ade20k", 0.5, 1e-6, 4e-2), ("coco_stuff164k", 0.5, 5e-6, 5e-3),
    ],
)  # fmt: skip
def test_presets_are_the_released_scripts(name, kd, fd, ctr) -> None:
    preset = PRESETS[name]
    assert (preset.lambda_kd, preset.lambda_fd, preset.lambda_ctr) == (kd, fd, ctr)
    assert (preset.tau, preset.groups, preset.patch, preset.mask_ratio) == (0.07, 16, 4, 0.75)
    assert (preset.pool, preset.crop_to_fit) == ((1, True) if name == "camvid" else (4, False))


@pytest.mark.parametrize(
    "wrong",
    [
        {"lambda_ctr": -1.0}, {"tau": 0.0}, {"temperature": -1.0}, {"mask_ratio": 1.0}, {"p": 3},
        {"groups": 0}, {"mask": "left"}, {"negatives": "few"}, {"resize": "both"},
        {"lambda_fd": float("nan")},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong) -> None:
    with pytest.raises(ConfigError, match="; give"):
        DistillConfig(**wrong)


def test_unknown_settings_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean groups"):
        changed(DistillConfig(), {"group": 4})


def test_words_become_settings() -> None:
    found = options(("groups=8", "patch=none", "enhanced=true", "mask=center", "tau=0.5"))
    expected = {"groups": 8, "patch": None, "enhanced": True, "mask": "center", "tau": 0.5}
    assert found == expected
    with pytest.raises(ConfigError, match="write name=value"):
        options(("groups",))


def test_maps_of_two_sizes_need_a_side_to_resize() -> None:
    a, b = noise(1, 2, 4, 4), noise(1, 2, 8, 8)
    assert same_size(a, b, "student")[0].shape == b.shape
    assert same_size(a, b, "teacher")[1].shape == a.shape
    with pytest.raises(InputError, match=r"4x4 and the teacher's 8x8; .*resize"):
        same_size(a, b, "none")


def test_class_counts_that_differ_are_refused_unless_kd_is_off() -> None:
    a, b = noise(1, 3, 2, 2), noise(1, 4, 2, 2)
    with pytest.raises(InputError, match=r"3 classes and the teacher 4; .*lambda_kd=0"):
        kd_term(a, b, DistillConfig())
    assert kd_term(a, b, DistillConfig(lambda_kd=0)) == {}


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
    assert as_map((a, b), Tap.parse("module:x:1")) is b
    assert as_map({"low": a, "high": b}, Tap.parse("module:x:high")) is b
    with pytest.raises(InputError, match="append :<entry>, of 0 to 1"):
        as_map((a, b), Tap.parse("module:x"))
    with pytest.raises(InputError, match="no entry 5; it has 0 to 1"):
        as_map((a, b), Tap.parse("module:x:5"))
    with pytest.raises(InputError, match="no entry mid; it has low, high"):
        as_map({"low": a, "high": b}, Tap.parse("module:x:mid"))
    with pytest.raises(InputError, match=r"gives \(1, 2\); tap a module"):
        as_map(a[:, :, 0, 0], Tap.parse("module:x"))


def test_recording_leaves_no_hook_behind() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1))
    with recording(model, Tap.parse("module:0")) as seen:
        model(torch.zeros(1, 1, 2, 2))
    assert len(seen) == 1
    assert not model[0]._forward_hooks
