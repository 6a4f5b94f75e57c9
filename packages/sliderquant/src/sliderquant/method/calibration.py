"""Calibration: round a model's blocks in closed form, train sliding windows of blocks, or both.

Paper: "SliderQuant" (ICLR 2026, arXiv 2603.25284). All methods push two streams of hidden states
through the network, block by block: x_fp is what enters a block in the full-precision model, x_q what
enters it in the model whose earlier blocks are quantized already. ``block_rounding`` rounds one block
after the other; ``window_passes`` trains windows of blocks, stage by stage. Combined, all blocks are
rounded first, and windows train the scales of the codes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from jaxtyping import Int
from torch import Tensor

from sliderquant.config import SliderConfig
from sliderquant.method.activations import ActivationFormat, activation_format
from sliderquant.method.block_rounding import round_blocks_
from sliderquant.method.decoder import Decoder, HiddenStateCache
from sliderquant.method.layout import layer_name
from sliderquant.method.learnables import BlockLearnables
from sliderquant.method.task import CalibrationTask, Listeners, WindowResult
from sliderquant.method.window_passes import train_windows


def round_and_train_scales(task: CalibrationTask) -> None:
    """Round all blocks in closed form, then train the scales of their codes in windows.

    Rounding looks at one layer group at a time; a window sees what its errors become some blocks later.

    Raises:
        CalibrationDivergedError: Naming window and stage.
    """
    # No block is final before its last window. A continued run rounds again, to the same codes.
    not_final = replace(task.listeners, on_block=lambda block: None)
    round_blocks_(replace(task, listeners=not_final))

    # Channel scales belong to the codes, and are final with them.
    for learnables in task.learnables:
        learnables.train_scales()
    train_windows(task)


METHODS: dict[str, Callable[[CalibrationTask], None]] = {
    "compensated": round_blocks_,
    "combined": round_and_train_scales,
    "slider": train_windows,
}


def rounding_of_inputs(
    config: SliderConfig, learnables: Sequence[BlockLearnables]
) -> ActivationFormat | None:
    """Return how activations are rounded in the end; layers that are ignored read exact ones."""
    fmt = activation_format(config)
    exact = frozenset(
        layer_name(block, name)
        for block, of_block in enumerate(learnables)
        for name in of_block.ignored
    )
    return None if fmt is None else replace(fmt, exact_inputs=exact)


def calibrate(
    decoder: Decoder,
    tokens: Int[Tensor, "n t"],
    windows: Sequence[Sequence[int]],
    learnables: Sequence[BlockLearnables],
    config: SliderConfig,
    *,
    done: int = 0,
    on_update: Callable[[float], None] = lambda loss: None,
    on_window: Callable[[WindowResult], None] = lambda result: None,
    on_block: Callable[[int], None] = lambda block: None,
    on_experts: Callable[[int, Tensor], None] = lambda block, counts: None,
    on_rounded: Callable[[int, Mapping[tuple[str, ...], float | None]], None] = (
        lambda block, strengths: None
    ),
    on_rare_experts: Callable[[int, Mapping[int, int], int], None] = (
        lambda block, counts, least: None
    ),
    cache: HiddenStateCache = lambda name, hidden: hidden.clone(),
) -> None:
    """Train the learnables of all blocks, in place, window by window and stage by stage.

    With compensated rounding there are no windows: see ``error_compensation``.

    A run that stopped after ``done`` windows continues to the same bits: the relay up to there is
    replayed, which only needs the learnables, because blocks below a window's start are final. Combined,
    the blocks are rounded again first.

    Args:
        decoder: The model; its own weights stay as they are.
        tokens: Calibration samples.
        windows: Block numbers per window, from ``make_windows``.
        learnables: One per block, fresh or restored.
        config: Method settings.
        done: Windows finished in an earlier run, counted over all stages.
        on_update: Called with the loss after each update.
        on_window: Called after each window and stage; the place to save.
        on_block: Called once per block, in order, when it is final, while it is still in memory.
        on_experts: Called with a block and the tokens that each of its experts received.
        on_rounded: Called with a block, and for each of its layer groups the strength of the ridge
            update, ``None`` where the inputs are all zero.
        on_rare_experts: Called with a block, the tokens of each expert that has too few of its own to be
            rounded for them, and how many would be enough.
        cache: Given a name and hidden states, returns a copy of them that may live on disk.

    Raises:
        CalibrationDivergedError: Naming window and stage.

    Example:
        A random Llama of two blocks, rounded to 4 bits in closed form.

        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from sliderquant.adapters.decoder import TransformersDecoder
        >>> from sliderquant.adapters.simulation import fresh_learnables
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        >>> llama = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_attention_heads=2, **sizes))
        >>> decoder = TransformersDecoder(llama)
        >>> config = SliderConfig(wbits=4, group_size=8)
        >>> learnables = fresh_learnables(decoder, config, torch.bfloat16)
        >>> tokens = torch.arange(64).view(4, 16)
        >>> calibrate(decoder, tokens, [], learnables, config)
        >>> learnables[0].linear("mlp.down_proj.weight").closed_form.codes.shape
        torch.Size([16, 32])
    """
    # A model that stays at full precision and scales no channel is final as it is.
    if not any(block.parameter_groups(0, 0) for block in learnables):
        for block in range(decoder.depth):
            on_block(block)
        return

    listeners = Listeners(
        on_update=on_update,
        on_window=on_window,
        on_block=on_block,
        on_experts=on_experts,
        on_rounded=on_rounded,
        on_rare_experts=on_rare_experts,
    )
    task = CalibrationTask(
        decoder=decoder,
        tokens=tokens,
        windows=windows,
        learnables=learnables,
        config=config,
        activations=rounding_of_inputs(config, learnables),
        listeners=listeners,
        cache=cache,
        done=done,
    )
    METHODS[config.method](task)
