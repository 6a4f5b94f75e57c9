"""What must hold for every supported transformer, each a tiny random model of the real class."""

import contextlib
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import HookRegistry, ModelHook, apply_group_offloading
from torch import Tensor, nn

from fis_dit.adapters.apply import apply_fis, remove_fis
from fis_dit.adapters.registry import find_adapter
from fis_dit.config import FISConfig
from fis_dit.errors import HookStateError
from fis_dit.method.anchors import choose_anchors

FRAMES, TOKENS = 7, 4
CONFIG = FISConfig(dense_head=1, dense_tail=1)
# Mochi asks for float32 autocast, which the CPU lacks.
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")


def blocks(family) -> nn.ModuleList:
    return getattr(family.model, find_adapter(family.model).blocks)


def traces(model: nn.Module) -> list[str]:
    """Whatever a hook leaves on any module."""
    marks = ("forward", "_diffusers_hook", "_fis_attached")
    return [f"{n}.{m}" for n, part in model.named_modules() for m in marks if m in vars(part)]


def captured(family, number: int) -> dict[str, Any]:
    """The named arguments with which a forward calls one block."""
    adapter, seen = find_adapter(family.model), {}

    def keep(_module, args, kwargs) -> None:
        seen.update(dict(zip(adapter.block_arguments, args, strict=False)), **kwargs)

    hook = blocks(family)[number].register_forward_pre_hook(keep, with_kwargs=True)
    family()
    hook.remove()
    return seen


def picked(value: Any, dim: int, rows: list[int]) -> Any:
    if isinstance(value, tuple):
        return tuple(picked(item, dim, rows) for item in value)
    return value.index_select(dim, torch.tensor(rows))


