"""The calibration loop: two streams of hidden states go through the network, block by block.

Paper: "SliderQuant" (ICLR 2026, arXiv 2603.25284). x_fp is what enters a block in the full-precision
model, x_q what enters it in the model whose earlier blocks are quantized already. ``calibrate`` either
trains the learnables of sliding windows of blocks (``windows``, ``window_training``), stage by stage, or
rounds one block after the other in closed form (``error_compensation``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sliderquant.config import SliderConfig
from sliderquant.method.activations import ActivationFormat, activation_format
from sliderquant.method.decoder import Decoder
from sliderquant.method.error_compensation import BlockRun, round_block_
from sliderquant.method.learnables import BlockLearnables
from sliderquant.method.window_training import train_window_guarded
from sliderquant.method.windows import passes

# Given a name and hidden states, returns a copy of them that may live on disk.
HiddenStateCache = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowResult:
    """How one window went.

    Attributes:
        step: Count of finished windows over all stages, from 1.
        ratio: Intra-layer ratio of the stage.
        window: Block numbers.
        first_loss: Mean squared error of the first epoch.
        last_loss: Mean squared error of the last epoch.
        retries: Restarts at half the learning rate.
    """

    step: int
    ratio: float
    window: list[int]
    first_loss: float
    last_loss: float
    retries: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Listeners:
    """What the caller of ``calibrate`` wants to be told; see there."""

    on_update: Callable[[float], None]
    on_window: Callable[[WindowResult], None]
    on_block: Callable[[int], None]
    on_experts: Callable[[int, Tensor], None]


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
    cache: HiddenStateCache = lambda name, hidden: hidden.clone(),
) -> None:
    """Train the learnables of all blocks, in place, window by window and stage by stage.

    With compensated rounding there are no windows: see ``error_compensation``.

    A run that stopped after ``done`` windows continues to the same bits: the relay up to there is
    replayed, which only needs the learnables, because blocks below a window's start are final.

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
        cache: Given a name and hidden states, returns a copy of them that may live on disk.

    Raises:
        CalibrationDivergedError: Naming window and stage.

    Example:
        A random Llama of two blocks, rounded to 4 bits in closed form.

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

    # The closed form has neither windows nor stages.
    if config.method == "compensated":
        activations = activation_format(config)
        round_blocks_(
            decoder, tokens, learnables, config.batch_size,
            activations=activations, on_block=on_block, cache=cache,
        )  # fmt: skip
        return

    # Passes that an earlier run finished are skipped, except the last one, which hands blocks out.
    listeners = _Listeners(
        on_update=on_update, on_window=on_window, on_block=on_block, on_experts=on_experts
    )
    finished = 0
    schedule = passes(len(windows), config)
    for turns in schedule:
        is_last = turns is schedule[-1]
        if is_last or done < finished + len(turns):
            network_pass = _NetworkPass(
                decoder, tokens, learnables, config, cache, turns, listeners
            )
            network_pass.train(windows, finished, done, hand_out_blocks=is_last)
            del network_pass  # and with it the hidden states, before the next pass has its own
        finished += len(turns)


