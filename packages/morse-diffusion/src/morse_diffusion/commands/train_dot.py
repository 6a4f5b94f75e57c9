"""The ``train-dot`` command: a Dot for a user's own pipeline, from a folder of images."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effml_common.cli import dump_config
from effml_common.device import resolve_device
from effml_common.files import atomic_write
from effml_common.folders import run_folder
from effml_common.logging import say, warn
from effml_common.report import Report, ReportBuilder, Row
from effml_common.resume import check_out_folder
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

# Settings that may differ when a run is resumed: they change where it computes, what it says and when
# it saves, but not the Dot that comes out. The data may lie elsewhere.
FREE_SETTINGS = (
    "data", "out", "device", "checkpointing", "save_every", "log_every", "resume",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """What the user gave, read: the network, its noise schedule and the encoded images."""

    device: torch.device
    denoiser: nn.Module
    encoded: EncodedData
    process: Process
    prediction: str
    accelerator: Any


def train_dot(config: TrainDotConfig) -> Report:
    """Train a Dot and write it; the folder loads with ``MorseDot.from_pretrained``.

    Raises:
        InputError: If the pipeline, the data or the out folder cannot be used.
        NonFiniteError: If the loss becomes NaN or infinite.
    """
    builder = ReportBuilder("morse-diffusion", ("diffusers", "accelerate"))
    out = run_folder(config.out, "train-dot")
    is_resumed = config.resume == "auto"
    check_out_folder(out, ["config.json"], resume=is_resumed)

    # Everything that can be refused is refused before the run folder changes.
    inputs = read_inputs(config, out / "run")
    dot, trainer = prepare_training(config, inputs)
    settings = settings_of_result(config)
    if is_resumed:
        trainer.restore(out / "run", settings)

    if trainer.accelerator.is_main_process:
        (out / "run").mkdir(parents=True, exist_ok=True)
        atomic_write(out / "run" / "config.yaml", dump_config(config))
    unexplained = trainer.run(out / "run", settings=settings)
    return write_results(config, out, inputs, dot, unexplained, builder)


def settings_of_result(config: TrainDotConfig) -> dict[str, Any]:
    """Return the settings that the trained Dot depends on, which a resumed run must share.

    A run with a constant learning rate and one kind of pair may be resumed with more steps: it then
    gives what an uninterrupted run of as many steps gives.
    """
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE_SETTINGS}
    settings["pipe"] = Path(config.pipe).name  # no path of the user's machine is kept
    if not config.cosine and config.rollout == 0:
        del settings["steps"]
    return settings


def read_inputs(config: TrainDotConfig, run: Path) -> TrainingInputs:
    """Load the pipeline and encode the images, with latents kept in ``run/cache``.

    Raises:
        InputError: If the pipeline or the data cannot be used.
    """
    device = resolve_device(config.device)
    pipe = load_pipeline(config.pipe, device)
    check_scheduler(pipe.scheduler)
    accelerator = accelerator_on(device, config.precision)
    encoded = encode_folder(pipe, config.data, config.guidance, run / "cache")

    # The text encoders and the decoder have done their work, and go with the pipeline.
    return TrainingInputs(
        device=device,
        denoiser=denoiser_of(pipe),
        encoded=encoded,
        process=process_of(pipe.scheduler),
        prediction=prediction_of(pipe.scheduler),
        accelerator=accelerator,
    )


def prepare_training(config: TrainDotConfig, inputs: TrainingInputs) -> tuple[MorseDot, DotTrainer]:
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
    names = [f.name for f in dataclasses.fields(LoopConfig) if f.name != "guidance"]
    loop = LoopConfig(**{name: getattr(config, name) for name in names}, guidance=encoded.guidance)
    dash = GuidedDash(denoiser, inputs.process, inputs.prediction, encoded.negative)
    trainer = DotTrainer(dash, dot, inputs.process, encoded.data, loop, inputs.accelerator)

    own, shared = dot.own_parameters(), sum(p.numel() for p in denoiser.parameters())
    say(f"Dot: {own / 1e6:.2f}M weights of its own beside {shared / 1e6:.2f}M shared or idle")
    return dot, trainer


def write_results(
    config: TrainDotConfig,
    out: Path,
    inputs: TrainingInputs,
    dot: MorseDot,
    unexplained: float,
    builder: ReportBuilder,
) -> Report:
    """Write the Dot and the report of its training; ``unexplained`` is what ``run`` returned."""
    # The Dot, with what it was trained on.
    sides = inputs.encoded.data.clean.shape[-2:]
    if inputs.accelerator.is_main_process:
        dot.save_pretrained(
            out,
            {
                "family": inputs.process.family,
                "prediction": inputs.prediction,
                "steps_of_process": inputs.process.steps,
                "space": inputs.process.space,
                "updates": config.steps,
                "batch": config.batch,
                "gap_max": config.gap_max,
                "rollout": config.rollout,
                "sides": list(sides),
                "residual_left": unexplained,
            },
        )

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
