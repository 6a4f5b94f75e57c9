"""Hot paths of sliderquant: rounding a block of Llama-3-8B both ways, measuring a model, decoding.

    python -m benchmarks.sliderquant.cuda --predict
    python -m benchmarks.sliderquant.cuda --out runs/cuda

Settings are the defaults of ``sliderquant quantize``: 4 bits in groups of 128, samples of 2,048 tokens.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.hot_path_timing import main
from benchmarks.hot_paths import HotPath, Kit, Step
from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.simulation import model_logits
from sliderquant.config import SliderConfig
from sliderquant.method import pieces, window_training
from sliderquant.method.block_rounding import round_block_, samples_per_forward
from sliderquant.method.learnables import BlockLearnables
from sliderquant.method.metrics import perplexity
from sliderquant.method.moments import split_samples
from sliderquant.method.packed import PackedLinear
from sliderquant.method.precision import stream_dtype
from sliderquant.method.quantizer import QuantizedWeight, WeightFormat
from sliderquant.method.sampling import seeded
from sliderquant.method.task import CalibrationTask, Listeners
from sliderquant.method.window_training import (
    compute_gradients_,
    window_optimizer,
    window_simulation,
)

BLOCKS = 8  # of 32, where a whole model runs
LLAMA = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=BLOCKS,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
)
TINY = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
SAMPLES = 128
RANK = 4
TOKENS, TINY_TOKENS = 2048, 16  # of a sample
SILENT = Listeners(
    on_update=lambda loss: None,
    on_window=lambda result: None,
    on_block=lambda block: None,
    on_experts=lambda block, counts: None,
    on_rounded=lambda block, strengths: None,
    on_rare_experts=lambda block, counts, least: None,
)


def config_of(tiny: bool, blocks: int = BLOCKS) -> LlamaConfig:
    """Llama-3-8B with so many blocks, or the tiny one."""
    if tiny:
        return TINY
    return LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": blocks})


def llama(kit: Kit, tiny: bool, blocks: int = BLOCKS) -> Any:
    """A Llama in float32 on the kit's device."""
    config = config_of(tiny, blocks)
    return kit.module(lambda: LlamaForCausalLM(config).eval().requires_grad_(False))


def sequence(tiny: bool) -> int:
    """Tokens of a sample."""
    return TINY_TOKENS if tiny else TOKENS


def weight_format(tiny: bool, dtype: torch.dtype = torch.bfloat16) -> WeightFormat:
    """4 bits in groups, symmetric, as ``quantize`` does by default."""
    return WeightFormat(bits=4, group_size=16 if tiny else 128, sym=True, dtype=dtype)


def shapes_of(tiny: bool) -> list[tuple[int, int]]:
    """[out, in] of the seven linear layers of a block."""
    config = TINY if tiny else LLAMA
    wide, inner = config.hidden_size, config.intermediate_size
    narrow = wide // (2 if tiny else 4)  # of keys and values
    return [
        *((wide, wide), (narrow, wide), (narrow, wide), (wide, wide)),  # q, k, v, o
        *((inner, wide), (inner, wide), (wide, inner)),  # gate, up, down
    ]


def round_a_block(kit: Kit, tiny: bool) -> Step:
    """Compensated rounding of one block, all of it: moments, solutions, column loops and the relay."""
    config = LlamaConfig(**{**config_of(tiny, 1).to_dict(), "vocab_size": TINY.vocab_size})
    model: Any = kit.module(lambda: LlamaForCausalLM(config).eval().requires_grad_(False))
    decoder = TransformersDecoder(model)
    samples, tokens = (4, TINY_TOKENS) if tiny else (SAMPLES, TOKENS)
    decoder.block_inputs(kit.randint(config.vocab_size, 1, tokens))

    learned = block_learnables(kit, tiny)
    task = CalibrationTask(
        decoder=decoder,
        tokens=torch.empty(samples, tokens, device="meta"),
        windows=[],
        learnables=[learned],
        config=SliderConfig(nsamples=samples, seqlen=tokens),
        activations=None,
        listeners=SILENT,
        cache=lambda name, hidden: hidden,
        done=0,
    )
    dtype = stream_dtype(kit.device, torch.float32)
    x_fp, x_q = (kit.randn(samples, tokens, config.hidden_size, dtype=dtype) for _ in range(2))
    split = split_samples(samples, samples_per_forward(decoder, task.config, tokens))

    @torch.no_grad()
    def step() -> None:
        round_block_(task, 0, x_fp, x_q, split)
        learned.pack_codes()

    return step


def update_of_blocks(rounded: bool) -> Callable[[Kit, bool], Step]:
    """Windows: a whole update of two blocks.

    Embedding and head are left small: an update has none of them in memory.

    Args:
        rounded: Train the scales of codes, as ``combined`` does; else weights are simulated and rounded.
    """
    return functools.partial(_update_blocks, rounded)


