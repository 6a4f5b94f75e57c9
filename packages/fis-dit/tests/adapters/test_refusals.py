"""Bad input: what is refused, how, and what is allowed with a warning. One test per row of the table."""

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from torch import nn

from effml_common.errors import NonFiniteError
from fis_dit.adapters import apply as apply_module
from fis_dit.adapters.apply import apply_fis
from fis_dit.adapters.families.wan import WAN
from fis_dit.adapters.registry import register_adapter
from fis_dit.config import FISConfig

CONFIG = FISConfig(dense_head=1, dense_tail=1)


PLAN = FISConfig(blocks=(1, 2), model_class="WanTransformer3DModel", layers=4, frames=7)


def test_a_stride_beyond_the_clip_runs_and_warns_once(tiny_wan, capsys) -> None:
    with apply_fis(tiny_wan.model, dataclasses.replace(CONFIG, stride=50)) as handle:
        tiny_wan()
        tiny_wan()
        counts = {len(a) for a in handle.summary()["transformer"]["anchors"]}
    assert counts <= {2, 3}
    assert capsys.readouterr().err.count("will be poor") == 1


@pytest.mark.parametrize("frames", [1, 2])
def test_an_image_is_silently_dense_and_the_summary_says_so(tiny_wan, frames, capsys) -> None:
    dense = tiny_wan(frames=frames)
    with apply_fis(tiny_wan.model, CONFIG) as handle:
        assert torch.equal(tiny_wan(frames=frames), dense)
        assert handle.summary()["transformer"]["dense"] is True
    assert capsys.readouterr().err == ""


def test_tokens_that_the_geometry_does_not_explain_are_a_runtime_error(tiny_wan) -> None:
    class Odd(type(tiny_wan.model)):
        pass

    tiny_wan.model.__class__ = Odd
    wrong = dataclasses.replace(WAN, geometry=lambda config, args, kwargs: (5, 2, 2))
    register_adapter(Odd, wrong)
    with (
        apply_fis(tiny_wan.model, CONFIG),
        pytest.raises(RuntimeError, match=r"\(1, 28, 24\).*20 video tokens.*register_adapter"),
    ):
        tiny_wan()


def test_a_probe_that_never_ran_is_a_runtime_error(tiny_wan) -> None:
    class Unprobed(type(tiny_wan.model)):
        pass

    tiny_wan.model.__class__ = Unprobed
    register_adapter(Unprobed, dataclasses.replace(WAN, probe="norm_out"))
    with (
        apply_fis(tiny_wan.model, CONFIG),
        pytest.raises(RuntimeError, match=r"no geometry.*register_adapter"),
    ):
        tiny_wan()


def test_a_rotary_table_of_another_length_is_a_runtime_error(tiny_wan) -> None:
    class Doubled(type(tiny_wan.model)):
        pass

    tiny_wan.model.__class__ = Doubled
    rules = {**WAN.per_token, "temb": dataclasses.replace(WAN.per_token["temb"], ndim=3)}
    register_adapter(Doubled, dataclasses.replace(WAN, per_token=rules))
    with apply_fis(tiny_wan.model, CONFIG), pytest.raises(RuntimeError, match="temb of shape"):
        tiny_wan()


@pytest.mark.parametrize("make", [lambda: nn.Linear(2, 2), lambda: object()])
def test_an_unknown_class_is_a_type_error_that_lists_the_known(make) -> None:
    with pytest.raises(TypeError, match=r"HunyuanVideo15Transformer3DModel.*register_adapter"):
        apply_fis(make(), CONFIG)


def test_a_subclass_is_not_guessed(tiny_wan) -> None:
    class CausalWan(type(tiny_wan.model)):
        pass

    tiny_wan.model.__class__ = CausalWan
    with pytest.raises(TypeError, match="CausalWan"):
        apply_fis(tiny_wan.model, CONFIG)


@pytest.mark.parametrize("block", [4, -1])
def test_a_block_out_of_range_is_a_value_error(tiny_wan, block: int) -> None:
    with pytest.raises(ValueError, match="0 to 3"):
        apply_fis(tiny_wan.model, FISConfig(blocks=(1, block)))
    apply_fis(tiny_wan.model, CONFIG).remove()  # nothing was left behind


def test_a_block_named_twice_counts_once(tiny_wan) -> None:
    with apply_fis(tiny_wan.model, FISConfig(blocks=(2, 1, 2))) as handle:
        assert handle.summary()["transformer"]["sparse_blocks"] == [1, 2]


