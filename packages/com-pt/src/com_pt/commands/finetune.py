"""``com-pt finetune``: train a finished image model on labelled images of another task."""

import torch

from com_pt.config import FinetuneConfig
from com_pt.method_config import ChainConfig, StageConfig
from com_pt.training.run import run_chain
from effml_common.device import resolve_device
from effml_common.folders import run_folder
from effml_common.logging import say
from effml_common.report import Report, ReportBuilder, Row, write_report

LIBRARIES = ("open-clip-torch", "timm", "torchvision", "accelerate")
MODEL = "model"  # folder of the result in the out folder
BETAS, EPS = (0.9, 0.999), 1e-8  # of AdamW, as vision transformers are fine-tuned


def finetune(config: FinetuneConfig) -> Report:
    """Fine-tune a model, and judge it once, at the end, on the held-out images.

    Raises:
        InputError: If the model, the data or the out folder cannot be used.
        NonFiniteError: If a loss or gradient becomes NaN or infinite.
    """
    # It is a chain of one member that starts from finished weights.
    device = resolve_device(config.device)
    builder = ReportBuilder("com-pt", LIBRARIES)
    out = run_folder(config.out, "finetune")
    [member] = run_chain(
        make_chain(config, device),
        out,
        resume=config.resume == "auto",
        force=config.force,
        device=device,
    )

    # Report what it has become.
    trained = "the head" if config.freeze else "all weights"
    setting = f"{trained}, {member.steps} updates, {config.epochs:g} epochs, lr {config.lr:g}"
    costs = {"GMAC": [member.macs / 1e9], "seconds": [member.seconds]}
    metrics = {name: [value] for name, value in member.metrics.items()}
    report = builder.build(
        [Row("fine-tuned", setting, {**metrics, **costs})],
        seeds=[config.seed],
        device=device,
        notes=["judged once, after the last epoch: no epoch is chosen on the held-out images"],
        files=[MODEL],
    )
    write_report(report, out / "run")
    say(f"model: {out / MODEL}")
    return report


def make_chain(config: FinetuneConfig, device: torch.device) -> ChainConfig:
    """Return the chain of one member that fine-tuning is."""
    data = {
        "train": config.train,
        "val": config.data,
        "images": config.images,
        "smoothing": config.smoothing,
        "crop_scale": [config.crop, 1.0],
        "flip": config.flip,
    }
    stage = StageConfig(
        name=MODEL,
        model={"path": config.model, "freeze": config.freeze},
        epochs=config.epochs,
        lr=config.lr,
        weight_decay=config.weight_decay,
        batch_size=config.batch_size,
    )
    precision = "bf16" if device.type == "cuda" else "fp32"
    return ChainConfig(
        task="com_pt.training.tasks.finetune:FinetuneTask",
        stages=(stage,),
        data={name: value for name, value in data.items() if value is not None},
        individual_epochs=config.epochs,
        seed=config.seed,
        precision=precision if config.precision is None else config.precision,
        betas=BETAS,
        eps=EPS,
        lr_floor=0.0,
        workers=config.workers,
    )