def _update_blocks(rounded: bool, kit: Kit, tiny: bool) -> Step:
    config = LlamaConfig(**{**config_of(tiny, 2).to_dict(), "vocab_size": TINY.vocab_size})
    model: Any = kit.module(lambda: LlamaForCausalLM(config).eval().requires_grad_(False))
    decoder = TransformersDecoder(model)
    hidden = decoder.block_inputs(kit.randint(config.vocab_size, 1, sequence(tiny)))
    targets = kit.randn(*hidden.shape)
    trained = [block_learnables(kit, tiny) for _ in range(2)]
    if rounded:
        for block in trained:
            set_codes(kit, block)
    optimizer = window_optimizer(trained, (1e-4, 1e-2, 1e-3, 2e-3), torch.device("cuda"))
    with as_on_a_card(kit):
        simulate = window_simulation(decoder, [0, 1], trained, 1.0, None)

    def step() -> None:
        with as_on_a_card(kit):
            compute_gradients_(simulate, hidden, targets, 1, trained, optimizer)
        optimizer.step()

    return step


@contextlib.contextmanager
def as_on_a_card(kit: Kit) -> Iterator[None]:
    """Let the fake CPU stand for a card: the only fake device with both gradients and autocast."""
    with (
        mock.patch.object(window_training, "forward_precision") as forward_precision,
        mock.patch.object(window_training, "is_accelerator", return_value=True),
        mock.patch.object(pieces, "is_accelerator", return_value=True),
    ):
        forward_precision.side_effect = lambda device: kit.autocast()
        yield


def block_learnables(kit: Kit, tiny: bool) -> Any:
    """Corrections and clipping of one block."""
    names = ("q", "k", "v", "o", "gate", "up", "down")
    places = [f"self_attn.{n}_proj.weight" for n in names[:4]]
    places += [f"mlp.{n}_proj.weight" for n in names[4:]]

    def make() -> nn.Module:
        # The generator of the first values lives on the host.
        with torch.device("cpu"):
            weights = {
                name: torch.empty(shape, device="meta")
                for name, shape in zip(places, shapes_of(tiny), strict=True)
            }
            return BlockLearnables(weights, weight_format(tiny), RANK, seeded((0,)))

    return kit.module(make)


def set_codes(kit: Kit, block: Any) -> None:
    """Give a block codes, as compensated rounding does."""
    for linear in block.linears:
        (rows, groups), columns = linear.log_rescale.shape, linear.lora_a.shape[1]
        linear.closed_form = QuantizedWeight(
            codes=kit.randn(rows, columns).to(torch.int16),
            scale=kit.randn(rows, groups, dtype=linear.fmt.dtype),
            zero=None,
            fmt=linear.fmt,
        )
    block.train_scales()


def evaluate(kit: Kit, tiny: bool) -> Step:
    """``eval``: perplexity of one chunk of text in float32, as is the default."""
    model = llama(kit, tiny)
    tokens = kit.randint(model.config.vocab_size, 1, sequence(tiny))
    return lambda: perplexity(model_logits(model), [tokens])


def packed_llama(tiny: bool, kernel: bool) -> nn.Module:
    """A Llama in bfloat16 whose blocks hold 4-bit weights, as ``load`` makes it."""
    model = LlamaForCausalLM(config_of(tiny)).eval().requires_grad_(False)
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            packed = PackedLinear(module, weight_format(tiny), kernel)
            for place, value in packed._buffers.items():
                if value is not None:
                    packed._buffers[place] = torch.zeros(value.shape, dtype=value.dtype)
            model.model.layers.set_submodule(name, packed)
    return model


def forward_packed(tokens: int) -> Callable[[Kit, bool], Step]:
    """``sliderquant.load``: a forward pass of so many tokens; the kernel multiplies up to 8 rows."""

    def build(kit: Kit, tiny: bool) -> Step:
        kernel = kit.device.type == "cuda"
        model: Any = kit.module(lambda: packed_llama(tiny, kernel), torch.bfloat16)
        ids = kit.randint(model.config.vocab_size, 1, min(tokens, sequence(tiny)))

        @torch.no_grad()
        def step() -> None:
            model(input_ids=ids, use_cache=False)

        return step

    return build


ROUNDING = "compensated rounding of a Llama-3-8B block, 128 x 2048 tokens"
RESCALING = "update of the scales of 2 Llama-3-8B blocks, 1 x 2048 tokens, bf16 autocast, per block"
UPDATE = "update of a window of 2 Llama-3-8B blocks, 1 x 2048 tokens, bf16 autocast, per block"
# transformers looks for packed samples, once for all updates.
CALIBRATING = {"masking_utils.py:find_packed_sequence_indices": True}
PATHS: Sequence[HotPath] = [
    HotPath("packed forward, 8 blocks of Llama-3-8B W4 g128, 1 token", forward_packed(1)),
    HotPath("packed forward, 8 blocks of Llama-3-8B W4 g128, 512 tokens", forward_packed(512)),
    HotPath(
        "eval of one chunk, 8 blocks of Llama-3-8B, 2048 tokens",
        evaluate,
        allow={"metrics.py:perplexity": 2.0},
    ),
    HotPath(
        ROUNDING,
        round_a_block,
        allow={
            # Whether a layer group reads anything, and how strong its update is.
            "block_rounding.py:wait_for": 1.0,
            "masking_utils.py:find_packed_sequence_indices": True,
        },
        compile=False,
    ),
    *(
        HotPath(
            name,
            update_of_blocks(rounded),
            fake="cpu",
            scaled=0.5,
            warm_up=1,
            allow=CALIBRATING,
            compile=False,
        )
        for name, rounded in ((UPDATE, False), (RESCALING, True))
    ),
]

if __name__ == "__main__":
    main("sliderquant", PATHS)
