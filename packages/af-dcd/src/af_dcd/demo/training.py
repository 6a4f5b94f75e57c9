"""Training one arm's student, and timing its steps."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from af_dcd.config import PairConfig
from af_dcd.demo.arms import Arm, build_branch
from af_dcd.demo.data import Scenes
from af_dcd.demo.models import CROP_PIXELS, Segmenter, score_segmenter, set_rate, task_loss
from af_dcd.method.distillation import kd_term
from effml_common.device import synchronize
from effml_common.logging import Progress
from effml_common.stopping import check_finite


@dataclass(frozen=True)
class LabelledPair:
    """What all arms share: the frozen teacher, and the labelled scenes that students learn from."""

    config: PairConfig
    teacher: Segmenter
    scenes: Scenes


class Training:
    """One arm's run; equal seeds share the student's start, the crops and their order.

    Args:
        arm: What is trained, and at which rate.
        pair: Teacher and scenes, on one device; the student is trained there.
        seed: Of the student's weights, the masks and the crops.
        steps: Updates in all, for the schedule of the rate.
    """

    def __init__(self, arm: Arm, pair: LabelledPair, seed: int, steps: int) -> None:
        # The student and its branch, drawn on the host: every device starts from the same weights.
        self.arm, self.pair, self.steps, self.steps_done = arm, pair, steps, 0
        torch.manual_seed(seed)
        self.student = Segmenter(pair.config.student_width)
        self.branch = build_branch(arm, pair.config)
        modules = [self.student, *([self.branch] if self.branch else [])]
        for module in modules:
            module.to(pair.scenes.images.device)

        # One optimizer for both, and a generator of its own for the crops.
        parameters = [p for module in modules for p in module.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=arm.rate, weight_decay=1e-4)
        self._crop_generator = torch.Generator().manual_seed(1000 + seed)

    def step(self) -> dict[str, float]:
        """Make one update; returns its loss terms.

        Raises:
            NonFiniteError: If the loss is NaN or infinite.
        """
        # Crops are the same for all arms of a seed.
        set_rate(self.optimizer, self.arm.rate, self.steps_done, self.steps)
        scenes, batch = self.pair.scenes, self.pair.config.batch
        images, labels = scenes.crops(batch, CROP_PIXELS, self._crop_generator)

        # The labels' term and those of the arm.
        self.student.train()
        features, scores = self.student.features(images)
        terms = {"loss_task": task_loss(scores, labels)}
        terms |= self._distillation_terms(images, features, scores)
        loss = torch.stack(list(terms.values())).sum()

        # Nothing is changed when the loss is not finite.
        self.optimizer.zero_grad()
        loss.backward()
        check_finite(loss, step=self.steps_done, term=" + ".join(terms))
        self.optimizer.step()
        self.steps_done += 1
        return {name: float(value.detach()) for name, value in terms.items()}

    def _distillation_terms(
        self, images: Tensor, features: Tensor, scores: Tensor
    ) -> dict[str, Tensor]:
        if self.branch is None and self.arm.config.lambda_kd == 0:
            return {}
        with torch.no_grad():
            teacher_features, teacher_scores = self.pair.teacher.features(images)
        terms = kd_term(scores, teacher_scores, self.arm.config)
        if self.branch is not None:
            terms |= self.branch(features, teacher_features)
        return terms


@dataclass(frozen=True)
class ArmResult:
    """A student after its run.

    Attributes:
        metrics: ``mIoU``, ``boundary F``, one IoU per class, and ``seconds`` of training.
        student: For pictures.
    """

    metrics: dict[str, float]
    student: Segmenter


def run_training(training: Training, tests: Scenes) -> ArmResult:
    """Train to the end and measure on whole scenes.

    Raises:
        NonFiniteError: If the loss becomes NaN or infinite.
    """
    # Train, with the clock on this alone.
    started = time.perf_counter()
    with Progress(training.arm.name, training.steps) as bar:
        for _ in range(training.steps):
            terms = training.step()
            bar.advance(1, loss=sum(terms.values()))
    seconds = time.perf_counter() - started

    # Measure.
    scores = score_segmenter(training.student, tests)
    metrics = {"mIoU": scores.mean_iou(), "boundary F": scores.boundary_f()}
    metrics |= {f"IoU {k}": 100 * float(v) for k, v in enumerate(scores.iou())}
    return ArmResult({**metrics, "seconds": seconds, "steps": training.steps}, training.student)


def median_step_seconds(trainings: list[Training], rounds: int = 8) -> list[float]:
    """Time a step of each training, in turns so that a busy machine slows all alike.

    Returns:
        For each training the median over rounds, without the first one.
    """
    times: list[list[float]] = [[] for _ in trainings]
    for _ in range(rounds):
        for training, seconds in zip(trainings, times, strict=True):
            device = training.pair.scenes.images.device
            synchronize(device)
            started = time.perf_counter()
            training.step()
            synchronize(device)
            seconds.append(time.perf_counter() - started)
    return [sorted(seconds[1:])[len(seconds[1:]) // 2] for seconds in times]
