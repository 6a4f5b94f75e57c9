"""Morse onto a live diffusers pipeline and off again: no fork and no new pipeline."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers.hooks import HookRegistry
from torch import nn

from effml_common.logging import warn
from morse_diffusion.adapters.calls import denoiser_of
from morse_diffusion.adapters.hook import MorseHook, OnNaN
from morse_diffusion.adapters.run_summary import RunSummary
from morse_diffusion.adapters.schedulers import check_scheduler
from morse_diffusion.errors import StateError
from morse_diffusion.method.sampler import Dot
from morse_diffusion.method.schedule import MorsePlan

HOOK_NAME = "morse"  # in diffusers' registry of hooks


@dataclass(frozen=True)
class MorseHandle:
    """What ``apply_morse`` returns; a context manager that removes the hook at its end."""

    pipe: Any
    hook: MorseHook

    def summary(self) -> RunSummary:
        """Return what the last run did."""
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
    on_nan: OnNaN = "error",
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

    >>> from diffusers import DDIMScheduler, UNet2DModel
    >>> from morse_diffusion.adapters.pixels import PixelPipeline
    >>> from morse_diffusion.method.sampler import ZeroDot
    >>> unet = UNet2DModel(sample_size=16, block_out_channels=(8, 8), norm_num_groups=4,
    ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    >>> pipe = PixelPipeline(unet, DDIMScheduler(clip_sample=False))
    >>> with apply_morse(pipe, ZeroDot(), MorsePlan.uniform(2, 3)) as morse:
    ...     images = pipe(batch_size=1, num_inference_steps=5)
    >>> morse.summary().to_json()["pattern"], tuple(images.shape)
    ('DdDdd', (1, 3, 16, 16))
    """
    # Refuse what Morse would not work on.
    denoiser = denoiser_of(pipe)
    check_scheduler(pipe.scheduler)
    hooks = getattr(getattr(denoiser, "_diffusers_hook", None), "hooks", {})
    if HOOK_NAME in hooks:
        raise StateError("Morse is already on this denoiser; call remove_morse(pipe) first")
    if not allow_caches:
        refuse_caches(denoiser)

    # A learned Dot checks that it belongs to this pipeline, and moves beside its Dash.
    prepare: Callable[..., None] | None = getattr(dot, "prepare", None)
    if prepare is not None:
        prepare(denoiser, pipe.scheduler, strict=strict)

    hook = MorseHook(
        pipe,
        dot,
        plan,
        guidance_scale=guidance_scale,
        calls_per_step=calls_per_step,
        on_nan=on_nan,
    )
    with beneath_offloading(denoiser):
        HookRegistry.check_if_exists_or_initialize(denoiser).register_hook(hook, HOOK_NAME)
    return MorseHandle(pipe, hook)


def remove_morse(pipe: Any, *, force: bool = False) -> None:
    """Take Morse off; the denoiser is then what it was.

    Args:
        pipe: The pipeline.
        force: Also in the middle of a run.

    Raises:
        StateError: In the middle of a run, unless ``force``.

    >>> from diffusers import DDIMScheduler, UNet2DModel
    >>> from morse_diffusion.adapters.pixels import PixelPipeline
    >>> from morse_diffusion.method.sampler import ZeroDot
    >>> unet = UNet2DModel(sample_size=16, block_out_channels=(8, 8), norm_num_groups=4,
    ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    >>> pipe = PixelPipeline(unet, DDIMScheduler(clip_sample=False))
    >>> handle = apply_morse(pipe, ZeroDot(), MorsePlan.uniform(2, 3))
    >>> remove_morse(pipe)
    >>> "forward" in vars(unet)
    False
    """
    # Whether there is anything to remove, and now.
    denoiser = denoiser_of(pipe)
    registry = getattr(denoiser, "_diffusers_hook", None)
    hook = registry.get_hook(HOOK_NAME) if registry is not None else None
    if registry is None or hook is None:
        warn("there is no Morse to remove from this denoiser")
        return
    if hook.in_the_middle and not force:
        raise StateError(
            "Morse cannot be removed in the middle of a run; wait for its end, "
            "or use remove_morse(pipe, force=True) after one that was broken off"
        )

    # The registry puts the bound method back as an attribute; the class has it anyway.
    with beneath_offloading(denoiser):
        registry.remove_hook(HOOK_NAME)
    if not registry.hooks:
        del denoiser._diffusers_hook
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
    """Return whether someone else's function stands in for the forward of a module.

    DeepCache leaves the class's own method behind as an attribute, and accelerate's offloading hooks
    move weights only; neither counts.
    """
    forward = vars(module).get("forward")
    is_own = getattr(forward, "__func__", None) is type(module).forward
    return forward is not None and not is_own and not hasattr(module, "_hf_hook")
