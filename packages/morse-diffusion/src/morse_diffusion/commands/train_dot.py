"""The ``train-dot`` command: a Dot for a user's own pipeline, from a folder of images."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effml_common.device import resolve_device
from effml_common.files import atomic_write
from effml_common.folders import check_out_folder, run_folder
from effml_common.logging import say, warn
from effml_common.parsing import dump_config
from effml_common.report import Report, ReportBuilder, Row
from morse_diffusion.adapters.calls import denoiser_of
from morse_diffusion.adapters.dot import MorseDot
from morse_diffusion.adapters.estimate import GuidedDash
from morse_diffusion.adapters.loading import load_pipeline
from morse_diffusion.adapters.schedulers import check_scheduler, prediction_of, process_of
from morse_diffusion.config import TrainDotConfig
from morse_diffusion.method.jumps import Process
from morse_diffusion.training.accelerator import accelerator_on
from morse_diffusion.training.data import EncodedData, encode_folder
from morse_diffusion.training.trainer import FAILING_SHARE, DotTrainer, LoopConfig


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """What the user gave, read: the network, its noise schedule and the encoded images."""

    device: torch.device
    denoiser: nn.Module
    encoded: EncodedData
    process: Process
    prediction: str
    accelerator: Any


@dataclass(frozen=True, kw_only=True)
class PreparedTraining:
    """A Dot that can be trained, with what it is trained on."""

    inputs: TrainingInputs
    dot: MorseDot
    trainer: DotTrainer


def train_dot(config: TrainDotConfig) -> Report:
    """Train a Dot and write it; the folder loads with ``MorseDot.from_pretrained``.

    Raises:
        InputError: If the pipeline, the data or the out folder cannot be used.
        NonFiniteError: If the loss becomes NaN or infinite.
    """
    builder = ReportBuilder("morse-diffusion", ("diffusers", "accelerate"))
    settings, is_resumed = config.settings_of_result(), config.resume == "auto"
    out = run_folder(config.out, "train-dot")
    check_out_folder(out, ["config.json", "run/checkpoints"], resume=is_resumed)

    # Everything that can be refused is refused before a file of an earlier run changes.
    inputs = read_inputs(config, out / "run")
    training = prepare_training(config, inputs)
    if is_resumed:
        training.trainer.restore(out / "run", settings)

    if inputs.accelerator.is_main_process:
        (out / "run").mkdir(parents=True, exist_ok=True)
        atomic_write(out / "run" / "config.yaml", dump_config(config))
    unexplained = training.trainer.run(out / "run", settings=settings)
    return write_results(config, out, training, unexplained, builder)


def read_inputs(config: TrainDotConfig, run: Path) -> TrainingInputs:
    """Load the pipeline and encode the images, with latents kept in ``run/cache``.

    Raises:
        InputError: If the pipeline or the data cannot be used.
    """
    # The pipeline, and what its scheduler says of the noise.
    device = resolve_device(config.device)
    pipe = load_pipeline(config.pipe, device)
    check_scheduler(pipe.scheduler)
    process, prediction = process_of(pipe.scheduler), prediction_of(pipe.scheduler)

    # The text encoders and the decoder have done their work then, and go with the pipeline.
    accelerator = accelerator_on(device, config.precision)
    encoded = encode_folder(pipe, config.data, config.guidance, run / "cache")
    return TrainingInputs(
        device=device,
        denoiser=denoiser_of(pipe),
        encoded=encoded,
        process=process,
        prediction=prediction,
        accelerator=accelerator,
    )


def prepare_training(config: TrainDotConfig, inputs: TrainingInputs) -> PreparedTraining:
    """Build the Dot and its trainer.

    Raises:
        InputError: If the Dot does not fit the images, or the images do not fill a batch.
    """
    # The Dot, from the user's seed.
    encoded, denoiser = inputs.encoded, inputs.denoiser
    torch.manual_seed(config.seed)
    dot = MorseDot.build(
        denoiser,
        m=config.m,
        channels=config.channels,
        layers=config.layers,
        lora_rank=config.rank,
        guidance=encoded.guidance,
    )
    dot.check_sides(encoded.data.clean.shape[-2:])
    dot.gradient_checkpointing = config.checkpointing

    # The loop has the user's settings, apart from guidance, which only some pipelines have.
    names = [f.name for f in fields(LoopConfig) if f.name != "guidance"]
    loop = LoopConfig(**{name: getattr(config, name) for name in names}, guidance=encoded.guidance)
    dash = GuidedDash(denoiser, inputs.process, inputs.prediction, encoded.negative)
    trainer = DotTrainer(dash, dot, inputs.process, encoded.data, loop, inputs.accelerator)

    own, shared = dot.own_parameters(), sum(p.numel() for p in denoiser.parameters())
    say(f"Dot: {own / 1e6:.2f}M weights of its own beside {shared / 1e6:.2f}M shared or idle")
    return PreparedTraining(inputs=inputs, dot=dot, trainer=trainer)


def write_results(
    config: TrainDotConfig,
    out: Path,
    training: PreparedTraining,
    unexplained: float,
    builder: ReportBuilder,
) -> Report:
    """Write the Dot and the report of its training.

    Args:
        config: Settings of the run.
        out: Folder of the Dot.
        training: What was trained.
        unexplained: Share of the squared residual that the Dot does not predict.
        builder: Of the report; started with the command.
    """
    # The Dot, with what it was trained on.
    inputs, dot = training.inputs, training.dot
    if inputs.accelerator.is_main_process:
        record = {
            "family": inputs.process.family,
            "prediction": inputs.prediction,
            "steps_of_process": inputs.process.steps,
            "space": inputs.process.space,
            "updates": config.steps,
            "batch": config.batch,
            "gap_max": config.gap_max,
            "rollout": config.rollout,
            "sides": list(inputs.encoded.data.clean.shape[-2:]),
            "residual_left": unexplained,
        }
        dot.save_pretrained(out, record)

    # The report.
    metrics = {"residual left": [unexplained], "weights": [float(dot.own_parameters())]}
    report = builder.write(
        out / "run",
        [Row("Dot", f"{config.steps} updates of {config.batch}", metrics)],
        seeds=[config.seed],
        notes=["residual left: squared error over that of repeating the last Dash estimate"],
        files=["config.json", "dot_blocks.safetensors", "adapter_model.safetensors"],
        device=inputs.device,
    )
    if unexplained > FAILING_SHARE:
        warn(f"{unexplained:.0%} of the residual is left: this Dot is hardly better than none")
    say(f"Dot: {out}")
    return report