class _NetworkPass:
    """One pass over the network: windows are trained in order, hidden states relayed between them.

    Args:
        decoder: The model.
        tokens: Calibration samples.
        learnables: One per block.
        config: Method settings.
        cache: Copies hidden states, perhaps to disk.
        turns: (window, stage) pairs of the pass, in order.
        listeners: Whom to tell.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokens: Int[Tensor, "n t"],
        learnables: Sequence[BlockLearnables],
        config: SliderConfig,
        cache: HiddenStateCache,
        turns: Sequence[tuple[int, int]],
        listeners: _Listeners,
    ) -> None:
        self.decoder, self.learnables, self.config = decoder, learnables, config
        self.cache, self.turns, self.listeners = cache, turns, listeners

        # Blocks that a window has left behind are final for this pass, at its highest ratio.
        last_stage = turns[-1][1]
        self.relay_ratio = (last_stage + 1) / config.stages
        self.relay_activations = activation_format(config, self.relay_ratio)

        # Both streams start at the embeddings, in front of block 0.
        embedded = decoder.block_inputs(tokens)
        self.x_fp, self.x_q = cache("x_fp", embedded), cache("x_q", embedded)
        self.position = 0

    def train(
        self,
        windows: Sequence[Sequence[int]],
        finished: int,
        done: int,
        *,
        hand_out_blocks: bool,
    ) -> None:
        """Train the windows of the pass that an earlier run has not finished.

        Args:
            windows: Block numbers of all windows.
            finished: Windows of the passes before this one.
            done: Windows that an earlier run finished, counted over all passes.
            hand_out_blocks: Call ``on_block`` with each block when the last window has left it.
        """
        targets, window_of_targets = None, None
        for step, (number, stage) in enumerate(self.turns, start=finished + 1):
            # Blocks in front of the window are final: the hidden states go through them.
            window = windows[number]
            for block in range(self.position, window[0]):
                if step <= done:
                    self.decoder.hold([block])  # replayed: no window has loaded it
                self._relay(block)
                if hand_out_blocks:
                    self.listeners.on_block(block)
            if step <= done:
                continue

            # One computation of the targets serves the stages that follow each other in a window.
            self.decoder.hold(window)
            if targets is None or window_of_targets != number:
                targets = None  # freed first
                targets, window_of_targets = self._targets(window), number
            self.listeners.on_window(self._train_window(window, targets, step, number, stage))

        # The last window leaves its blocks behind when it is finished itself.
        if hand_out_blocks:
            for block in range(self.position, self.decoder.depth):
                self.listeners.on_block(block)

    def _relay(self, block: int) -> None:
        """Push x_fp through a block at full precision, and x_q through the simulated block."""
        batch_size = self.config.batch_size
        run_blocks(self.decoder, [block], self.x_fp, batch_size, out=self.x_fp)
        run_blocks(
            self.decoder, [block], self.x_q, batch_size, self.learnables, self.relay_ratio,
            self.relay_activations, out=self.x_q,
        )  # fmt: skip
        self.position = block + 1

    def _targets(self, window: Sequence[int]) -> Tensor:
        """Return what the full-precision window makes of x_fp, or of x_q where the config asks so."""
        source = self.x_fp if self.config.target_input == "fp" else self.x_q
        targets = self.cache("targets", source)
        with self.decoder.counting_experts() as counts:
            run_blocks(self.decoder, window, targets, self.config.batch_size, out=targets)

        # Experts that calibration text hardly reaches stay untrained: they would learn its noise.
        for block, tokens in counts.items():
            if self.learnables[block].trained_experts is None:
                self.listeners.on_experts(block, tokens)
            self.learnables[block].trained_experts = tokens >= self.config.min_expert_tokens
        return targets

    def _train_window(
        self, window: Sequence[int], targets: Tensor, step: int, number: int, stage: int
    ) -> WindowResult:
        """Train the learnables of a window at the ratio of a stage."""
        ratio = (stage + 1) / self.config.stages
        seed = (self.config.seed, stage, number)
        first_loss, last_loss, retries = train_window_guarded(
            self.decoder,
            window,
            self.learnables,
            self.x_q,
            targets,
            ratio=ratio,
            config=self.config,
            seed=seed,
            on_update=self.listeners.on_update,
        )

        return WindowResult(
            step=step,
            ratio=ratio,
            window=list(window),
            first_loss=first_loss,
            last_loss=last_loss,
            retries=retries,
        )


@torch.no_grad()
def round_blocks_(
    decoder: Decoder,
    tokens: Int[Tensor, "n t"],
    learnables: Sequence[BlockLearnables],
    batch_size: int,
    *,
    activations: ActivationFormat | None = None,
    on_block: Callable[[int], None],
    cache: HiddenStateCache,
) -> None:
    """Round the linear layers of every block, front to back, in place of training them.

    Args:
        decoder: The model; its own weights stay as they are.
        tokens: Calibration samples.
        learnables: One per block. Their channel scales and the ``closed_form`` weights of their linear
            layers are set; fused experts stay as they are.
        batch_size: Samples per forward pass.
        activations: How the quantized model rounds activations; ``None`` if it does not.
        on_block: Called once per block, in order, while the block is in memory.
        cache: As for ``calibrate``.
    """
    embedded = decoder.block_inputs(tokens)
    x_fp, x_q = cache("x_fp", embedded), cache("x_q", embedded)
    for block in range(decoder.depth):
        # Round the block for the inputs that it gets behind the blocks that are rounded already.
        decoder.hold([block])
        tensors = decoder.tensors(block)
        full_precision = BlockRun(hidden=x_fp, tensors=tensors)
        quantized = round_block_(
            decoder, block, learnables[block], full_precision, x_q, batch_size, activations
        )

        # Both models move on behind the block.
        for run in (full_precision, quantized):
            for part in run.hidden.split(batch_size):
                part.copy_(decoder.run_block(block, part, run.tensors, run.activations))
        on_block(block)

        # Codes of all blocks together would fill a card; they are read again block by block.
        learnables[block].move_codes("cpu")


@torch.no_grad()
def run_blocks(
    decoder: Decoder,
    blocks: Sequence[int],
    hidden: Float[Tensor, "n t h"],
    batch_size: int,
    learnables: Sequence[BlockLearnables] | None = None,
    ratio: float = 1.0,
    activations: ActivationFormat | None = None,
    out: Float[Tensor, "n t h"] | None = None,
) -> Float[Tensor, "n t h"]:
    """Push hidden states through blocks, in full precision or simulated.

    Args:
        decoder: The model.
        blocks: Block numbers, in order.
        hidden: Hidden states entering the first block.
        batch_size: Samples per forward pass. The same value gives the same bits again.
        learnables: Of all blocks, for the simulated model; ``None`` for full precision.
        ratio: Intra-layer ratio of the simulation.
        activations: Rounding of activations in the simulation.
        out: Where to put the result; ``hidden`` itself makes it an update in place.

    Returns:
        ``out``, or a new tensor.
    """
    if out is None:
        out = torch.empty_like(hidden)
    if out is not hidden:
        out.copy_(hidden)

    for block in blocks:
        tensors = decoder.tensors(block)
        if learnables is not None:
            tensors = tensors | learnables[block](tensors, ratio)
        for batch in out.split(batch_size):
            batch.copy_(decoder.run_block(block, batch, tensors, activations))
    return out
