"""The ``train`` command: a user's images, a teacher's name, a student's name."""

import dataclasses
import os
import sys
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn

from effml_common.cli import dump_config
from effml_common.device import resolve_device
from effml_common.errors import ConfigError, InputError
from effml_common.files import atomic_write
from effml_common.logging import say
from effml_common.report import Report, Row, environment, write_report
from scalekd.adapters.data import CheckedImages, check_splits, dataset_of, training_loader
from scalekd.adapters.models import build_student, build_teacher
from scalekd.adapters.tail import TeacherSplit
from scalekd.adapters.task import ScaleKDTask
from scalekd.cache import TeacherCache
from scalekd.config import TrainConfig
from scalekd.evaluation import accuracy_of
from scalekd.inspection import cost_line
from scalekd.recipe import Recipe, TaskLoss, recipe_of
from scalekd.trainer import Processes, Trainer

# Settings that may differ between a run and its continuation.
FREE = {"out", "resume", "log_every", "save_every", "workers", "device", "data_dir", "compile"}


def train(config: TrainConfig) -> Report:
    """Train a student; ``out/student.safetensors`` is what timm loads.

    Raises:
        InputError: If the data, a network or the out folder cannot be used.
        NonFiniteError: If a loss or gradient is not finite.
        Interrupted: After SIGINT or SIGTERM, once a checkpoint is saved.
    """
    started = time.monotonic()
    out = Path(config.out or time.strftime("runs/train-%Y%m%d-%H%M%S"))
    if (out / "student.safetensors").exists() and config.resume == "never":
        raise ConfigError(f"{out} holds a student already; choose another --out, or --resume auto")
    with ExitStack() as stack:
        device, processes = start_processes(config.device, stack)
        recipe = recipe_of(config)
        trainer = make_trainer(config, recipe, device, processes)
        run = out / "run"
        if processes.rank == 0:
            run.mkdir(parents=True, exist_ok=True)
            atomic_write(run / "config.yaml", dump_config(config))
        trainer.run(run, settings_of(config), resume=config.resume == "auto")
        task = trainer.task
        averaged = task.has_ema()
        student = task.export_student(ema=averaged).eval()
        score = accuracy_of(student, config, config.img_size, config.val_split, device)
    report = Report(
        package="scalekd",
        version=version("scalekd"),
        command=sys.argv,
        seeds=[config.seed],
        seconds=time.monotonic() - started,
        rows=[Row(config.student, f"{recipe.epochs} epochs", {k: [v] for k, v in score.items()})],
        notes=["averaged weights" if averaged else "last weights"],
        files=["student.safetensors"],
        environment=environment(("timm",), str(device)),
    )
    if processes.rank == 0:
        write_student(student, out / "student.safetensors")
        write_report(report, run)
        say(f"student: {out / 'student.safetensors'}")
    return report


def make_trainer(
    config: TrainConfig, recipe: Recipe, device: torch.device, processes: Processes
) -> Trainer:
    """Networks, data and loop of a configuration.

    Raises:
        InputError: If something does not fit.
    """
    share = recipe.batch_size // (processes.world * config.grad_accum)
    if share * processes.world * config.grad_accum != recipe.batch_size:
        raise ConfigError(
            f"a batch of {recipe.batch_size} cannot be split over {processes.world} processes "
            f"and {config.grad_accum} accumulated batches; use a multiple of their product"
        )
    dataset = training_set(config, recipe, share)
    torch.manual_seed(config.seed)
    teacher = TeacherSplit.from_timm(
        build_teacher(config), tail_blocks=config.tail_blocks, prefix=config.tpp_prefix
    )
    student = build_student(config, drop_path=config.drop_path)
    use_sync = recipe.sync_bn if config.sync_bn is None else config.sync_bn
    if use_sync and processes.world > 1 and device.type == "cuda":
        student = convert_sync_batchnorm(student)
    if config.channels_last:
        student = student.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    task = ScaleKDTask(
        student,
        teacher,
        config=config,
        criterion=TaskLoss(recipe),
        img_size=(config.img_size, config.img_size),
        teacher_resize=config.teacher_resize,
        device=device,
    )
    say(cost_line(task))
    loader = training_loader(dataset, config, recipe, student, share, device, processes.world > 1)
    cached = TeacherCache.open(config, task, loader) if config.cache else None
    trainer = Trainer(task, loader, config, recipe, processes, cached)
    say(estimate(trainer))
    return trainer


def training_set(config: TrainConfig, recipe: Recipe, share: int) -> Any:
    """The images to train on; ``share`` of them per batch of this process.

    Raises:
        InputError: If they are not there, or too few.
    """
    check_splits(config)
    images = dataset_of(config, config.train_split, training=True, seed=config.seed, batch=share)
    if not hasattr(images, "__getitem__") or isinstance(images, torch.utils.data.IterableDataset):
        if config.cache:
            raise ConfigError("a cache needs images with an index; use a folder or hfds/")
        return images
    views = TeacherCache.views_of(config.cache) if config.cache else None
    dataset = CheckedImages(images, config.num_classes, config.skip_bad, views, config.seed)
    if len(dataset) < recipe.batch_size:
        raise ConfigError(
            f"{len(dataset)} images are fewer than one batch of {recipe.batch_size}; lower "
            "--batch-size or add images"
        )
    return dataset


def estimate(trainer: Trainer) -> str:
    """Updates, and what the checkpoints take on disk."""
    weights = sum(p.numel() for p in trainer.task.inner().parameters())
    copies = 3 + (trainer.recipe.ema > 0)  # weights, two moments, average
    size = 2 * copies * 4 * weights / 2**20
    return (
        f"{trainer.updates * trainer.recipe.epochs} updates of {trainer.recipe.batch_size} images; "
        f"about {size:.0f} MiB of disk for two checkpoints; the time follows after the first updates"
    )


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """What a continued run must share."""
    every = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in every.items() if k not in FREE}
    return {k: v for k, v in plain.items() if "checkpoint" not in k}


def start_processes(device: str, stack: ExitStack) -> tuple[torch.device, Processes]:
    """The device, and this process's place among those that torchrun started.

    Raises:
        InputError: If the device is not there, or is of a kind that several processes cannot use.
    """
    where = resolve_device(device)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return where, Processes()
    if where.type not in ("cpu", "cuda"):
        raise InputError(
            f"device {where} trains in one process, not {world}; start without torchrun"
        )
    from torch import distributed

    backend = "nccl" if where.type == "cuda" and distributed.is_nccl_available() else "gloo"
    distributed.init_process_group(backend)
    stack.callback(distributed.destroy_process_group)
    return where, Processes(rank=distributed.get_rank(), world=world)


def write_student(student: nn.Module, path: Path) -> None:
    """The student's own weights under the student's own names."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in student.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, save(tensors))
