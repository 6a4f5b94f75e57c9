"""The ``train`` command: a user's images, a teacher's name, a student's name."""

from effml_common.files import atomic_write
from effml_common.logging import say
from effml_common.parsing import dump_config
from effml_common.report import Report, ReportBuilder, Row
from scalekd.adapters.costs import describe_cost
from scalekd.config import TrainConfig
from scalekd.training.cache import count_views, open_cache
from scalekd.training.data import read_training_images
from scalekd.training.evaluation import measure_accuracy
from scalekd.training.loaders import training_loader
from scalekd.training.networks import build_task
from scalekd.training.plan import STUDENT_FILE, plan_training
from scalekd.training.processes import start_processes
from scalekd.training.students import write_student
from scalekd.training.trainer import prepare_trainer


def train(config: TrainConfig) -> Report:
    """Train a student; ``out/student.safetensors`` is what timm loads.

    Raises:
        InputError: If the data, a network or the out folder cannot be used.
        NonFiniteError: If a loss or gradient is not finite.
        Interrupted: After SIGINT or SIGTERM, once a checkpoint is saved.
    """
    report = ReportBuilder("scalekd", libraries=("timm",))
    plan = plan_training(config)
    with start_processes(config.device) as processes:
        # Read the images, and build the networks.
        images = read_training_images(plan, processes, count_views(config.cache))
        task = build_task(plan, processes)
        say(describe_cost(task))

        # Prepare the loop. The loader sets the transform, which a cache is checked against.
        loader = training_loader(images, plan, task.images.student_pixels, processes)
        cached_teacher = open_cache(plan, task, images.dataset)
        trainer = prepare_trainer(plan, processes, task, loader, cached_teacher)

        # Run it.
        if processes.rank == 0:
            plan.run_folder.mkdir(parents=True, exist_ok=True)
            atomic_write(plan.run_folder / "config.yaml", dump_config(config))
        trainer.run()

        # The student as it will be used: with averaged weights where there are some.
        averaged = task.has_ema()
        student = task.export_student(ema=averaged).eval()
        scores = measure_accuracy(student, config, size=config.img_size, device=processes.device)

    # Write the student and the report.
    if processes.rank == 0:
        write_student(student, plan.out / STUDENT_FILE)
        say(f"student: {plan.out / STUDENT_FILE}")
    setting = f"{plan.recipe.epochs} epochs"
    return report.write(
        plan.run_folder,
        [Row(config.student, setting, {name: [value] for name, value in scores.items()})],
        seeds=[config.seed],
        device=processes.device,
        notes=["averaged weights" if averaged else "last weights"],
        files=[STUDENT_FILE],
    )
