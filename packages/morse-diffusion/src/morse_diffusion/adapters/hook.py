"""Morse on a live diffusers pipeline: a hook on the denoiser, no fork and no new pipeline.

The pipeline runs its usual loop. At a Dash step the hook lets the denoiser run and keeps what it saw
and said; at a Dot step it answers in the denoiser's place. Under classifier-free guidance the answer is
the guided estimate in both halves of the batch: u + w (c - u) is then exactly that estimate.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate.hooks import CpuOffload
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from effml_common.logging import warn
from morse_diffusion.adapters.calls import Guidance, denoiser_of, half, refuse_side_inputs
from morse_diffusion.adapters.run_summary import RunSummary, clock
from morse_diffusion.adapters.schedulers import check_scheduler, check_times, from_space, to_space
from morse_diffusion.errors import NumericsError, StateError
from morse_diffusion.method.sampler import Dot
from morse_diffusion.method.schedule import MorsePlan

NAME = "morse"


@dataclass(kw_only=True)
class Trajectory:
    """State of one run of the pipeline's loop."""

    scheduler_list: Any
    times: list[float]
    start: int
    plan: MorsePlan
    shape: torch.Size
    dtype: torch.dtype
    guidance: Guidance
    calls: int = 0
    first_of_two: Tensor | None = None
    last: tuple[Tensor, Tensor, Tensor] | None = None
    answer: Any = None
    kinds: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether every step has been made."""
        return self.calls >= (len(self.times) - self.start) * self.guidance.calls


class MorseHook(ModelHook):
    """Decides at every call of the denoiser who answers, Dash or Dot."""

    def __init__(
        self,
        pipe: Any,
        dot: Dot,
        plan: MorsePlan,
        *,
        guidance_scale: float | None = None,
        calls_per_step: int = 1,
        on_nan: Literal["error", "dash"] = "error",
    ) -> None:
        super().__init__()
        self.fn_ref: Any = None  # diffusers puts the denoiser's own forward there
        self.pipe, self.plan = pipe, plan
        self.dot: Any = dot
        self.on_nan: Literal["error", "dash"] = on_nan
        self._guidance = guidance_scale
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
        """Called by diffusers instead of the denoiser's forward."""
        if self._dot_is_running:  # a transformer's Dot calls the whole Dash on fewer tokens
            return self.fn_ref.original_forward(*args, **kwargs)
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        bound.pop("self")
        name = "sample" if "sample" in bound else "hidden_states"
        x, t = bound.pop(name), bound.pop("timestep")
        refuse_side_inputs(bound)
        run, index, call = self._locate(module, x, t, bound)
        step, kind = index - run.start, "Dash"
        if step not in set(run.plan.dash_indices):
            kind = "Dot"
        answer = None
        if kind == "Dot":
            began = clock(x.device)
            answer = self._dot_step(run, index, call, x, t, bound)
            self.summary.record("Dot", clock(x.device) - began, new_step=call == 0)
        if answer is None:
            began = clock(x.device)
            answer = self.fn_ref.original_forward(*args, **kwargs)
            self.summary.record("Dash", clock(x.device) - began, new_step=call == 0)
            self._keep(run, index, call, x, t, answer)
        run.calls += 1

        # Offloading is for want of memory: the Dot leaves the device to the pipeline's next part.
        offloaded = isinstance(getattr(module, "_hf_hook", None), CpuOffload)
        if run.finished and offloaded and isinstance(self.dot, nn.Module):
            self.dot.to("cpu")
        return answer

    def _locate(
        self, module: nn.Module, x: Tensor, t: Any, bound: dict[str, Any]
    ) -> tuple[Trajectory, int, int]:
        """The run, the index of this step in the scheduler's list, and the call within the step."""
        scheduler, run = self.pipe.scheduler, self._run
        value = float(torch.as_tensor(t).flatten()[0]) * time_scale(module)
        # Pipelines ask the scheduler for a new list in every call.
        if run is None or run.finished or run.scheduler_list is not scheduler.timesteps:
            run = self._run = self._begin(module, x, value, bound)
        index, call = divmod(run.calls, run.guidance.calls)
        index += run.start
        if not close(run.times[index], value):
            if close(run.times[run.start], value):  # the same list from its start again
                run = self._run = self._begin(module, x, value, bound)
                return run, run.start, 0
            raise StateError(
                f"the denoiser was called at time {value:g}, the scheduler's step {index} is at "
                f"{run.times[index]:g}; call the hook's reset() after an interrupted run"
            )
        if x.shape != run.shape or x.dtype != run.dtype:
            raise StateError(
                f"the batch changed from {list(run.shape)} {run.dtype} to {list(x.shape)} {x.dtype} "
                "in the middle of a run; finish one run before the next"
            )
        return run, index, call

    def _begin(
        self, module: nn.Module, x: Tensor, value: float, bound: dict[str, Any]
    ) -> Trajectory:
        scheduler = self.pipe.scheduler
        check_scheduler(scheduler)
        times = check_times(scheduler)
        start = min(range(len(times)), key=lambda i: abs(times[i] - value))
        if not close(times[start], value):
            raise StateError(
                f"the denoiser was called at time {value:g}, which is not in the scheduler's list "
                f"({times[0]:g} ... {times[-1]:g}); set the timesteps before sampling"
            )
        plan = self.plan.rescaled(len(times) - start)
        self.summary = RunSummary(plan)
        guidance = Guidance.of(self.pipe, module, x, self._guidance, self._calls_per_step, bound)
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

    def _keep(self, run: Trajectory, index: int, call: int, x: Tensor, t: Any, answer: Any) -> None:
        """Store the guided estimate of a Dash step."""
        out = answer[0]
        if call + 1 < run.guidance.calls:  # two calls a step: the conditional one comes first
            run.first_of_two = out
            return
        guided = run.guidance.combine(out, run.first_of_two)
        seen = half(x, run.guidance)
        channels = guided.shape[1] if guided.ndim == 4 else None
        z = to_space(self.pipe.scheduler, guided, seen[:, :channels] if channels else seen, index)
        self._check(z, "the Dash estimate", index, answer[0].dtype)
        run.last = (seen, z, batch_times(t, seen))
        run.answer = answer

    def _dot_step(
        self, run: Trajectory, index: int, call: int, x: Tensor, t: Any, bound: dict[str, Any]
    ) -> Any:
        """Answer in the Dash's place; None if the Dash has to step in after all."""
        if run.last is None:
            raise StateError("a Dot step came before any Dash step; begin the plan with index 0")
        if call > 0:
            return run.answer
        x_s, z_s, t_s = run.last
        seen, weight = half(x, run.guidance), next(iter(parameters_of(self.dot)), x)
        cond = run.guidance.condition(bound)
        self._dot_is_running = True
        try:
            inputs = (x_s, seen, z_s.to(x_s.dtype))
            if weight.dtype != x.dtype:
                inputs = tuple(tensor.to(weight.dtype) for tensor in inputs)
            residual = self.dot(*inputs, t_s, batch_times(t, seen), cond).float()
        finally:
            self._dot_is_running = False
        try:
            self._check(residual, "the Dot's residual", index, weight.dtype)
        except NumericsError as error:
            if self.on_nan == "error":
                raise
            warn(f"{error}; this step runs the Dash instead")
            return None
        z = z_s + residual
        channels = z.shape[1] if z.ndim == 4 else None
        latent = seen[:, :channels] if channels else seen
        raw = from_space(self.pipe.scheduler, z, latent, index)
        run.answer = run.guidance.as_answer(raw, run.answer)
        return run.answer

    def _check(self, values: Tensor, what: str, index: int, dtype: torch.dtype) -> None:
        if not bool(values.isfinite().all()):
            raise NumericsError(
                f"{what} is not finite at step {index} in {dtype}; "
                "use float32 or bfloat16, or on_nan='dash'"
            )