class TestEveryAdapter:
    def test_stride_one_changes_nothing_and_hooks_nothing(self, family) -> None:
        dense = family()
        with apply_fis(family.model, FISConfig(stride=1)):
            assert torch.equal(family(), dense)
            assert traces(family.model) == ["._fis_attached"]

    @pytest.mark.parametrize("sites", ["block", "attn"])
    def test_removal_restores_every_bit_and_leaves_no_hook(self, family, sites: str) -> None:
        dense = family()
        handle = apply_fis(family.model, FISConfig(dense_head=1, dense_tail=1, sites=sites))
        assert not torch.equal(family(), dense)
        handle.remove()
        handle.remove()
        assert torch.equal(family(), dense)
        assert traces(family.model) == []

    def test_geometry_and_anchors_are_those_of_the_video(self, family) -> None:
        with apply_fis(family.model, CONFIG) as handle:
            family()
            told = handle.summary()["transformer"]
        assert (told["frames"], told["tokens_per_frame"]) == (FRAMES, TOKENS)
        assert told["anchors"] == [list(choose_anchors(FRAMES, 2, r)) for r in (0, 1)]
        assert told["sparse_blocks"] == [1, 2]

    def test_a_sparse_block_is_the_block_on_the_anchors_lifted_by_hand(self, family) -> None:
        arguments, block = captured(family, 1), blocks(family)[1]
        kept = [0, 2, 4, 6]
        rows = [f * TOKENS + p for f in kept for p in range(TOKENS)]
        small = {**arguments, "hidden_states": picked(arguments["hidden_states"], 1, rows)}
        for name, rule in find_adapter(family.model).per_token.items():
            value = small[name]
            if rule.ndim is None or (value.ndim == rule.ndim and value.shape[rule.dim] > 1):
                small[name] = picked(value, rule.dim, rows)
        with torch.no_grad():
            own = block(**small)
            with apply_fis(family.model, CONFIG):
                family()
                got = block(**arguments)
        text = isinstance(own, tuple)
        if text:
            torch.testing.assert_close(got[1], own[1])
        y, out = (own[0], got[0]) if text else (own, got)
        h = arguments["hidden_states"].unflatten(1, (FRAMES, TOKENS))
        y, out = y.unflatten(1, (4, TOKENS)), out.unflatten(1, (FRAMES, TOKENS))
        for f in range(FRAMES):
            a, b = f // 2, (f + 1) // 2  # odd frames lie half-way between two anchors
            change = ((y[:, a] - h[:, kept[a]]) + (y[:, b] - h[:, kept[b]])) / 2
            torch.testing.assert_close(out[:, f], h[:, f] + change, rtol=1e-4, atol=1e-5)

    def test_permuting_tokens_within_frames_permutes_the_output(self, family) -> None:
        arguments, block = captured(family, 1), blocks(family)[1]
        rows = [f * TOKENS + p for f in range(FRAMES) for p in (2, 0, 3, 1)]
        moved = {**arguments, "hidden_states": picked(arguments["hidden_states"], 1, rows)}
        for name, rule in find_adapter(family.model).per_token.items():
            value = moved[name]
            if rule.ndim is None or (value.ndim == rule.ndim and value.shape[rule.dim] > 1):
                moved[name] = picked(value, rule.dim, rows)
        with torch.no_grad(), apply_fis(family.model, CONFIG):
            family()
            plain, other = (
                out[0] if isinstance(out, tuple) else out
                for out in (block(**arguments), block(**moved))
            )
        torch.testing.assert_close(picked(plain, 1, rows), other, rtol=1e-4, atol=1e-5)

    def test_a_guidance_batch_equals_two_single_runs(self, family) -> None:
        both = family.inputs(2, FRAMES)

        def one(i: int) -> dict[str, Any]:
            tensors = {k: v for k, v in both.items() if isinstance(v, Tensor) and v.shape[0] == 2}
            return {**both, **{k: v[i : i + 1] for k, v in tensors.items()}}

        with apply_fis(family.model, CONFIG), torch.no_grad():
            together = family.model(**both, return_dict=False)[0]
            single = [family.model(**one(i), return_dict=False)[0] for i in (0, 1)]
        assert not torch.equal(*single)
        torch.testing.assert_close(together, torch.cat(single), rtol=1e-4, atol=1e-5)

    def test_two_frames_run_dense_and_the_summary_says_so(self, family) -> None:
        dense = family(frames=2)
        with apply_fis(family.model, CONFIG) as handle:
            assert torch.equal(family(frames=2), dense)
            assert handle.summary()["transformer"]["dense"] is True

    def test_another_clip_length_gets_its_own_anchors(self, family) -> None:
        with apply_fis(family.model, CONFIG) as handle:
            family()
            family(frames=5)
            assert handle.summary()["transformer"]["anchors"] == [[0, 2, 4], [0, 1, 3, 4]]

    def test_the_step_rotates_anchors_per_cache_context_until_reset(self, family) -> None:
        config = FISConfig(dense_head=1, dense_tail=1, stride=3, step_shift=1)
        seen = []
        with apply_fis(family.model, config) as handle:
            for _ in range(2):
                for name in ("cond", "uncond"):
                    with family.model.cache_context(name):
                        family()
                    told = handle.summary()["transformer"]
                    seen.append((told["last_step"], told["anchors"][0]))
            first, second = list(choose_anchors(7, 3, 0)), list(choose_anchors(7, 3, 1))
            assert seen == [(0, first), (0, first), (1, second), (1, second)]
            family.model._reset_stateful_cache()  # as pipelines do after every call
            with family.model.cache_context("cond"):
                family()
            assert handle.summary()["transformer"]["last_step"] == 0

    def test_a_step_index_from_the_pipeline_wins_and_dense_steps_are_dense(self, family) -> None:
        dense = family()
        config = FISConfig(dense_head=1, dense_tail=1, dense_steps=(0, -1))
        with apply_fis(family.model, config):
            for step in range(4):
                with family.model.cache_context("c", step_index=step, num_inference_steps=4):
                    assert torch.equal(family(), dense) == (step in (0, 3))

    @pytest.mark.slow
    @pytest.mark.parametrize("equalize", [False, pytest.param(True, marks=pytest.mark.slow)])
    def test_compiled_blocks_need_one_graph_per_number_of_anchors(
        self, family, equalize: bool
    ) -> None:
        graphs: list[int] = []

        def count(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
            graphs.append(len(graph.graph.nodes))
            return graph.forward

        torch._dynamo.reset()
        expected = []
        config = FISConfig(dense_head=1, dense_tail=1, equalize=equalize)
        with apply_fis(family.model, config):
            expected = family()
            for block in list(blocks(family))[:-1]:  # Mochi's last block is of another kind
                block.compile(backend=count, fullgraph=True, dynamic=False)
            torch.testing.assert_close(family(), expected, rtol=1e-4, atol=1e-5)
            family()
        for block in blocks(family):
            block._compiled_call_impl = None
        torch._dynamo.reset()
        # One dense, one per number of anchors. Wan VACE and HunyuanVideo hand their first blocks a
        # transposed tensor, and a sparse block a contiguous one, which costs one more.
        assert len(graphs) in ((2, 3) if equalize else (3,))

    def test_group_offloading_works_before_and_after(self, family) -> None:
        with apply_fis(family.model, CONFIG):
            plain = family()
            cpu = torch.device("cpu")
            apply_group_offloading(
                family.model, cpu, cpu, offload_type="block_level", num_blocks_per_group=1
            )
            torch.testing.assert_close(family(), plain)
        with apply_fis(family.model, CONFIG):
            torch.testing.assert_close(family(), plain)

    def test_model_offloading_keeps_the_hooks(self, family) -> None:
        accelerate = pytest.importorskip("accelerate")
        with apply_fis(family.model, CONFIG):
            plain = family()
            for _ in range(2):  # a pipeline takes the hook off and puts it on after every call
                _, hook = accelerate.cpu_offload_with_hook(family.model, "cpu")
                torch.testing.assert_close(family(), plain)
                hook.remove()
            torch.testing.assert_close(family(), plain)

    def test_a_lora_counts_whether_it_comes_before_or_after(self, family) -> None:
        name = "to_q"
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(r=2, target_modules=[name], init_lora_weights=False)
        with apply_fis(family.model, CONFIG):
            without = family()
            torch.manual_seed(0)
            family.model.add_adapter(lora)
            after = family()
        assert not torch.allclose(without, after)
        with apply_fis(family.model, CONFIG):
            torch.testing.assert_close(family(), after)
        family.model.disable_adapters()
        with apply_fis(family.model, CONFIG):
            torch.testing.assert_close(family(), without)

    def test_a_second_application_is_refused_until_removed(self, family) -> None:
        apply_fis(family.model, CONFIG)
        with pytest.raises(HookStateError, match="already"):
            apply_fis(family.model, CONFIG)
        remove_fis(family.model)
        apply_fis(family.model, CONFIG).remove()

    def test_a_hook_that_replaces_the_forward_is_refused_inside_and_outside(self, family) -> None:
        class Replacing(ModelHook):
            def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                return self.fn_ref.original_forward(*args, **kwargs)

        block = blocks(family)[1]
        registry = HookRegistry.check_if_exists_or_initialize(block)
        registry.register_hook(Replacing(), "other")
        with pytest.raises(RuntimeError, match="other"):
            apply_fis(family.model, CONFIG)
        registry.remove_hook("other")
        dense = family()
        handle = apply_fis(family.model, CONFIG)
        HookRegistry.check_if_exists_or_initialize(block).register_hook(Replacing(), "other")
        with pytest.raises(RuntimeError, match="other"):
            handle.remove()
        assert not torch.equal(family(), dense)  # nothing was removed
        block._diffusers_hook.remove_hook("other")
        handle.remove()
        assert torch.equal(family(), dense)


@pytest.mark.slow
def test_deeper_models_need_no_more_graphs(tiny) -> None:
    family, graphs = tiny("wan", depth=8), 0

    def count(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    with apply_fis(family.model, CONFIG):
        family.model.compile_repeated_blocks(backend=count, fullgraph=True, dynamic=False)
        family()
    torch._dynamo.reset()
    assert graphs == 3


def test_first_block_cache_over_fis_at_threshold_zero_is_fis_alone(tiny_wan) -> None:
    with apply_fis(tiny_wan.model, CONFIG):
        plain = tiny_wan()
        tiny_wan.model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
        with tiny_wan.model.cache_context("cond"):
            assert torch.equal(tiny_wan(), plain)
        tiny_wan.model.disable_cache()
        assert torch.equal(tiny_wan(), plain)


def test_full_keys_give_every_anchor_query_its_dense_attention(tiny_wan) -> None:
    outputs: list[Tensor] = []
    attention = tiny_wan.model.blocks[1].attn1

    def run(context) -> Tensor:
        hook = attention.register_forward_hook(lambda _m, _a, out: outputs.append(out))
        with context:
            tiny_wan()
        hook.remove()
        return outputs.pop()

    dense = run(contextlib.nullcontext())
    config = FISConfig(dense_head=1, dense_tail=1, sites="attn", kv="full")
    sparse = run(apply_fis(tiny_wan.model, config))
    rows = [f * TOKENS + p for f in (0, 2, 4, 6) for p in range(TOKENS)]
    torch.testing.assert_close(sparse[:, rows], dense[:, rows], rtol=1e-5, atol=1e-5)
    assert type(attention.processor).__name__ == "WanAttnProcessor"


@pytest.mark.parametrize("name", ["wan", "wan-per-token"])
def test_full_keys_of_a_whole_block_agree_with_a_block_run_on_all_frames(tiny, name: str) -> None:
    # With anchors' own hidden states unchanged, the block's output at anchors is the dense one.
    family = tiny(name)
    arguments = captured(family, 1)
    with torch.no_grad():
        dense = family.model.blocks[1](**arguments)
        with apply_fis(family.model, FISConfig(dense_head=1, dense_tail=1, kv="full")):
            family()
            got = family.model.blocks[1](**arguments)
    rows = [f * TOKENS + p for f in (0, 2, 4, 6) for p in range(TOKENS)]
    torch.testing.assert_close(got[:, rows], dense[:, rows], rtol=1e-5, atol=1e-5)


def test_fused_projections_and_full_keys_agree_with_separate_ones(tiny_wan) -> None:
    config = FISConfig(dense_head=1, dense_tail=1, kv="full")
    with apply_fis(tiny_wan.model, config):
        separate = tiny_wan()
    for block in tiny_wan.model.blocks:
        block.attn1.fuse_projections()
    with apply_fis(tiny_wan.model, config):
        torch.testing.assert_close(tiny_wan(), separate, rtol=1e-4, atol=1e-5)


def test_trimming_padded_text_is_exact_and_leaves_no_processor(tiny) -> None:
    family = tiny("hunyuan-1.5")
    dense = family()
    with apply_fis(family.model, FISConfig(stride=1, drop_text_padding=True)):
        torch.testing.assert_close(family(), dense, rtol=1e-5, atol=1e-5)
        with pytest.raises(HookStateError, match="batch 1"):
            family(batch=2)
    with apply_fis(family.model, CONFIG):
        masked = family()
    config = FISConfig(dense_head=1, dense_tail=1, drop_text_padding=True)
    with apply_fis(family.model, config):
        torch.testing.assert_close(family(), masked, rtol=1e-5, atol=1e-5)
    assert torch.equal(family(), dense)


def test_an_adapter_of_ones_own_serves_a_new_class(tiny_wan) -> None:
    from fis_dit.adapters.families.wan import WAN
    from fis_dit.adapters.registry import register_adapter

    class OwnTransformer(type(tiny_wan.model)):
        pass

    tiny_wan.model.__class__ = OwnTransformer
    with pytest.raises(TypeError, match="WanTransformer3DModel"):
        apply_fis(tiny_wan.model, CONFIG)
    register_adapter(OwnTransformer, WAN)
    dense = tiny_wan()
    with apply_fis(tiny_wan.model, CONFIG):
        assert not torch.equal(tiny_wan(), dense)
