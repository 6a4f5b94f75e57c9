"""Recipes: their members, epochs and costs, and that each member can be grown from the one before."""

import json
from functools import cache
from itertools import pairwise

import pytest
import torch
from com_pt_tiny import clip, features

from com_pt.adapters.grow import grow, state_of
from com_pt.adapters.layouts import layout_of
from com_pt.adapters.open_clip_models import build_clip, clip_config
from com_pt.cli import COMMANDS
from com_pt.errors import ChainOrderError
from com_pt.method.copying import copy_leading_entries
from com_pt.method.growth import check_models
from com_pt.method.matching import match_parameters
from com_pt.method_config import GrowthSettings
from com_pt.training.chain import RECIPES, load_chain
from com_pt.training.plan import check_order, plan_chain
from effml_common.cli import main

# What each recipe trains, and for how many epochs.
EPOCHS = {
    "cc3m-vit-2": {"B": 128, "L": 15},
    "cc3m-vit-3": {"S": 128, "B": 24, "L": 15},
    "cc3m-vit-tsbl": {"T": 128, "S": 24, "B": 16, "L": 15},
    "cc3m-vit-7": {"T": 128, "C": 24, "S": 22, "M": 20, "B": 19, "BL": 17, "L": 15},
    "merged15m-vit-smbl": {"S": 64, "M": 22, "B": 20, "L": 6},
    "cc3m-swin-tsbl": {"T": 128, "S": 22, "B": 16, "L": 10},
}
# Forward GMAC of an image with seven captions, from the table of the method's notes.
GMAC = {"T": 6.60, "C": 10.40, "S": 16.43, "M": 24.02, "B": 38.42, "BL": 77.40, "L": 108.10}
PUBLISHED = {"cc3m-vit-3": 4.13, "cc3m-vit-tsbl": 5.68, "cc3m-vit-7": 7.09}


@cache
def model_without_values(spec: str) -> torch.nn.Module:
    with torch.device("meta"):
        return build_clip(clip_config(spec))


def grow_shapes(small: torch.nn.Module, large: torch.nn.Module) -> float:
    """Grow one model without values from another; return the inherited share of its numbers."""
    source, target = layout_of(small), layout_of(large)
    check_models(source, target)
    weights, fresh = state_of(small), state_of(large)
    matching = match_parameters(weights, fresh, source, target, GrowthSettings())
    inherited = 0
    for name, match in matching.parameters.items():
        assert match is not None, name
        grown = copy_leading_entries(weights[match.origin], fresh[name], match.rule)
        assert grown.shape == fresh[name].shape
        inherited += weights[match.origin].numel()
    return inherited / sum(value.numel() for value in fresh.values())


@pytest.mark.parametrize("recipe", EPOCHS)
def test_a_recipe_has_its_members_and_epochs_and_each_is_grown_from_the_one_before(recipe) -> None:
    chain = load_chain(recipe)
    epochs = {stage.name: chain.epochs_of(i) for i, stage in enumerate(chain.stages)}
    assert epochs == EPOCHS[recipe]
    assert chain.individual_epochs == next(iter(epochs.values()))
    assert chain.data["captions"] == 7
    assert chain.data["sentences"] is True
    assert [stage.warmup_steps for stage in chain.stages] == [8000] + [1000] * (len(epochs) - 1)

    models = [model_without_values(stage.model) for stage in chain.stages]
    check_order([*epochs], [sum(p.numel() for p in model.parameters()) for model in models])
    for small, large in pairwise(models):
        assert 0.2 < grow_shapes(small, large) <= 1


def test_every_recipe_is_listed_here() -> None:
    assert {file.stem for file in RECIPES.glob("*.yaml")} == set(EPOCHS)


@pytest.mark.parametrize("recipe", [name for name in EPOCHS if "swin" not in name])
def test_the_ratio_of_a_recipe_equals_the_sum_by_hand(recipe) -> None:
    members = EPOCHS[recipe]
    names, alone = [*members], next(iter(members.values()))
    chain = 3 * GMAC[names[0]] * alone
    for before, name in pairwise(names):
        chain += (3 * GMAC[name] + GMAC[before]) * members[name]
    individual = sum(3 * GMAC[name] * alone for name in names)
    assert plan_chain(load_chain(recipe)).ratio == pytest.approx(individual / chain, rel=5e-4)


