"""``MorsePipeline``: a user's own pipeline, called with a time budget."""

import functools
import inspect
from typing import Any

import torch

from effml_common.logging import say
from morse_diffusion.adapters.apply import apply_morse
from morse_diffusion.adapters.calls import denoiser_of
from morse_diffusion.adapters.run_summary import RunSummary
from morse_diffusion.adapters.schedulers import fit_plan
from morse_diffusion.errors import PlanError
from morse_diffusion.method.sampler import Dot
from morse_diffusion.method.schedule import MorsePlan, make_plan

DASH_SHARE = 1 / 3  # of the steps, when only their number is given
TIMING_PLAN = MorsePlan(10, (0, 5))  # a short run that both kinds of step are timed in


class MorsePipeline:
    """Wraps a pipeline without copying a weight; every other attribute is the pipeline's own.

    Attributes that are set here are set on the pipeline, and a method that returns the pipeline, such as
    ``to``, returns the wrapper. The hook is on the denoiser only during a call, so the wrapped pipeline
    stays usable as it was.

    Args:
        pipe: A diffusers pipeline.
        dot: What fills in the Dot steps.
        speed_ratio: N on this device; measured by a short run when first needed.
        early: Where the Dash steps are, for plans made here; see ``schedule.spread_indices``.
        options: Passed on to ``apply_morse``.

    >>> from diffusers import DPMSolverMultistepScheduler, UNet2DModel
    >>> from morse_diffusion.adapters.pixels import PixelPipeline
    >>> from morse_diffusion.method.sampler import ZeroDot
    >>> unet = UNet2DModel(sample_size=16, block_out_channels=(8, 8), norm_num_groups=4,
    ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    >>> pipe = PixelPipeline(unet, DPMSolverMultistepScheduler())
    >>> fast = MorsePipeline.from_pipe(pipe, ZeroDot(), speed_ratio=4)
    >>> images = fast(batch_size=1, budget_lsd=3)
    >>> fast.summary().to_json()["pattern"]
    'DddDdd'
    """

    def __init__(
        self,
        pipe: Any,
        dot: Dot,
        *,
        speed_ratio: float | None = None,
        early: float = 1.0,
        **options: Any,
    ) -> None:
        self._pipe, self._dot, self._given_ratio, self._options = pipe, dot, speed_ratio, options
        self._early = early
        self._summary: RunSummary | None = None
        self._measured: tuple[torch.device, float] | None = None

    @classmethod
    def from_pipe(cls, pipe: Any, dot: Dot, **options: Any) -> "MorsePipeline":
        """Wrap a pipeline; named as in diffusers. See the class."""
        return cls(pipe, dot, **options)

    def __getattr__(self, name: str) -> Any:
        # copy and pickle look for private names before there is a pipeline to ask.
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        value = getattr(self._pipe, name)
        return self._returning_self(value) if inspect.ismethod(value) else value

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            setattr(self._pipe, name, value)

    def _returning_self(self, method: Any) -> Any:
        """Wrap a method of the pipeline so that it returns this wrapper in place of the pipeline."""

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            return self if result is self._pipe else result

        return call

    def __call__(
        self,
        *args: Any,
        budget_lsd: float | None = None,
        dash_steps: int | None = None,
        dot_steps: int | None = None,
        plan: MorsePlan | None = None,
        num_inference_steps: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the pipeline on a plan.

        Args:
            args: As for the pipeline.
            budget_lsd: Time for the loop in Dash steps; see ``make_plan``.
            dash_steps: With ``dot_steps``, the counts themselves.
            dot_steps: See ``dash_steps``.
            plan: A plan of your own.
            num_inference_steps: Total steps, a third of them Dash; not beside the others.
            kwargs: As for the pipeline.

        Raises:
            PlanError: If none or several of these are given, or the budget is too small.
        """
        # Exactly one way to say how many steps there are.
        given = {
            "budget_lsd": budget_lsd,
            "dash_steps": dash_steps,
            "plan": plan,
            "num_inference_steps": num_inference_steps,
        }
        named = [name for name, value in given.items() if value is not None]
        if len(named) != 1 or (dot_steps is not None) != (dash_steps is not None):
            raise PlanError(
                f"{' and '.join(named) or 'no budget'} given; give one of budget_lsd=10, "
                "dash_steps=7 with dot_steps=18, plan=..., num_inference_steps=25"
            )

        # The plan; only a budget needs N, which a short run of the same call measures.
        if plan is not None:
            return self._run(plan, args, kwargs)
        if budget_lsd is not None:
            ratio = self._known_ratio or self.measure_speed_ratio(*args, **kwargs)
            plan = make_plan(budget_lsd, ratio, early=self._early)
        else:
            plan = self._plan_counts(dash_steps, dot_steps, num_inference_steps)
        return self._run(self._fit_to_scheduler(plan), args, kwargs)

    def summary(self) -> RunSummary:
        """Return what the last call did; it prints as pattern, times, N and effective LSD.

        Raises:
            PlanError: If there was no call yet.
        """
        if self._summary is None:
            raise PlanError("there was no call yet; sample first")
        self._summary.warn_if_idle()
        return self._summary

    def measure_speed_ratio(self, *args: Any, **kwargs: Any) -> float:
        """Measure N with a short run of the same kind of call, and remember it for this device.

        Args:
            args: As for the pipeline.
            kwargs: As for the pipeline; callbacks and the generator are left out.
        """
        # Nothing that the caller sees may change: callbacks, generators, the last summary.
        kwargs = {k: v for k, v in kwargs.items() if not k.startswith("callback")}
        if kwargs.get("generator") is not None:
            kwargs["generator"] = None
        before, device = self._summary, self._device
        cards = [device] if device.type in ("cuda", "xpu") else []
        with torch.random.fork_rng(cards, device_type=cards[0].type if cards else "cuda"):
            self._run(fit_plan(TIMING_PLAN, self._pipe.scheduler), args, kwargs)

        # The first step of a kind warms up; the fastest is the least disturbed.
        assert self._summary is not None
        dash, dot = (min(self._summary.milliseconds[kind]) for kind in ("Dash", "Dot"))
        ratio = float(f"{dash / dot:.2g}")
        self._summary, self._measured = before, (device, ratio)
        say(f"measured N = {ratio:g}: a Dash step takes {dash:.3g} ms, a Dot step {dot:.3g}")
        return ratio

    @property
    def _known_ratio(self) -> float | None:
        """N as given, or as measured on the device that the denoiser is on; else None."""
        if self._given_ratio is not None or self._measured is None:
            return self._given_ratio
        device, ratio = self._measured
        return ratio if device == self._device else None

    @property
    def _device(self) -> torch.device:
        """Where the denoiser runs, also while an offloading pipeline keeps it elsewhere."""
        device = getattr(self._pipe, "_execution_device", None)
        return device or next(denoiser_of(self._pipe).parameters()).device

    def _plan_counts(
        self, dash_steps: int | None, dot_steps: int | None, total: int | None
    ) -> MorsePlan:
        """Make a plan from both counts of steps, or from their total alone."""
        if dash_steps is None or dot_steps is None:
            assert total is not None
            dash_steps = max(1, round(DASH_SHARE * total))
            dot_steps = total - dash_steps
        ratio = self._known_ratio or float("inf")
        return MorsePlan.spread(dash_steps, dot_steps, ratio, self._early)

    def _fit_to_scheduler(self, plan: MorsePlan) -> MorsePlan:
        """Round a plan to what the scheduler can space, and say so."""
        fitting = fit_plan(plan, self._pipe.scheduler)
        if fitting != plan:
            say(
                f"{plan.n_total} steps rounded to {fitting.n_total}, which this scheduler can space"
            )
        return fitting

    def _run(self, plan: MorsePlan, args: Any, kwargs: Any) -> Any:
        handle = apply_morse(self._pipe, self._dot, plan, **self._options)
        try:
            return self._pipe(*args, num_inference_steps=plan.n_total, **kwargs)
        finally:
            self._summary = handle.summary()
            handle.remove()
