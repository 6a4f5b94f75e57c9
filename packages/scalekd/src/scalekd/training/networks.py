"""Teacher and student of a run, built and joined by the method."""

import torch
from timm.layers.norm_act import convert_sync_batchnorm

from scalekd.adapters.models import build_student, build_teacher
from scalekd.adapters.task import ScaleKDTask
from scalekd.training.plan import TrainingPlan
from scalekd.training.processes import Processes
from scalekd.training.recipe import TaskLoss


def build_task(plan: TrainingPlan, processes: Processes) -> ScaleKDTask:
    """Build both networks and the projectors between them, on the device of this process.

    Their random weights depend on the seed alone, so that ``cache`` and ``train`` have the same.

    Raises:
        InputError: If a network cannot be built, or the two do not fit.
    """
    config, recipe = plan.config, plan.recipe
    torch.manual_seed(config.seed)
    teacher = build_teacher(config)
    student = build_student(config, drop_path=config.drop_path)

    # What is changed in the student for speed, or for several cards.
    use_sync = recipe.sync_bn if config.sync_bn is None else config.sync_bn
    if use_sync and processes.world > 1 and processes.device.type == "cuda":
        student = convert_sync_batchnorm(student)
    if config.channels_last:
        student = student.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    return ScaleKDTask(
        student,
        teacher,
        config=config,
        criterion=TaskLoss(recipe),
        img_size=(config.img_size, config.img_size),
        teacher_resize=config.teacher_resize,
        device=processes.device,
    )
