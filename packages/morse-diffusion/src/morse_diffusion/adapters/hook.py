"""Who answers at each step of a live pipeline: a hook on its denoiser.

The pipeline runs its usual loop. At a Dash step the hook lets the denoiser run and keeps what it saw
and said; at a Dot step it answers in the denoiser's place. Under classifier-free guidance the answer is
the guided estimate in both halves of the batch: u + w (c - u) is then exactly that estimate.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate.hooks import CpuOffload
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from effml_common.logging import warn
from morse_diffusion.adapters.calls import Guidance, conditional_half, refuse_side_inputs
from morse_diffusion.adapters.run_summary import RunSummary, clock
from morse_diffusion.adapters.schedulers import (
    check_scheduler,
    distinct_times,
    from_space,
    to_space,
)
from morse_diffusion.errors import NumericsError, StateError
from morse_diffusion.method.sampler import Dot
from morse_diffusion.method.schedule import MorsePlan

OnNaN = Literal["error", "dash"]  # what happens where the Dot's residual is not finite


@dataclass(frozen=True, kw_only=True)
class DashEstimate:
    """What the Dash saw and said at its last step.

    Attributes:
        x: The (conditional half of the) sample that it saw.
        z: Its guided estimate in the residual space, float32.
        t: Time of the step, one per sample, float [b].
    """

    x: Tensor
    z: Tensor
    t: Tensor


@dataclass(kw_only=True)
class Trajectory:
    """State of one run of the pipeline's loop.

    Attributes:
        scheduler_list: The scheduler's own list of times; a new one begins a new run.
        times: Its times as numbers.
        start: Index of the first step; above 0 for image-to-image.
        plan: Who answers at each step from there.
        shape: Of the sample that the denoiser is given.
        dtype: See ``shape``.
        guidance: Classifier-free guidance of the run.
        calls: Calls of the denoiser so far.
        first_of_two: Output of the first call of a step with two.
        last: The last Dash step.
        answer: What the denoiser said last, in the pipeline's own form.
    """

    scheduler_list: Any
    times: list[float]
    start: int
    plan: MorsePlan
    shape: torch.Size
    dtype: torch.dtype
    guidance: Guidance
    calls: int = 0
    first_of_two: Tensor | None = None
    last: DashEstimate | None = None
    answer: Any = None

    @property
    def finished(self) -> bool:
        """Whether every step has been made."""
        return self.calls >= (len(self.times) - self.start) * self.guidance.calls


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of the denoiser by the pipeline.

    Attributes:
        x: The sample, with both halves of guidance.
        t: The time, as the pipeline gives it.
        others: The other arguments by name.
        index: Which step of the scheduler's list it belongs to.
        part: Which call of that step it is, from 0.
    """

    x: Tensor
    t: Any
    others: dict[str, Any]
    index: int
    part: int