@dataclass(frozen=True)
class MorseHandle:
    """What ``apply_morse`` returns; a context manager that removes the hook at its end."""

    pipe: Any
    hook: MorseHook

    def summary(self) -> RunSummary:
        """What the last run did."""
        return self.hook.summary

    def remove(self) -> None:
        """Take the hook off, also after a run that was broken off."""
        remove_morse(self.pipe, force=True)

    def __enter__(self) -> "MorseHandle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def apply_morse(
    pipe: Any,
    dot: Dot,
    plan: MorsePlan,
    *,
    guidance_scale: float | None = None,
    calls_per_step: int = 1,
    on_nan: Literal["error", "dash"] = "error",
    strict: bool = True,
    allow_caches: bool = False,
) -> MorseHandle:
    """Put Morse on a pipeline's denoiser, in place.

    Args:
        pipe: Any diffusers pipeline with a ``unet`` or ``transformer`` and a ``scheduler``.
        dot: ``MorseDot``, ``ZeroDot`` or ``ExtrapolationDot``.
        plan: Steps; rescaled when the pipeline makes fewer, as image-to-image does.
        guidance_scale: For pipelines that keep their scale in a local variable (DiT, Flux).
        calls_per_step: 2 where guidance is a second call, conditional first (Flux's true CFG).
        on_nan: ``dash`` runs the Dash where the Dot's residual is not finite.
        strict: Refuse a Dot that was trained for another Dash or scheduler; else only warn.
        allow_caches: Do not refuse a denoiser that another accelerator has patched.

    Returns:
        Handle with ``remove()`` and ``summary()``; also a context manager.

    Raises:
        StateError: If Morse, or an accelerator that reuses features, is on already.
        UnsupportedSchedulerError, DotMismatchError: As their names say.
    """
    denoiser = denoiser_of(pipe)
    check_scheduler(pipe.scheduler)
    hooks = getattr(getattr(denoiser, "_diffusers_hook", None), "hooks", {})
    if NAME in hooks:
        raise StateError("Morse is already on this denoiser; call remove_morse(pipe) first")
    if not allow_caches:
        refuse_caches(denoiser)
    prepare: Callable[..., None] | None = getattr(dot, "prepare", None)
    if prepare is not None:
        prepare(denoiser, pipe.scheduler, strict=strict)
    options: dict[str, Any] = {"guidance_scale": guidance_scale, "on_nan": on_nan}
    hook = MorseHook(pipe, dot, plan, calls_per_step=calls_per_step, **options)
    with beneath_offloading(denoiser):
        HookRegistry.check_if_exists_or_initialize(denoiser).register_hook(hook, NAME)
    return MorseHandle(pipe, hook)