def test_a_swin_costs_what_is_published_of_its_image_tower_and_seven_captions() -> None:
    image = (4.5, 8.7, 15.4, 34.5)  # GMAC as the authors of Swin state them
    caption = (1.690, 2.980, 2.980, 6.650)  # those of ViT-S, B and L
    stages = plan_chain(load_chain("cc3m-swin-tsbl")).stages
    for stage, picture, text in zip(stages, image, caption, strict=True):
        assert stage.forward / 1e9 == pytest.approx(picture + 7 * text, abs=0.1)


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_plan_prints_the_published_ratio_beside_its_own_and_how_it_counts(recipe, capsys) -> None:
    ratio = {"cc3m-vit-3": 4.20, "cc3m-vit-tsbl": 5.70, "cc3m-vit-7": 5.46}[recipe]
    assert main("com-pt", "com-pt", COMMANDS, ["plan", recipe]) == 0
    text = " ".join(capsys.readouterr().out.split())
    members = len(EPOCHS[recipe])
    assert (
        f"published: {PUBLISHED[recipe]:.2f}x for {members} members (the paper's abstract); "
        f"here {ratio:.2f}x, counted as 3 forward passes of the member" in text
    )
    assert text.endswith("a forward pass is 1 image and 7 captions")


def test_the_ratios_are_in_the_json_and_none_is_claimed_where_none_is_published(capsys) -> None:
    assert main("com-pt", "com-pt", COMMANDS, ["plan", "cc3m-vit-tsbl", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["published_ratio"] == 5.68
    assert document["ratio"] == pytest.approx(5.70, abs=0.005)
    assert "1 of its predecessor; a forward pass is 1 image and 7 cap" in document["accounting"]

    assert main("com-pt", "com-pt", COMMANDS, ["plan", "merged15m-vit-smbl"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "published" not in text
    assert "counted as 3 forward passes" in text


def test_swins_keep_their_heads_of_32_channels_along_the_chain() -> None:
    sizes = []
    for stage in load_chain("cc3m-swin-tsbl").stages:
        model = model_without_values(stage.model)
        tower, text = (layout_of(model).towers[name] for name in ("image", "text"))
        depths = tuple(len(layer.blocks) for layer in model.visual.trunk.layers)
        sizes.append((tower.width, depths, text.width))
        assert (tower.head_dim, text.head_dim) == (32, 64)
        assert model.visual.head.proj.out_features == 512
    assert sizes == [
        (96, (2, 2, 6, 2), 384),
        (96, (2, 2, 18, 2), 512),
        (128, (2, 2, 18, 2), 512),
        (192, (2, 2, 18, 2), 768),
    ]


def test_swin_and_vit_recipes_have_the_optimizer_of_the_released_code() -> None:
    for name in EPOCHS:
        chain = load_chain(name)
        usual = ((0.9, 0.999), 1e-8) if "swin" in name else ((0.9, 0.98), 1e-6)
        assert (chain.betas, chain.eps) == usual


def test_the_released_bl_cannot_be_followed_by_l_and_the_other_can() -> None:
    base, released, narrow, largest = (
        model_without_values(f"compt-ViT-{name}") for name in ("B-16", "BL-16", "BL-16-512", "L-16")
    )
    assert released.visual.proj.shape == (1024, 768)
    assert 0.2 < grow_shapes(base, released) < 1
    with pytest.raises(ChainOrderError, match="EMBED axis shrinks from 768 to 512"):
        grow_shapes(released, largest)
    assert grow_shapes(narrow, largest) == 1  # of equal widths, and half as deep


def test_small_copies_of_the_seven_members_are_grown_one_after_the_other() -> None:
    """Image towers of C, M and BL have widths that are no multiples of those before them."""
    widths = {"T": (48, 64), "C": (64, 80), "S": (96, 96), "M": (128, 112), "B": (192, 128),
              "BL": (256, 192), "L": (256, 192)}  # fmt: skip
    members = {n: clip(w, 4 if n == "L" else 2, text=t) for n, (w, t) in widths.items()}
    names = [*members]
    for before, name in pairwise(names):
        report = grow(members[before], members[name])
        assert not report.fresh
        assert not report.skipped
    for name in names:
        assert all(value.isfinite().all() for value in features(members[name]).values())
    packed = members["C"].visual.transformer.resblocks[0].attn.in_proj_weight
    ours = members["L"].visual.transformer.resblocks[1].attn.in_proj_weight
    for block in range(3):  # Q, K and V of C are still in their places, five members later
        assert torch.equal(ours[256 * block :][:64, :64], packed[64 * block :][:64])
