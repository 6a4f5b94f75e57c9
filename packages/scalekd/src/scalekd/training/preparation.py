"""From settings to a trainer: networks, data and loop."""

import dataclasses
from typing import Any

import torch
from timm.layers.norm_act import convert_sync_batchnorm

from effml_common.errors import ConfigError
from effml_common.logging import say
from scalekd.adapters.costs import cost_line
from scalekd.adapters.models import build_student, build_teacher
from scalekd.adapters.task import ScaleKDTask
from scalekd.adapters.teacher import TeacherSplit
from scalekd.config import TrainConfig
from scalekd.training.cache import TeacherCache
from scalekd.training.data import CheckedImages, check_splits, dataset_of, training_loader
from scalekd.training.processes import Processes
from scalekd.training.recipe import Recipe, TaskLoss
from scalekd.training.trainer import Trainer

# Settings that may differ between a run and its continuation.
FREE = {"out", "resume", "log_every", "save_every", "workers", "device", "data_dir", "compile"}


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