def remove_morse(pipe: Any, *, force: bool = False) -> None:
    """Take Morse off; the denoiser is then what it was.

    Raises:
        StateError: In the middle of a run, unless ``force``.
    """
    denoiser = denoiser_of(pipe)
    registry = getattr(denoiser, "_diffusers_hook", None)
    hook = registry.get_hook(NAME) if registry is not None else None
    if registry is None or hook is None:
        warn("there is no Morse to remove from this denoiser")
        return
    if hook.in_the_middle and not force:
        raise StateError(
            "Morse cannot be removed in the middle of a run; wait for its end, "
            "or use remove_morse(pipe, force=True) after one that was broken off"
        )
    with beneath_offloading(denoiser):
        registry.remove_hook(NAME)
    if not registry.hooks:
        del denoiser._diffusers_hook
        # The registry puts the bound method back as an attribute; the class has it anyway.
        forward = vars(denoiser).get("forward")
        if getattr(forward, "__func__", None) is type(denoiser).forward:
            del denoiser.forward


@contextmanager
def beneath_offloading(denoiser: Any) -> Iterator[None]:
    """Change a denoiser's forward below accelerate's offloading hook, where there is one.

    Offloading pipelines take their hook off and put it on again at the end of every call; what stood
    above it would be lost. Below it, Dash and Dot find their inputs on the device that they run on.
    """
    if not hasattr(denoiser, "_old_forward"):
        yield
        return
    offloading, denoiser.forward = denoiser.forward, denoiser._old_forward
    try:
        yield
    finally:
        denoiser._old_forward, denoiser.forward = denoiser.forward, offloading


def refuse_caches(denoiser: nn.Module) -> None:
    """Refuse a denoiser whose blocks another accelerator skips or replays.

    Raises:
        StateError: If one is found.
    """
    modules = list(denoiser.modules())
    hooked = [m for m in modules if getattr(getattr(m, "_diffusers_hook", None), "hooks", {})]
    patched = [m for m in modules if is_patched(m)]
    if hooked or patched or getattr(denoiser, "is_cache_enabled", False):
        raise StateError(
            "another accelerator (DeepCache, enable_cache, a diffusers hook) is on this denoiser; "
            "disable it, or pass allow_caches=True if it reuses no features between steps"
        )


def is_patched(module: nn.Module) -> bool:
    """Whether someone else's function stands in for the forward of a module.

    DeepCache leaves the class's own method behind as an attribute, and accelerate's offloading hooks
    move weights only; neither counts.
    """
    forward = vars(module).get("forward")
    own = getattr(forward, "__func__", None) is type(module).forward
    return forward is not None and not own and not hasattr(module, "_hf_hook")


def batch_times(t: Any, x: Tensor) -> Tensor:
    """Time of a step as one number per sample."""
    return torch.as_tensor(t, device=x.device).flatten()[:1].expand(x.shape[0]).float()


def parameters_of(dot: Any) -> Any:
    """Parameters of a learned Dot; none for the others."""
    return dot.parameters() if isinstance(dot, nn.Module) else ()


def close(a: float, b: float) -> bool:
    """Equal but for the rounding of a time to bfloat16."""
    return math.isclose(a, b, rel_tol=4e-3, abs_tol=1e-3)


def time_scale(module: nn.Module) -> float:
    """Factor from the time that the network is given to the scheduler's."""
    return 1000.0 if type(module).__name__ == "FluxTransformer2DModel" else 1.0
