"""Every pair of the paper is planned from shapes alone, to the published digits."""

import pytest

from effml_common.errors import InputError
from scalekd.commands.inspect import PUBLISHED, describe_pair, inspect
from scalekd.config import InspectConfig

# Projector sizes in million weights, computed from the formula of CAP with pencil and paper.
SIZES = {
    ("swin_large", "resnet50"): 176.0,
    ("swin_large", "mobilenetv1"): 97.0,
    ("swin_large", "swin_tiny"): 84.6,
    ("swin_large", "mixer_s16"): 79.8,
    ("swin_large", "vit_small"): 74.4,
    ("swin_large", "vit_base"): 94.2,
    ("eva_large", "resnet50"): 154.3,
    ("eva_large", "vit_base"): 75.0,
}
# (C3, grid), (C4, grid), (split, final) widths, heads, tau, summed weights: the released settings.
R50 = ("1024 channels on 14x14", "2048 channels on 7x7")
SETTINGS = {
    ("swin_large", "resnet50"): (*R50, 768, 1536, [16, 24], 5, (0.08, 0.06), "bn"),
    ("swin_large", "mobilenetv1"): (
        "512 channels on 14x14", "1024 channels on 7x7", 768, 1536, [16, 24], 5, (0.08, 0.06), "bn",
    ),
    ("swin_large", "convnext_tiny"): (
        "384 channels on 14x14", "768 channels on 7x7", 768, 1536, [8, 16], 1, (0.08, 0.06), "bn",
    ),
    ("swin_large", "swin_tiny"): (
        "384 channels on 14x14", "768 channels on 7x7", 768, 1536, [24, 48], 1, (0.08, 0.06), "ln",
    ),
    ("swin_large", "mixer_s16"): (
        "512 channels on 14x14", "512 channels on 14x14", 768, 1536, [8, 8], 5, (0.08, 0.06), "bn",
    ),
    ("swin_large", "mixer_b16"): (
        "768 channels on 14x14", "768 channels on 14x14", 768, 1536, [8, 8], 5, (0.08, 0.06), "bn",
    ),
    ("swin_large", "vit_small"): (
        "384 channels on 14x14", "384 channels on 14x14", 768, 1536, [8, 8], 5, (0.08, 0.06), "bn",
    ),
    ("swin_large", "vit_base"): (
        "768 channels on 14x14", "768 channels on 14x14", 768, 1536, [8, 8], 5, (0.08, 0.06), "bn",
    ),
    ("swin_base", "resnet50"): (*R50, 512, 1024, [8, 16], 5, (0.08, 0.06), "bn"),
    ("swin_small", "resnet50"): (*R50, 384, 768, [3, 6], 5, (0.08, 0.06), "bn"),
    ("eva_large", "resnet50"): (*R50, 1024, 1024, [8, 8], 0.2, (0.016, 0.008), "bn"),
    ("eva_large", "mixer_b14"): (
        "768 channels on 16x16", "768 channels on 16x16", 1024, 1024, [8, 8], 1, (0.016, 0.008), "bn",
    ),
    ("eva_large", "vit_base"): (
        "768 channels on 16x16", "768 channels on 16x16", 1024, 1024, [8, 8], 1, (0.016, 0.008), "bn",
    ),
    ("eva_large", "eva02_small"): (
        "384 channels on 24x24", "384 channels on 24x24", 1024, 1024, [8, 8], 1, (0.008, 0.004), "bn",
    ),
}  # fmt: skip


# Each teacher and most kinds of students; the other pairs are slow tests.
FIRST = {("swin_large", "mixer_s16"), ("swin_large", "swin_tiny"), ("swin_large", "vit_small")}
FIRST |= {("swin_base", "resnet50"), ("swin_small", "resnet50"), ("eva_large", "eva02_small")}


def published() -> list:
    return [
        pytest.param(
            row,
            id=f"{row[0][:10]}-{row[1]}-{row[3]}",
            marks=[] if settings_key(row) in FIRST else [pytest.mark.slow],
        )
        for row in PUBLISHED
    ]


def settings_key(row) -> tuple[str, str]:
    return next(k for k in SETTINGS if row[0].startswith(k[0]) and row[1].startswith(k[1]))


@pytest.mark.parametrize("row", published())
def test_a_pair_of_the_paper_has_its_shapes_settings_and_projector_size(row) -> None:
    teacher, student, extra, size = row
    key = settings_key(row)
    facts = describe_pair(
        InspectConfig(teacher=teacher, student=student, student_args=extra, img_size=size),
        with_cost=False,
    )
    s3, s4, split, final, heads, tau, summed, norm = SETTINGS[key]
    assert facts["pair of the paper"]
    assert (facts["S3"], facts["S4"]) == (s3, s4)
    assert facts["tail input"].startswith(f"{split} channels")
    assert facts["tail output"].startswith(f"{final} channels")
    assert (facts["heads"], facts["tau"], facts["stem norm"]) == (heads, tau, norm)
    weights = facts["summed weights"]
    assert weights["s3_full"] == weights["s4_full"] == pytest.approx(summed[0], abs=1e-3)
    assert weights["s3_ac"] == pytest.approx(summed[1], abs=1e-3)
    swin_s = key[0] == "swin_small"
    assert ("s4_ac" in weights) != swin_s
    assert facts["logit term"] == ("alpha 0, T 1" if swin_s else "alpha 0.5, T 1")
    if key in SIZES:
        assert round(facts["projector parameters"] / 1e6, 1) == SIZES[key]


def test_cost_of_swin_l_to_resnet_50() -> None:
    facts = describe_pair(InspectConfig())
    assert facts["projectors GMAC"] == pytest.approx(13.85, abs=0.01)
    assert facts["tail passes GMAC"] == pytest.approx(2 * 3.02, abs=0.01)
    assert facts["student GMAC"] == pytest.approx(4.1, abs=0.05)
    assert facts["training GMAC per image"] == pytest.approx(100, abs=1)
    assert round(facts["projector s3"] / 2e6, 1) == 17.9
    assert round(facts["projector s4"] / 2e6, 1) == 70.1


def test_rules_stand_in_where_the_paper_has_no_pair() -> None:
    pairs = {
        ("vit_tiny_patch16_224", "resnet18"): ([3, 3], 0.2, (4.1, 2.05)),
        ("vit_tiny_patch16_224", "mixer_s16_224"): ([3, 3], 1, (4.1, 2.05)),
        ("swin_tiny_patch4_window7_224", "efficientnet_b0"): ([6, 12], 5, (3.92, 2.94)),
        ("swin_tiny_patch4_window7_224", "convnext_atto"): ([6, 12], 1, (3.92, 2.94)),
    }
    for (teacher, student), (heads, tau, weights) in pairs.items():
        facts = describe_pair(InspectConfig(teacher=teacher, student=student), with_cost=False)
        assert not facts["pair of the paper"]
        assert (facts["heads"], facts["tau"]) == (heads, tau)
        assert (facts["weights"]["s3_full"], facts["weights"]["s3_ac"]) == weights


def test_the_result_is_plain_json() -> None:
    import json

    facts = inspect(InspectConfig(teacher="vit_tiny_patch16_224", student="resnet18"))
    assert json.loads(json.dumps(facts.to_json()))["student"] == "resnet18"


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"timm has no model resnet51; did you mean resnet5"):
        inspect(InspectConfig(student="resnet51"))


def test_head_counts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"5 heads do not divide the 192 channels of s3; use one of"
    ):
        inspect(InspectConfig(teacher="vit_tiny_patch16_224", student="resnet18", heads=(5, 5)))
