"""The optimizer of a stage."""

from pathlib import Path

import pytest
import torch
from com_pt_tiny import clip, llama, spec_with_swin, swin, task_of, vit
from torch import nn

from com_pt.adapters.open_clip_models import build_clip
from com_pt.training.optimizer import parameter_groups, with_own_settings
from com_pt.training.stage_model import StageModel


def clip_with_swin() -> torch.nn.Module:
    with torch.device("meta"):
        return build_clip(spec_with_swin())


MODELS = {"CLIP": lambda: clip(32, ls_init_value=0.1), "CLIP with a text module":
          lambda: clip(32, custom=True), "CLIP with Swin": clip_with_swin, "Swin": swin,
          "ViT": vit, "Llama": lambda: llama(32, attention_bias=True)}  # fmt: skip


def names_by_decay(model: torch.nn.Module) -> dict[float, set[str]]:
    names = {id(value): name for name, value in model.named_parameters()}
    groups = parameter_groups(StageModel(task_of(Path()), model, None), 0.1)
    return {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in groups}


@pytest.mark.parametrize("name", MODELS)
def test_the_groups_are_those_of_open_clip_and_of_the_released_code(name) -> None:
    model = MODELS[name]()
    spared = {
        n
        for n, p in model.named_parameters()
        if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n
    }
    decayed = {n for n, _ in model.named_parameters()} - spared
    assert names_by_decay(model) == {0.0: spared, 0.1: decayed}
    assert min(len(spared), len(decayed)) > 5


def test_positions_and_token_tables_decay_and_scales_and_tables_of_biases_do_not() -> None:
    groups = names_by_decay(clip(32))
    assert {"positional_embedding", "visual.positional_embedding", "token_embedding.weight",
            "visual.proj", "visual.conv1.weight"} <= groups[0.1]  # fmt: skip
    assert {"logit_scale", "visual.class_embedding", "ln_final.weight"} <= groups[0.0]
    assert {"pos_embed", "cls_token"} <= names_by_decay(vit())[0.1]
    assert "layers.0.blocks.0.attn.relative_position_bias_table" in names_by_decay(swin())[0.0]
    assert "model.embed_tokens.weight" in names_by_decay(llama())[0.1]


def test_a_scale_decays_in_no_shape_and_frozen_parameters_are_in_no_group() -> None:
    model = clip(32)
    model.logit_scale = torch.nn.Parameter(torch.ones(1, 1))
    model.visual.proj.requires_grad_(False)
    groups = names_by_decay(model)
    assert "logit_scale" in groups[0.0]
    assert "visual.proj" not in groups[0.0] | groups[0.1]


def test_a_resumed_run_has_the_settings_that_it_was_given_and_the_moments_that_were_saved() -> None:
    layer = nn.Linear(4, 4)
    optimizers = [
        torch.optim.AdamW(parameter_groups(layer, decay), betas=(0.9, beta))
        for decay, beta in ((0.1, 0.95), (0.3, 0.98))
    ]
    layer(torch.ones(1, 4)).sum().backward()
    saved, resumed = optimizers
    saved.step()
    resumed.load_state_dict(with_own_settings(saved.state_dict(), resumed))
    assert [group["weight_decay"] for group in resumed.param_groups] == [0.3, 0.0]
    assert {group["betas"] for group in resumed.param_groups} == {(0.9, 0.98)}
    for parameter, moments in saved.state.items():
        assert torch.equal(resumed.state[parameter]["exp_avg"], moments["exp_avg"])
