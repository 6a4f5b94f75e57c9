"""Hot paths of sliderquant: rounding a block of Llama-3-8B both ways, measuring a model, decoding.

    python -m benchmarks.sliderquant.cuda --predict
    python -m benchmarks.sliderquant.cuda --out runs/cuda

Settings are the defaults of ``sliderquant quantize``: 4 bits in groups of 128, samples of 2,048 tokens.
What has too many operations for a count is counted in part and scaled.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.hot_path_timing import main
from benchmarks.hot_paths import HotPath, Kit, Step
from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.simulation import model_logits
from sliderquant.method.block_rounding import BlockRun, collect_moments
from sliderquant.method.error_compensation import (
    REFINEMENT_PASSES,
    damped_hessian,
    inverse_cholesky_factor,
    refit_scales,
    ridge_update,
    round_columns_,
    sweep_columns_,
)
from sliderquant.method.layout import layer_groups
from sliderquant.method.learnables import WEIGHTS_PER_PIECE, BlockLearnables, LinearLearnables
from sliderquant.method.metrics import perplexity
from sliderquant.method.packed import PackedLinear
from sliderquant.method.quantizer import WeightFormat, nearest_codes, quantization_grid
from sliderquant.method.sampling import seeded
from sliderquant.method.window_training import update_window, window_simulation

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
COLUMN_SHARE = 1024  # of every so many columns, one is counted


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
    return 16 if tiny else 2048


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


def gather_moments(kit: Kit, tiny: bool) -> Step:
    """Compensated rounding: both models up to each layer group, moments, and the relay; one sample."""
    decoder = TransformersDecoder(llama(kit, tiny, 1))
    hidden = decoder.block_inputs(kit.randint(config_of(tiny).vocab_size, 1, sequence(tiny)))
    tensors = decoder.tensors(0)
    run = BlockRun(hidden=hidden, tensors=tensors)
    groups = layer_groups(decoder.layout(0))

    @torch.no_grad()
    def step() -> None:
        for group in groups:
            collect_moments(decoder, 0, group, run, run, 1)
        for _ in range(2):
            decoder.run_block(0, hidden, tensors)

    return step


def moment_of(kit: Kit, columns: int) -> Tensor:
    """A positive definite X^T X, float64."""
    x = kit.randn(2 * columns, columns)
    return (x.T @ x).double()


def grids_of(weight: Tensor, fmt: WeightFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Scale of each group, and scale and zero point of each weight."""
    size = fmt.columns_per_group(weight.shape[1])
    scale, zero = quantization_grid(weight.unflatten(-1, (-1, size)), fmt)
    scale, zero = scale.squeeze(-1), zero.squeeze(-1)
    return scale, scale.repeat_interleave(size, dim=-1), zero.repeat_interleave(size, dim=-1)


def solve_weights(kit: Kit, tiny: bool) -> Step:
    """Compensated rounding: regressions, factorisations and least squares of a block's weights."""
    fmt = weight_format(tiny)

    def solve(weight: Tensor, moment: Tensor, cross: Tensor) -> None:
        h = damped_hessian(moment)
        target = ridge_update(weight, h, cross)
        order = h.diagonal().argsort(descending=True)
        inverse_cholesky_factor(h[order][:, order])
        scale, scales, zeros = grids_of(weight, fmt)
        levels = nearest_codes(target, scales, zeros, fmt) - zeros
        levels = levels.unflatten(-1, (-1, fmt.columns_per_group(weight.shape[1])))
        for _ in range(REFINEMENT_PASSES):
            scale = refit_scales(levels, scale, target, h)

    moments = {columns: moment_of(kit, columns) for _, columns in shapes_of(tiny)}
    weights = [
        (kit.randn(out, columns), kit.randn(columns, out).double())
        for out, columns in shapes_of(tiny)
    ]

    @torch.no_grad()
    def step() -> None:
        for weight, cross in weights:
            solve(weight, moments[weight.shape[1]], cross)

    return step


