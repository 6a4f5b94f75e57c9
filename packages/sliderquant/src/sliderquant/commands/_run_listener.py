"""What is done and told whenever an update, a window or a block is finished."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from effml_common.device import synchronize
from effml_common.logging import Progress, RunLog, say, warn
from effml_common.stopping import StopSignal
from sliderquant.commands._job import CalibrationJob, Job
from sliderquant.commands.inspect import Plan
from sliderquant.method.layout import WEIGHT_SUFFIX
from sliderquant.method.task import WindowResult

NAMED_EXPERTS = 16  # of those with too few tokens, in one warning


class CalibrationListener:
    """What is told about a calibration, wherever its result goes."""

    def __init__(self, job: CalibrationJob, bar: Progress, clock: "WindowClock") -> None:
        self._job, self._bar, self._clock = job, bar, clock

    def on_update(self, loss: float) -> None:
        """Advance the bar."""
        self._bar.advance(loss=f"{loss:.3g}")

    def on_rounded(self, block: int, strengths: Mapping[tuple[str, ...], float | None]) -> None:
        """Advance the bar; warn about layers that were never active."""
        self._bar.advance(self._job.plan.rounding_steps)
        self._clock.restart()
        for names, strength in strengths.items():
            if strength is None:
                warn(
                    f"block {block}: the inputs of {', '.join(names)} are zero in all calibration "
                    "text; rounded to nearest"
                )

    def on_window(self, result: WindowResult) -> None:
        """Say how a window went."""
        self._clock.tell(result)

    def on_experts(self, block: int, counts: Tensor) -> None:
        """Say how many tokens each expert received."""
        least = self._job.config.min_expert_tokens
        rare = int((counts < least).sum())
        say(f"block {block}: experts received {counts.min()} to {counts.max()} tokens")
        if rare:
            warn(
                f"block {block}: {rare} of {len(counts)} experts received fewer than {least} "
                "tokens and are rounded without training; give more text"
            )

    def on_rare_experts(self, block: int, counts: Mapping[int, int], least: int) -> None:
        """Warn of experts that have too few tokens of their own to be rounded for them."""
        named = [f"{expert} ({count})" for expert, count in counts.items()]
        more = f" and {len(named) - NAMED_EXPERTS} more" if len(named) > NAMED_EXPERTS else ""
        warn(
            f"block {block}: too few tokens for experts {', '.join(named[:NAMED_EXPERTS])}{more}; "
            f"with fewer than {least} they are rounded for the tokens of all experts; give more text"
        )


class RunListener(CalibrationListener):
    """What the command does besides, whenever an update, a window or a block is finished."""

    def __init__(
        self,
        job: Job,
        write_block: Callable[[int], None],
        save_window: Callable[[int], None],
        log: RunLog,
        bar: Progress,
        stop: StopSignal,
        clock: "WindowClock",
    ) -> None:
        super().__init__(job, bar, clock)
        self._texts, self._write_block, self._save_window = job.texts, write_block, save_window
        self._log, self._stop = log, stop

    def on_update(self, loss: float) -> None:
        """Advance the bar; stop if asked, because the last finished window is saved."""
        super().on_update(loss)
        self._stop_if_asked()

    def on_block(self, block: int) -> None:
        """Write a final block; where all blocks are rounded, its codes may be needed to measure."""
        self._write_block(block)
        if not self._texts:
            self._job.learnables[block].forget_codes()

    def on_rounded(self, block: int, strengths: Mapping[tuple[str, ...], float | None]) -> None:
        """Log how far each layer group makes up for the errors of the layers before; stop if asked."""
        named = {names[0].removesuffix(WEIGHT_SUFFIX): value for names, value in strengths.items()}
        # Windows count their own steps, and a run that is continued in them rounds again.
        if not self._job.plan.windows:
            self._log.log(block + 1, {f"strength {name}": value for name, value in named.items()})
        super().on_rounded(block, strengths)
        self._stop_if_asked()

    def on_window(self, result: WindowResult) -> None:
        """Save a finished window."""
        # Logged first: a resumed run drops lines that no checkpoint covers.
        metrics = asdict(result)
        self._log.log(metrics.pop("step"), metrics)
        self._save_window(result.step)
        super().on_window(result)

    def _stop_if_asked(self) -> None:
        # All processes get here together, and a signal may have reached one of them only.
        self._stop.agree()
        self._stop.check()


class WindowClock:
    """Says how long each window took and how much time is left.

    Args:
        plan: Windows and stages.
        done: Windows of an earlier process of the same run.
        device: That computes; the clock is read when it has done what was asked of it.
    """

    def __init__(self, plan: Plan, done: int, device: torch.device) -> None:
        self._device = device
        self._total = plan.stages * len(plan.windows)
        self._left = plan.stages * plan.block_visits
        self._skipped = done
        self._visited = 0
        self.restart()

    def restart(self) -> None:
        """Start to count now: what was done before were no windows."""
        self._start = self._last = time.monotonic()

    def tell(self, result: WindowResult) -> None:
        """Print one line for a finished window."""
        synchronize(self._device)
        now = time.monotonic()
        self._visited += len(result.window)
        share = self._visited / (self._visited + self._remaining(result))
        left = (now - self._start) * (1 - share) / share
        blocks = "-".join(map(str, sorted({result.window[0], result.window[-1]})))
        say(
            f"window {result.step}/{self._total} (blocks {blocks}, ratio {result.ratio:g}): "
            f"{now - self._last:.1f} s, loss {result.first_loss:.3g} -> {result.last_loss:.3g}, "
            f"about {left:.0f} s left"
        )
        self._last = now

    def _remaining(self, result: WindowResult) -> float:
        # Windows differ in size; the average is near enough.
        return self._left / self._total * (self._total - result.step)