@pytest.mark.parametrize("config", [FISConfig(blocks=()), FISConfig(dense_head=4)])
def test_no_sparse_block_is_dense_with_a_warning(tiny_wan, config, capsys) -> None:
    dense = tiny_wan()
    with apply_fis(tiny_wan.model, config):
        assert torch.equal(tiny_wan(), dense)
    assert "runs dense" in capsys.readouterr().err


def test_a_plan_of_the_right_model_applies(tiny_wan) -> None:
    with apply_fis(tiny_wan.model, PLAN) as handle:
        tiny_wan()
        assert handle.summary()["transformer"]["sparse_blocks"] == [1, 2]


def test_a_plan_for_another_class_is_a_value_error(tiny) -> None:
    with pytest.raises(ValueError, match="WanTransformer3DModel of 4 blocks, not Mochi"):
        apply_fis(tiny("mochi").model, PLAN)


def test_a_plan_for_another_depth_is_a_value_error_or_is_rescaled(tiny, capsys) -> None:
    family = tiny("wan", depth=8)
    with pytest.raises(ValueError, match="4 blocks"):
        apply_fis(family.model, PLAN)
    with apply_fis(family.model, dataclasses.replace(PLAN, strict=False)) as handle:
        assert handle.summary()["transformer"]["sparse_blocks"] == [3, 5]
        family()
    assert "rescaled" in capsys.readouterr().err


def test_a_plan_for_another_length_is_a_value_error_at_the_first_forward(tiny_wan, capsys) -> None:
    with apply_fis(tiny_wan.model, PLAN), pytest.raises(ValueError, match="7 latent frames"):
        tiny_wan(frames=5)
    with apply_fis(tiny_wan.model, dataclasses.replace(PLAN, strict=False)):
        tiny_wan(frames=5)
        tiny_wan(frames=5)
    assert capsys.readouterr().err.count("7 latent frames") == 1


def test_applying_twice_is_a_runtime_error(tiny_wan) -> None:
    with apply_fis(tiny_wan.model, CONFIG), pytest.raises(RuntimeError, match="already"):
        apply_fis(tiny_wan.model, CONFIG)


def test_a_cache_below_is_a_runtime_error_that_names_hook_and_remedy(tiny_wan) -> None:
    tiny_wan.model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(RuntimeError, match=r"fbc_.*disable_cache"):
        apply_fis(tiny_wan.model, CONFIG)


def test_removal_below_a_cache_is_a_runtime_error_until_it_is_disabled(tiny_wan) -> None:
    dense = tiny_wan()
    handle = apply_fis(tiny_wan.model, CONFIG)
    tiny_wan.model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(RuntimeError, match=r"fbc_.*disable_cache"):
        handle.remove()
    tiny_wan.model.disable_cache()
    handle.remove()
    assert torch.equal(tiny_wan(), dense)


@pytest.mark.parametrize("changes", [{"step_shift": 1}, {"dense_steps": (0,)}])
@pytest.mark.parametrize(
    "cache",
    [
        TaylorSeerCacheConfig(cache_identifiers=[r"blocks\.\d+\.attn\d"]),
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
        ),
    ],
    ids=lambda cache: type(cache).__name__,
)
def test_an_attention_cache_with_changing_anchors_is_a_runtime_error(
    tiny_wan, cache, changes: dict[str, Any]
) -> None:
    with apply_fis(tiny_wan.model, dataclasses.replace(CONFIG, **changes)):
        tiny_wan.model.enable_cache(cache)
        with pytest.raises(RuntimeError, match="attention outputs"):
            tiny_wan()
        tiny_wan.model.disable_cache()


def test_an_attention_cache_with_steady_anchors_runs(tiny_wan) -> None:
    with apply_fis(tiny_wan.model, CONFIG):
        first = tiny_wan()
        tiny_wan.model.enable_cache(
            PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
            )
        )
        assert torch.equal(tiny_wan(), first)
        assert torch.equal(tiny_wan(), first)  # from the cache, with the shape of the anchors
        tiny_wan.model.disable_cache()


class TwoTransformers:
    """What apply_fis reads of a pipeline."""

    def __init__(self, first, second) -> None:
        self.transformer, self.transformer_2 = first, second


