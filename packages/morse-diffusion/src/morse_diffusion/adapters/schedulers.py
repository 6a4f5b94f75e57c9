"""Which diffusers schedulers Morse works on, and what their networks' outputs mean at each step."""

from typing import Any

import torch
from torch import Tensor

from effml_common.logging import warn
from morse_diffusion.errors import UnsupportedSchedulerError
from morse_diffusion.method.jumps import Family, Process, space_coefficients
from morse_diffusion.method.schedule import MorsePlan

# One model call per distinct time. With a Dot that returns zero, the first group gives plain sampling
# with the Dash steps (multistep solvers: at order 1), the others their noisy or mixed counterpart.
SUPPORTED: dict[str, Family] = {
    "DDIMScheduler": "vp",
    "DPMSolverMultistepScheduler": "vp",
    "UniPCMultistepScheduler": "vp",
    "DEISMultistepScheduler": "vp",
    "EulerDiscreteScheduler": "vp",
    "EDMEulerScheduler": "edm",
    "FlowMatchEulerDiscreteScheduler": "flow",
    "DDPMScheduler": "ddpm",
    "LCMScheduler": "lcm",
    "EulerAncestralDiscreteScheduler": "ddpm",
    "TCDScheduler": "ddpm",
}
UNTESTED: dict[str, Family] = {
    "LMSDiscreteScheduler": "vp",
    "SASolverScheduler": "vp",
    "DPMSolverSinglestepScheduler": "vp",
    "IPNDMScheduler": "vp",
    "FlowMatchLCMScheduler": "flow",
}
DIVIDING = ("DDIMScheduler", "DDPMScheduler")  # walk in steps of T // n, whatever their list says
ADVICE = (
    "swap it, for example DPMSolverMultistepScheduler.from_config(pipe.scheduler.config); "
    f"supported are {', '.join(SUPPORTED)}"
)


def check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler that calls the network twice per time; warn about an untested one.

    Raises:
        UnsupportedSchedulerError: With the list of those that work.
    """
    name, order = type(scheduler).__name__, getattr(scheduler, "order", 1)
    if order != 1:
        raise UnsupportedSchedulerError(f"{name} calls the denoiser {order} times a step; {ADVICE}")
    if name == "PNDMScheduler":
        raise UnsupportedSchedulerError(f"{name} repeats one of its times; {ADVICE}")
    if name not in SUPPORTED:
        warn(f"{name} has not been tested with Morse; tested are {', '.join(SUPPORTED)}")


def distinct_times(scheduler: Any) -> list[float]:
    """Return the scheduler's times as numbers.

    Raises:
        UnsupportedSchedulerError: If one of them comes twice, or there are none.
    """
    times = [float(t) for t in scheduler.timesteps]
    if len(set(times)) != len(times) or not times:
        name = type(scheduler).__name__
        raise UnsupportedSchedulerError(f"{name} lists a time twice, or none; {ADVICE}")
    return times


def family_of(scheduler: Any) -> Family:
    """Return the jump family that a Dot for this scheduler is trained with."""
    name = type(scheduler).__name__
    family = SUPPORTED.get(name) or UNTESTED.get(name, "vp")
    config = scheduler.config
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        return "flow"
    is_stochastic = "sde" in str(config.get("algorithm_type", ""))
    return "ddpm" if family == "vp" and is_stochastic else family


def prediction_of(scheduler: Any) -> str:
    """Return what the network predicts, as one of ``jumps.PREDICTIONS``."""
    name = scheduler.config.get("prediction_type") or "epsilon"
    if family_of(scheduler) == "flow":
        return "flow_prediction"
    return "sample" if name == "original_sample" else name


def process_of(scheduler: Any) -> Process:
    """Return the noise schedule and jump that training uses for this scheduler.

    Raises:
        UnsupportedSchedulerError: If it keeps no noise levels.
    """
    config, family = scheduler.config, family_of(scheduler)
    # Dynamic thresholding depends on the whole sample; only the plain clip has a closed form here.
    clip = config.get("clip_sample_range", 1.0) if config.get("clip_sample") else None
    levels = getattr(scheduler, "alphas_cumprod", None)
    if family in ("vp", "ddpm", "lcm") and levels is None:
        raise UnsupportedSchedulerError(
            f"{type(scheduler).__name__} keeps no alphas_cumprod to train on; {ADVICE}"
        )

    return Process(
        family=family,
        levels=torch.empty(0) if levels is None else levels.detach().double().cpu(),
        steps=int(config.get("num_train_timesteps") or 1000),
        sigma_range=(config.get("sigma_min") or 0.002, config.get("sigma_max") or 80.0),
        clip=clip,
    )


def coefficients(scheduler: Any, index: int) -> tuple[float, float]:
    """Return (a, b) of z = a x + b out at one step of the scheduler's list (``space_coefficients``)."""
    prediction, family = prediction_of(scheduler), family_of(scheduler)
    if family == "edm":
        return space_coefficients(prediction, 1.0, float(scheduler.sigmas[index]), "edm")
    if prediction != "v_prediction":
        return space_coefficients(prediction, 1.0, 0.0)

    # Velocity: alpha and sigma of this step, from the list of sigmas or from the noise levels.
    if getattr(scheduler, "sigmas", None) is not None:
        sigma = float(scheduler.sigmas[index])
        alpha = 1 / (1 + sigma**2) ** 0.5
        return space_coefficients(prediction, alpha, sigma * alpha)
    level = float(scheduler.alphas_cumprod[int(scheduler.timesteps[index])])
    return space_coefficients(prediction, level**0.5, (1 - level) ** 0.5)


def to_space(scheduler: Any, out: Tensor, x: Tensor, index: int) -> Tensor:
    """Return a raw network output as the estimate z, float32; ``x`` is what the network saw."""
    a, b = coefficients(scheduler, index)
    return a * x.float() + b * out.float() if a else b * out.float()


def from_space(scheduler: Any, z: Tensor, x: Tensor, index: int) -> Tensor:
    """Return the raw output that stands for z at this step, float32."""
    a, b = coefficients(scheduler, index)
    return (z - a * x.float()) / b if a else z / b


def fit_plan(plan: MorsePlan, scheduler: Any) -> MorsePlan:
    """Return the plan with a step count that the scheduler walks without drifting.

    DDIM and DDPM compute the next time as t - T // n instead of reading their list, so n must divide T;
    other schedulers take any n.
    """
    if type(scheduler).__name__ not in DIVIDING:
        return plan
    train_steps = int(scheduler.config.num_train_timesteps)
    n_total = max(n for n in range(1, plan.n_total + 1) if train_steps % n == 0)
    return plan.rescaled(n_total)