def loop_over_columns(kit: Kit, tiny: bool) -> Step:
    """Compensated rounding: error feedback and coordinate descent over a share of the columns.

    Half of a block: q, k and gate stand for o, v and up too, and of down half of the share is visited.
    The product that passes errors on to the columns behind stands here once for 4 columns instead of
    128: its bytes are 6 % of all.
    """
    fmt = weight_format(tiny)
    prepared = []
    q, k, _, _, gate, _, down = shapes_of(tiny)
    for out, columns in (q, k, gate, down):
        weight = kit.randn(out, columns)
        _, scales, zeros = grids_of(weight, fmt)
        h = kit.randn(columns, columns)
        share = COLUMN_SHARE * (2 if (out, columns) == down else 1)
        visited = max(1, columns // share)
        prepared.append((weight, scales, zeros, h.square_().add_(1), visited))

    @torch.no_grad()
    def step() -> None:
        for weight, scales, zeros, h, visited in prepared:
            code = round_columns_(weight, scales, zeros, fmt, h, visited)
            for _ in range(REFINEMENT_PASSES):
                sweep_columns_(code, weight, scales, zeros, fmt, h, visited)

    return step


def update_blocks(kit: Kit, tiny: bool) -> Step:
    """Windows: one update of two blocks, whose weights get their correction but are not rounded."""
    decoder = TransformersDecoder(llama(kit, tiny, 2))
    hidden = decoder.block_inputs(kit.randint(config_of(tiny).vocab_size, 1, sequence(tiny)))
    learnables = [block_learnables(kit, tiny) for _ in range(2)]
    for learned in learnables:
        for linear in learned.linears:
            linear.forward_in_pieces = lambda weight, ratio, own=linear: own.add_correction(weight)
    groups = [group for learned in learnables for group in learned.parameter_groups(1e-4, 1e-2)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    simulate = window_simulation(decoder, [0, 1], learnables, 1.0, None)
    return lambda: update_window(simulate, hidden, hidden + 1, 1, learnables, optimizer)


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


def simulate_pieces(kit: Kit, tiny: bool) -> Step:
    """Windows: a weight simulated twice, the second time for the backward pass; two pieces of it."""
    columns = TINY.hidden_size if tiny else LLAMA.hidden_size
    rows = 2 * max(1, WEIGHTS_PER_PIECE // columns)

    def make() -> nn.Module:
        with torch.device("cpu"):
            return LinearLearnables((rows, columns), weight_format(tiny), RANK, seeded((0,)))

    linear: Any = kit.module(make)
    weight, gradient = kit.randn(rows, columns), kit.randn(rows, columns)

    def step() -> None:
        linear.forward_in_pieces(weight, 1.0)
        linear.forward_in_pieces(weight, 1.0).backward(gradient)

    return step


def pieces(blocks: int) -> int:
    """Pieces in which the weights of so many blocks are simulated."""
    rows = [(out, max(1, WEIGHTS_PER_PIECE // columns)) for out, columns in shapes_of(False)]
    return blocks * sum(math.ceil(out / at_once) for out, at_once in rows)


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


# An update reads its loss, and whether the gradient is finite; transformers looks for packed samples.
CALIBRATING = {
    "sampling.py:all_reduce_": 1.0,
    "window_training.py:update_window": True,
    "masking_utils.py:find_packed_sequence_indices": True,
}
PATHS: Sequence[HotPath] = [
    HotPath("packed forward, 8 blocks of Llama-3-8B W4 g128, 1 token", forward_packed(1)),
    HotPath("packed forward, 8 blocks of Llama-3-8B W4 g128, 512 tokens", forward_packed(512)),
    HotPath(
        "eval of one chunk, 8 blocks of Llama-3-8B, 2048 tokens",
        evaluate,
        allow={"metrics.py:perplexity": 2.0},
    ),
    HotPath(
        "moments of a Llama-3-8B block, 1 of 128 samples (scaled)",
        gather_moments,
        scaled=SAMPLES,
        compile=False,
    ),
    HotPath("solving for a Llama-3-8B block", solve_weights, compile=False),
    HotPath(
        "column loops of a Llama-3-8B block, 1 of 1024 columns (scaled)",
        loop_over_columns,
        scaled=2 * COLUMN_SHARE,
        compile=False,
    ),
    HotPath(
        "update of a window of 2 Llama-3-8B blocks, without rounding",
        update_blocks,
        fake="meta",
        warm_up=1,
        allow=CALIBRATING,
        compile=False,
    ),
    HotPath(
        "rounding in an update of 2 Llama-3-8B blocks, 2 pieces (scaled)",
        simulate_pieces,
        fake="gpu:0",
        scaled=pieces(2) / 2,
        compile=False,
    ),
]

if __name__ == "__main__":
    main("sliderquant", PATHS)
