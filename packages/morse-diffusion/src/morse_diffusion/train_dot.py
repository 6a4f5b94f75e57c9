"""The ``train-dot`` command: a Dot for a user's own pipeline, from a folder of images."""

import dataclasses
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from effml_common.cli import dump_config
from effml_common.device import device_name, resolve_device
from effml_common.errors import ConfigError
from effml_common.files import atomic_write
from effml_common.logging import say, warn
from effml_common.report import Report, Row, environment, write_report
from morse_diffusion.adapters.calls import denoiser_of
from morse_diffusion.adapters.dot import MorseDot, check_sides
from morse_diffusion.adapters.estimate import GuidedDash
from morse_diffusion.adapters.images import training_data
from morse_diffusion.adapters.loading import load_pipeline
from morse_diffusion.adapters.schedulers import check_scheduler, prediction_of, process_of
from morse_diffusion.config import TrainDotConfig
from morse_diffusion.trainer import FAILING, DotTrainer, LoopConfig, accelerator_on


def train_dot(config: TrainDotConfig) -> Report:
    """Train a Dot and write it; the folder loads with ``MorseDot.from_pretrained``.

    Raises:
        InputError: If the pipeline, the data or the out folder cannot be used.
        NonFiniteError: If the loss becomes NaN or infinite.
    """
    started = time.monotonic()
    out = Path(config.out or time.strftime("runs/train-dot-%Y%m%d-%H%M%S"))
    if (out / "config.json").exists() and config.resume == "never":
        raise ConfigError(f"{out} holds a Dot already; choose another --out, or --resume auto")
    device = resolve_device(config.device)
    pipe = load_pipeline(config.pipe, device)
    check_scheduler(pipe.scheduler)
    accelerator, run = accelerator_on(device, config.precision), out / "run"
    data, negative, guidance = training_data(pipe, config.data, config.guidance, run / "cache")
    process, prediction = process_of(pipe.scheduler), prediction_of(pipe.scheduler)
    denoiser = denoiser_of(pipe)
    del pipe  # its text encoders and decoder have done their work
    torch.manual_seed(config.seed)
    dot = MorseDot.build(
        denoiser,
        m=config.m,
        channels=config.channels,
        layers=config.layers,
        lora_rank=config.rank,
        guidance=guidance,
    )
    check_sides(denoiser, config.m, data.clean.shape[-2:])
    dot.gradient_checkpointing = config.checkpointing
    loop = LoopConfig(
        **{
            f.name: getattr(config, f.name)
            for f in dataclasses.fields(LoopConfig)
            if f.name != "guidance"
        },
        guidance=guidance,
    )
    dash = GuidedDash(denoiser, process, prediction, negative)
    trainer = DotTrainer(dash, dot, process, data, loop, accelerator)
    own, whole = dot.own_parameters(), sum(p.numel() for p in denoiser.parameters())
    say(f"Dot: {own / 1e6:.2f}M weights of its own beside {whole / 1e6:.2f}M shared or idle")
    if accelerator.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        atomic_write(run / "config.yaml", dump_config(config))
    left = trainer.run(
        run, resume=config.resume == "auto", settings={"pipe": Path(config.pipe).name}
    )
    training = {
        "family": process.family,
        "prediction": prediction,
        "steps_of_process": process.steps,
        "space": process.space,
        "updates": config.steps,
        "batch": config.batch,
        "gap_max": config.gap_max,
        "rollout": config.rollout,
        "sides": list(data.clean.shape[-2:]),
        "residual_left": left,
    }
    report = Report(
        package="morse-diffusion",
        version=version("morse-diffusion"),
        command=sys.argv,
        seeds=[config.seed],
        seconds=time.monotonic() - started,
        rows=[
            Row(
                "Dot",
                f"{config.steps} updates of {config.batch}",
                {"residual left": [left], "weights": [float(own)]},
            )
        ],
        notes=["residual left: squared error over that of repeating the last Dash estimate"],
        files=["config.json", "dot_blocks.safetensors", "adapter_model.safetensors"],
        environment=environment(("diffusers", "accelerate"), device_name(device)),
    )
    if accelerator.is_main_process:
        dot.save_pretrained(str(out), training)
        write_report(report, run)
    if left > FAILING:
        warn(f"{left:.0%} of the residual is left: this Dot is hardly better than none")
    say(f"Dot: {out}")
    return report
