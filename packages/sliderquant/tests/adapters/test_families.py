"""Every family against its own transformers model: replay, equivalences, rounding."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from sliderquant.adapters.decoder import TransformersDecoder, UnsupportedArchitectureError
from sliderquant.adapters.rounding import ActivationRounding
from sliderquant.method.activations import ActivationFormat
from sliderquant.method.decoder import run_blocks
from sliderquant.method.layout import scale_channels
from sliderquant.method.rotation import random_rotation, rotate_block, rotate_rows


class Float64(TorchFunctionMode):
    """Runs the host's explicit float32 islands (norms, softmax, router) in float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            return args[0].double()
        if func is torch.Tensor.to or "dtype" in kwargs:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def logits64(decoder: TransformersDecoder, tokens, blocks=None, outside=None) -> torch.Tensor:
    """Logits in float64, with parameters of blocks and of the rest replaced."""
    if decoder.model.config._experts_implementation is not None:  # the default takes no float64
        decoder.model.config._experts_implementation = "eager"
    with Float64():
        if outside is not None:
            decoder.source.outside = lambda head=True: outside
        hidden = decoder.block_inputs(tokens)
        for block in range(decoder.depth):
            hidden = decoder.run_block(block, hidden, blocks[block] if blocks else None)
        return decoder.logits(hidden)


def test_replayed_blocks_give_the_models_logits_bit_for_bit(family, tiny, tokens) -> None:
    model = tiny(family)
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
    decoder = TransformersDecoder(model)
    hidden = run_blocks(decoder, range(decoder.depth), decoder.block_inputs(tokens), len(tokens))
    assert torch.equal(decoder.logits(hidden), expected)
    with torch.no_grad():  # and leaves the model as it was
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, expected)


def test_channel_scaling_leaves_float64_logits_unchanged(family, tiny, tokens) -> None:
    decoder = TransformersDecoder(tiny(family).double())
    before = logits64(decoder, tokens)
    generator = torch.Generator().manual_seed(3)
    blocks = []
    for block in range(decoder.depth):
        sites = decoder.layout(block).sites
        # Of both signs and of widely different sizes: any missed partner shows.
        factors = [
            torch.exp(torch.randn(site.size, generator=generator, dtype=torch.float64))
            * (torch.randint(0, 2, (site.size,), generator=generator) * 2 - 1)
            for site in sites
        ]
        tensors = decoder.tensors(block)
        changed = scale_channels(tensors, sites, factors)
        for touched in changed:
            assert not torch.allclose(changed[touched], tensors[touched]), touched
        blocks.append(tensors | changed)
    assert (logits64(decoder, tokens, blocks) - before).abs().max() < 1e-9 * before.abs().max()


def test_every_family_scales_at_five_sites_but_not_inside_experts(family, tiny, tokens) -> None:
    layout = TransformersDecoder(tiny(family)).layout(0)
    inside = [] if family in ("qwen3_moe", "mixtral") else ["up -> down"]
    expected = ["norm -> qkv", "norm -> mlp", "v -> o", *inside, "q <-> k"]
    assert [site.name for site in layout.sites] == expected


def test_rotations_leave_float64_logits_unchanged(family, tiny, tokens) -> None:
    decoder = TransformersDecoder(tiny(family).double())
    layout = decoder.layout(0)
    before = logits64(decoder, tokens)
    generator = torch.Generator().manual_seed(3)
    outside = decoder.source.outside()
    r1 = None if layout.output_norms else random_rotation(32, generator)
    r2 = random_rotation(layout.head_dim, generator)
    blocks = [rotate_block(decoder.tensors(b), layout, r1, r2) for b in range(decoder.depth)]
    if r1 is not None:
        embedding, norm, head = (
            outside[name]
            for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
        )
        outside = outside | {
            "model.embed_tokens.weight": rotate_rows(embedding, r1),
            "model.norm.weight": torch.ones_like(norm),
            "lm_head.weight": rotate_rows(head, r1, norm),
        }
    after = logits64(decoder, tokens, blocks, outside)
    assert (after - before).abs().max() < 1e-9 * before.abs().max()
    assert not torch.allclose(blocks[0][layout.outputs[0]], decoder.tensors(0)[layout.outputs[0]])


@pytest.mark.parametrize("attention", [False, True])
def test_rounded_blocks_equal_the_whole_model_with_rounding(
    family, tiny, tokens, attention
) -> None:
    model = tiny(family)
    fmt = ActivationFormat(bits=4, sym=False, attention=attention)
    decoder = TransformersDecoder(model)
    with torch.no_grad():
        plain = model(input_ids=tokens, use_cache=False).logits
        with ActivationRounding(model.model.layers, model.config, fmt):
            whole = model(input_ids=tokens, use_cache=False).logits
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, plain)
    hidden = decoder.block_inputs(tokens)
    for block in range(decoder.depth):
        hidden = decoder.run_block(block, hidden, activations=fmt)
    torch.testing.assert_close(decoder.logits(hidden), whole, rtol=0, atol=1e-5)
    assert not torch.allclose(whole, plain, atol=1e-2)


def test_sixteen_bit_rounding_inside_attention_keeps_the_causal_mask(family, tiny, tokens) -> None:
    """At many bits nothing is left to round: what remains are the masks and the experts' order."""
    model = tiny(family)
    fmt = ActivationFormat(bits=16, sym=False, attention=True)
    with torch.no_grad():
        plain = model(input_ids=tokens, use_cache=False).logits
        with ActivationRounding(model.model.layers, model.config, fmt):
            rounded = model(input_ids=tokens, use_cache=False).logits
    assert (rounded - plain).abs().max() < 1e-2 * plain.abs().max()


def test_unknown_architecture_says_what_an_entry_needs() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=32, n_positions=8))
    with pytest.raises(UnsupportedArchitectureError, match=r"'gpt2' is not supported.*families.py"):
        TransformersDecoder(model)


@torch.no_grad()
def test_a_block_goes_on_from_its_attention_and_from_its_mlp(family, tiny) -> None:
    decoder = TransformersDecoder(tiny(family))
    hidden = decoder.block_inputs(torch.arange(24).view(2, 12))
    tensors, layout = decoder.tensors(0), decoder.layout(0)
    expected = decoder.run_block(0, hidden, tensors)

    # From what the output projection reads.
    projection = layout.outputs[0].removesuffix(".weight")
    norm = list(layout.readers)[1].removesuffix(".weight")
    seen = decoder.inputs_inside(0, hidden, tensors, [projection, norm])
    bias = tensors.get(f"{projection}.bias")
    attention = torch.nn.functional.linear(seen[projection], tensors[layout.outputs[0]], bias)
    result = decoder.inputs_inside(0, hidden, tensors, [""], attention=attention)[""]
    torch.testing.assert_close(result, expected)

    # From the residual stream in front of the MLP.
    nothing = torch.zeros_like(hidden)
    result = decoder.inputs_inside(0, seen[norm], tensors, [""], attention=nothing)[""]
    torch.testing.assert_close(result, expected)

    # The block itself is as it was.
    assert torch.equal(decoder.run_block(0, hidden, tensors), expected)