def test_settings_for_a_missing_transformer_are_a_value_error(tiny_wan) -> None:
    pipe = TwoTransformers(tiny_wan.model, None)
    with pytest.raises(ValueError, match="there is no transformer_2"):
        apply_fis(pipe, {"transformer": CONFIG, "transformer_2": CONFIG})
    with apply_fis(pipe, CONFIG) as handle:
        assert list(handle.summary()) == ["transformer"]


def test_each_transformer_takes_its_own_settings(tiny) -> None:
    pipe = TwoTransformers(tiny("wan").model, tiny("wan").model)
    settings = {"transformer": CONFIG, "transformer_2": dataclasses.replace(CONFIG, stride=3)}
    with apply_fis(pipe, settings) as handle:
        told = handle.summary()
    assert (told["transformer"]["stride"], told["transformer_2"]["stride"]) == (2, 3)


def test_context_parallelism_is_not_implemented(tiny_wan) -> None:
    class Parallel:
        context_parallel_config = object()

    tiny_wan.model._parallel_config = Parallel()
    with pytest.raises(NotImplementedError, match="context parallel"):
        apply_fis(tiny_wan.model, CONFIG)


def test_plans_are_kept_for_the_last_eight_lengths(tiny_wan) -> None:
    with apply_fis(tiny_wan.model, CONFIG) as handle:
        for frames in range(3, 15):
            tiny_wan(frames=frames)
        plans = handle._attachments[0].geometry._indices
    assert sorted({key[0] for key in plans}) == list(range(7, 15))


@pytest.mark.parametrize("sites", ["block", "attn"])
def test_a_value_that_is_not_finite_is_found_only_in_debug(tiny_wan, sites: str) -> None:
    with torch.no_grad():
        tiny_wan.model.blocks[2].attn1.to_v.bias[0] = float("nan")
    config = dataclasses.replace(CONFIG, sites=sites)
    with apply_fis(tiny_wan.model, config):
        assert tiny_wan().isnan().any()
    with (
        apply_fis(tiny_wan.model, dataclasses.replace(config, debug=True)),
        pytest.raises(NonFiniteError, match="block 2"),
    ):
        tiny_wan()


def test_training_with_gradients_needs_permission(tiny_wan) -> None:
    tiny_wan.model.train()
    inputs = tiny_wan.inputs(1, 7)
    with apply_fis(tiny_wan.model, CONFIG), pytest.raises(RuntimeError, match="allow_grad"):
        tiny_wan.model(**inputs)
    with apply_fis(tiny_wan.model, dataclasses.replace(CONFIG, allow_grad=True)):
        tiny_wan.model(**inputs, return_dict=False)[0].sum().backward()
    assert tiny_wan.model.blocks[1].attn1.to_q.weight.grad.abs().sum() > 0


def test_steps_counted_from_the_end_need_their_number(tiny_wan) -> None:
    config = dataclasses.replace(CONFIG, dense_steps=(-1,))
    with apply_fis(tiny_wan.model, config), pytest.raises(ValueError, match="num_inference_steps"):
        tiny_wan()
    dense = tiny_wan()
    with apply_fis(tiny_wan.model, dataclasses.replace(config, num_inference_steps=2)):
        equal = [torch.equal(tiny_wan(), dense) for _ in range(4)]
    assert equal == [False, True, False, True]


@pytest.mark.parametrize("field", ["kv", "drop_text_padding"])
def test_what_one_family_has_is_refused_for_others(tiny, field: str) -> None:
    changes = {"kv": "full"} if field == "kv" else {"drop_text_padding": True}
    with pytest.raises(ValueError, match="not LTXVideo"):
        apply_fis(tiny("ltx").model, FISConfig(**changes))


@pytest.mark.parametrize("version", ["0.41.0", "0.44.0", "1.0.0"])
def test_an_untested_diffusers_is_refused(tiny_wan, monkeypatch, version: str) -> None:
    monkeypatch.setattr(apply_module.importlib.metadata, "version", lambda name: version)
    with pytest.raises(RuntimeError, match=version):
        apply_fis(tiny_wan.model, CONFIG)


def test_a_failed_second_transformer_leaves_the_first_untouched(tiny) -> None:
    pipe = TwoTransformers(tiny("wan").model, nn.Linear(2, 2))
    with pytest.raises(TypeError):
        apply_fis(pipe, CONFIG)
    with warnings.catch_warnings():
        assert not hasattr(pipe.transformer, "_fis_attached")
        assert not hasattr(pipe.transformer.patch_embedding, "_diffusers_hook")