class MorseHook(ModelHook):
    """Decides at every call of the denoiser who answers, Dash or Dot.

    Args:
        pipe: The pipeline; its scheduler is read at every step.
        dot: Answers at Dot steps.
        plan: Which steps those are.
        guidance_scale: See ``apply_morse``.
        calls_per_step: See ``apply_morse``.
        on_nan: See ``apply_morse``.
    """

    def __init__(
        self,
        pipe: Any,
        dot: Dot,
        plan: MorsePlan,
        *,
        guidance_scale: float | None = None,
        calls_per_step: int = 1,
        on_nan: OnNaN = "error",
    ) -> None:
        super().__init__()
        self.fn_ref: Any = None  # diffusers puts the denoiser's own forward there
        self.pipe, self.plan = pipe, plan
        self.dot: Any = dot
        self.on_nan: OnNaN = on_nan
        self._guidance_scale = guidance_scale
        self._calls_per_step = calls_per_step
        self._run: Trajectory | None = None
        self._dot_is_running = False
        self.summary = RunSummary(plan)

    @property
    def in_the_middle(self) -> bool:
        """Whether a run has begun and not come to its end."""
        return self._run is not None and not self._run.finished

    def reset(self) -> None:
        """Forget the run, finished or not."""
        self._run = None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Answer a call of the denoiser; diffusers calls this instead of its forward."""
        if self._dot_is_running:  # a transformer's Dot calls the whole Dash on fewer tokens
            return self.fn_ref.original_forward(*args, **kwargs)

        # Which step of which run this is.
        others = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        others.pop("self")
        x = others.pop("sample" if "sample" in others else "hidden_states")
        t = others.pop("timestep")
        refuse_side_inputs(others)
        run, index, part = self._locate(module, x, t, others)
        call = Call(x=x, t=t, others=others, index=index, part=part)

        # The Dot answers where the plan says so, the Dash elsewhere and where the Dot fails.
        answer = None
        if index - run.start not in set(run.plan.dash_indices):
            began = clock(x.device)
            answer = self._dot_answer(run, call)
            self.summary.record("Dot", clock(x.device) - began, new_step=part == 0)
        if answer is None:
            began = clock(x.device)
            answer = self.fn_ref.original_forward(*args, **kwargs)
            self.summary.record("Dash", clock(x.device) - began, new_step=part == 0)
            self._keep_estimate(run, call, answer)
        run.calls += 1

        # Offloading is for want of memory: the Dot leaves the device to the pipeline's next part.
        is_offloaded = isinstance(getattr(module, "_hf_hook", None), CpuOffload)
        if run.finished and is_offloaded and isinstance(self.dot, nn.Module):
            self.dot.to("cpu")
        return answer

    def _locate(
        self, module: nn.Module, x: Tensor, t: Any, others: dict[str, Any]
    ) -> tuple[Trajectory, int, int]:
        """Return the run, the index of this step in the scheduler's list, and the call's number in it.

        Raises:
            StateError: If the call belongs to no run.
        """
        # Pipelines ask the scheduler for a new list in every call.
        scheduler, run = self.pipe.scheduler, self._run
        time = float(torch.as_tensor(t).flatten()[0]) * time_scale(module)
        if run is None or run.finished or run.scheduler_list is not scheduler.timesteps:
            run = self._run = self._begin_run(module, x, time, others)

        # The call has to come at the time of the step that is due, or at the first one again.
        index, part = divmod(run.calls, run.guidance.calls)
        index += run.start
        if not is_same_time(run.times[index], time):
            if is_same_time(run.times[run.start], time):
                run = self._run = self._begin_run(module, x, time, others)
                return run, run.start, 0
            raise StateError(
                f"the denoiser was called at time {time:g}, the scheduler's step {index} is at "
                f"{run.times[index]:g}; call the hook's reset() after an interrupted run"
            )
        if x.shape != run.shape or x.dtype != run.dtype:
            raise StateError(
                f"the batch changed from {list(run.shape)} {run.dtype} to {list(x.shape)} {x.dtype} "
                "in the middle of a run; finish one run before the next"
            )
        return run, index, part

    def _begin_run(
        self, module: nn.Module, x: Tensor, time: float, others: dict[str, Any]
    ) -> Trajectory:
        """Set up the state of a run whose first call comes at ``time``."""
        # Where in the scheduler's list the run begins.
        scheduler = self.pipe.scheduler
        check_scheduler(scheduler)
        times = distinct_times(scheduler)
        start = min(range(len(times)), key=lambda i: abs(times[i] - time))
        if not is_same_time(times[start], time):
            raise StateError(
                f"the denoiser was called at time {time:g}, which is not in the scheduler's list "
                f"({times[0]:g} ... {times[-1]:g}); set the timesteps before sampling"
            )
        plan = self.plan.rescaled(len(times) - start)
        self.summary = RunSummary(plan)

        # How the pipeline guides the denoiser.
        guidance = Guidance.detect(
            self.pipe, module, x, self._guidance_scale, self._calls_per_step, others
        )
        guidance.compare_with(self.dot)

        # The pipeline may have been moved, or brought here by an offloading hook, since the last run.
        follow: Callable[..., None] | None = getattr(self.dot, "follow", None)
        if follow is not None:
            follow(module, x.device)
        return Trajectory(
            scheduler_list=scheduler.timesteps,
            times=times,
            start=start,
            plan=plan,
            shape=x.shape,
            dtype=x.dtype,
            guidance=guidance,
        )

    def _keep_estimate(self, run: Trajectory, call: Call, answer: Any) -> None:
        """Store the guided estimate of a Dash step.

        Raises:
            NumericsError: If it is not finite.
        """
        out = answer[0]
        if call.part + 1 < run.guidance.calls:  # two calls a step: the conditional one comes first
            run.first_of_two = out
            return
        guided = run.guidance.combine(out, run.first_of_two)
        x = conditional_half(call.x, run.guidance)
        z = to_space(self.pipe.scheduler, guided, sample_channels(x, guided), call.index)
        self._check_finite(z, "the Dash estimate", call.index, answer[0].dtype)
        run.last = DashEstimate(x=x, z=z, t=batch_times(call.t, x))
        run.answer = answer

    def _dot_answer(self, run: Trajectory, call: Call) -> Any:
        """Answer in the Dash's place; None if the Dash has to step in after all.

        Raises:
            StateError: If there was no Dash step yet.
            NumericsError: If the residual is not finite, unless ``on_nan`` is ``dash``.
        """
        if run.last is None:
            raise StateError("a Dot step came before any Dash step; begin the plan with index 0")
        if call.part > 0:
            return run.answer

        # The residual, in the dtype of the Dot's own weights.
        last, x = run.last, conditional_half(call.x, run.guidance)
        weight = next(iter(parameters_of(self.dot)), call.x)
        inputs = (last.x, x, last.z.to(last.x.dtype))
        if weight.dtype != call.x.dtype:
            inputs = tuple(tensor.to(weight.dtype) for tensor in inputs)
        cond = run.guidance.condition(call.others)
        self._dot_is_running = True
        try:
            residual = self.dot(*inputs, last.t, batch_times(call.t, x), cond).float()
        finally:
            self._dot_is_running = False

        # Numbers that are not finite stop the run, or make the Dash step in.
        try:
            self._check_finite(residual, "the Dot's residual", call.index, weight.dtype)
        except NumericsError as error:
            if self.on_nan == "error":
                raise
            warn(f"{error}; this step runs the Dash instead")
            return None

        # What the Dash would have had to say for the scheduler to see this estimate.
        z = last.z + residual
        raw = from_space(self.pipe.scheduler, z, sample_channels(x, z), call.index)
        run.answer = run.guidance.as_answer(raw, run.answer)
        return run.answer

    def _check_finite(self, values: Tensor, what: str, index: int, dtype: torch.dtype) -> None:
        if not bool(values.isfinite().all()):
            raise NumericsError(
                f"{what} is not finite at step {index} in {dtype}; "
                "use float32 or bfloat16, or on_nan='dash'"
            )


def sample_channels(x: Tensor, z: Tensor) -> Tensor:
    """Return the channels of ``x`` that an estimate is about; inpainting UNets see further ones."""
    return x[:, : z.shape[1]] if z.ndim == 4 else x


def batch_times(t: Any, x: Tensor) -> Tensor:
    """Return the time of a step as one number per sample, float [b]."""
    return torch.as_tensor(t, device=x.device).flatten()[:1].expand(x.shape[0]).float()


def parameters_of(dot: Any) -> Any:
    """Return the parameters of a learned Dot; none for the others."""
    return dot.parameters() if isinstance(dot, nn.Module) else ()


def is_same_time(a: float, b: float) -> bool:
    """Return whether two times are equal but for rounding to bfloat16."""
    return math.isclose(a, b, rel_tol=4e-3, abs_tol=1e-3)


def time_scale(module: nn.Module) -> float:
    """Return the factor from the time that the network is given to the scheduler's."""
    return 1000.0 if type(module).__name__ == "FluxTransformer2DModel" else 1.0
