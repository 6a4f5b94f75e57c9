"""Sliding windows over a whole model: they are trained in order, and hidden states relayed between them.

Paper: "SliderQuant" (ICLR 2026, arXiv 2603.25284). x_fp is what enters a block in the full-precision
model, x_q what enters it in the model whose earlier blocks are quantized already. Which blocks share a
window stands in ``windows``, how one window is trained in ``window_training``.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from sliderquant.method.activations import ActivationFormat
from sliderquant.method.decoder import run_blocks
from sliderquant.method.precision import forward_precision
from sliderquant.method.task import CalibrationTask, WindowResult
from sliderquant.method.window_training import train_window_guarded
from sliderquant.method.windows import passes


def train_windows(task: CalibrationTask) -> None:
    """Train the learnables of all blocks, in place, window by window and stage by stage.

    Raises:
        CalibrationDivergedError: Naming window and stage.
    """
    # Passes that an earlier run finished are skipped, except the last one, which hands blocks out.
    finished = 0
    schedule = passes(len(task.windows), task.config)
    for turns in schedule:
        is_last = turns is schedule[-1]
        if is_last or task.done < finished + len(turns):
            network_pass = _NetworkPass(task, turns)
            network_pass.train(finished, hand_out_blocks=is_last)
            del network_pass  # and with it the hidden states, before the next pass has its own
        finished += len(turns)


class _NetworkPass:
    """One pass over the network: windows are trained in order, hidden states relayed between them.

    Args:
        task: Model, samples, windows, learnables and settings.
        turns: (window, stage) pairs of the pass, in order.
    """

    def __init__(self, task: CalibrationTask, turns: Sequence[tuple[int, int]]) -> None:
        self.task, self.turns = task, turns
        self.decoder, self.learnables, self.config = task.decoder, task.learnables, task.config

        # Blocks that a window has left behind are final for this pass, at its highest ratio.
        last_stage = turns[-1][1]
        self.relay_ratio = (last_stage + 1) / self.config.stages
        self.relay_activations = at_ratio(task.activations, self.relay_ratio)

        # Both streams start at the embeddings, in front of block 0.
        embedded = task.decoder.block_inputs(task.tokens)
        self.x_fp, self.x_q = task.cache("x_fp", embedded), task.cache("x_q", embedded)
        self.position = 0

    def train(self, finished: int, *, hand_out_blocks: bool) -> None:
        """Train the windows of the pass that an earlier run has not finished.

        Args:
            finished: Windows of the passes before this one.
            hand_out_blocks: Call ``on_block`` with each block when the last window has left it.
        """
        done, listeners = self.task.done, self.task.listeners
        targets, window_of_targets = None, None
        for step, (number, stage) in enumerate(self.turns, start=finished + 1):
            # Blocks in front of the window are final: the hidden states go through them.
            window = self.task.windows[number]
            for block in range(self.position, window[0]):
                if step <= done:
                    self.decoder.hold([block])  # replayed: no window has loaded it
                self._relay(block)
                if hand_out_blocks:
                    listeners.on_block(block)
            if step <= done:
                continue

            # One computation of the targets serves the stages that follow each other in a window.
            self.decoder.hold(window)
            if targets is None or window_of_targets != number:
                targets = None  # freed first
                targets, window_of_targets = self._targets(window), number
            listeners.on_window(self._train_window(window, targets, step, number, stage))

        # The last window leaves its blocks behind when it is finished itself.
        if hand_out_blocks:
            for block in range(self.position, self.decoder.depth):
                listeners.on_block(block)

    def _relay(self, block: int) -> None:
        """Push x_fp through a block at full precision, and x_q through the simulated block."""
        batch_size = self.config.batch_size
        with forward_precision(self.decoder.device):
            run_blocks(self.decoder, [block], self.x_fp, batch_size, out=self.x_fp)
            run_blocks(
                self.decoder, [block], self.x_q, batch_size, self.learnables, self.relay_ratio,
                self.relay_activations, out=self.x_q,
            )  # fmt: skip
        self.position = block + 1

    def _targets(self, window: Sequence[int]) -> Tensor:
        """Return what the full-precision window makes of x_fp, or of x_q where the config asks so."""
        source = self.x_fp if self.config.target_input == "fp" else self.x_q
        targets = self.task.cache("targets", source)
        precision = forward_precision(self.decoder.device)
        with precision, self.decoder.counting_experts() as counts:
            run_blocks(self.decoder, window, targets, self.config.batch_size, out=targets)

        # Experts that calibration text hardly reaches stay untrained: they would learn its noise.
        for block, tokens in counts.items():
            if self.learnables[block].trained_experts is None:
                self.task.listeners.on_experts(block, tokens)
            enough = tokens >= self.config.min_expert_tokens
            self.learnables[block].trained_experts = enough.to(self.decoder.device)
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
            activations=at_ratio(self.task.activations, ratio),
            on_update=self.task.listeners.on_update,
        )

        return WindowResult(
            step=step,
            ratio=ratio,
            window=list(window),
            first_loss=first_loss,
            last_loss=last_loss,
            retries=retries,
        )


def at_ratio(activations: ActivationFormat | None, ratio: float) -> ActivationFormat | None:
    """Return a format of activations at an intra-layer ratio; ``None`` if they are not rounded."""
    return None if activations is None else replace(activations, ratio=ratio)
