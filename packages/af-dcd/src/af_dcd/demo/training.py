"""Training one arm's student, and timing its steps."""

import time
from dataclasses import dataclass

import torch

from af_dcd.config import PairConfig
from af_dcd.demo.arms import Arm, branch_of
from af_dcd.demo.data import Scenes
from af_dcd.demo.models import CROP, Segmenter, score, set_rate, task_loss
from af_dcd.method.distillation import kd_term
from effml_common.device import synchronize
from effml_common.finite import check_finite
from effml_common.logging import progress


class Training:
    """One arm's run; equal seeds share the student's start, the crops and their order.

    Computes where the scenes lie; the teacher must lie there too.
    """

    def __init__(
        self, arm: Arm, config: PairConfig, teacher: Segmenter, scenes: Scenes, seed: int,
        rate: float, steps: int,
    ) -> None:  # fmt: skip
        self.arm, self.config, self.teacher, self.scenes = arm, config, teacher, scenes
        self.rate, self.steps, self.done = rate, steps, 0
        torch.manual_seed(seed)
        self.student = Segmenter(config.student_width)
        self.branch = branch_of(arm, config)
        # Drawn on the host and moved then: every device starts from the same weights.
        parts = [self.student, *([self.branch] if self.branch else [])]
        for part in parts:
            part.to(scenes.images.device)
        self.optimizer = torch.optim.AdamW(
            [p for part in parts for p in part.parameters()], lr=rate, weight_decay=1e-4
        )
        self._crops = torch.Generator().manual_seed(1000 + seed)
        self._needs_teacher = self.branch is not None or arm.config.lambda_kd > 0

    def step(self) -> dict[str, float]:
        """One update; returns its loss terms.

        Raises:
            NonFiniteError: If the loss is NaN or infinite.
        """
        set_rate(self.optimizer, self.rate, self.done, self.steps)
        images, labels = self.scenes.crops(self.config.batch, CROP, self._crops)
        self.student.train()
        fs, zs = self.student.features(images)
        terms = {"loss_task": task_loss(zs, labels)}
        if self._needs_teacher:
            with torch.no_grad():
                ft, zt = self.teacher.features(images)
            terms |= kd_term(zs, zt, self.arm.config)
            if self.branch is not None:
                terms |= self.branch(fs, ft)
        loss = torch.stack(list(terms.values())).sum()
        self.optimizer.zero_grad()
        loss.backward()
        check_finite(loss, step=self.done, term=" + ".join(terms))
        self.optimizer.step()
        self.done += 1
        return {name: float(value.detach()) for name, value in terms.items()}


@dataclass(frozen=True)
class Trained:
    """A student after its run.

    Attributes:
        metrics: ``mIoU``, ``boundary F``, one IoU per class, and ``seconds`` of training.
        student: For pictures.
    """

    metrics: dict[str, float]
    student: Segmenter


def run_arm(training: Training, tests: Scenes) -> Trained:
    """Train to the end and measure."""
    began = time.perf_counter()
    with progress(training.arm.name, training.steps) as bar:
        for _ in range(training.steps):
            terms = training.step()
            bar.advance(1, loss=sum(terms.values()))
    seconds = time.perf_counter() - began
    scores = score(training.student, tests)
    metrics = {"mIoU": scores.mean_iou(), "boundary F": scores.boundary_f()}
    metrics |= {f"IoU {k}": 100 * float(v) for k, v in enumerate(scores.iou())}
    return Trained({**metrics, "seconds": seconds, "steps": training.steps}, training.student)


def step_seconds(trainings: list[Training], rounds: int = 8) -> list[float]:
    """Median seconds of a step of each, taken in turns so that a busy machine slows all alike."""
    times: list[list[float]] = [[] for _ in trainings]
    for _ in range(rounds):
        for training, seen in zip(trainings, times, strict=True):
            device = training.scenes.images.device
            synchronize(device)
            began = time.perf_counter()
            training.step()
            synchronize(device)
            seen.append(time.perf_counter() - began)
    return [sorted(seen[1:])[len(seen[1:]) // 2] for seen in times]
