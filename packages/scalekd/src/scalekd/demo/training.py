"""The loops of the demo and the study: one student in one way, and the teacher of them all.

Every arm has the same images, epochs, augmentation (shifts), optimiser and schedule; the study tunes the
peak learning rate of each and the strength of its distillation, with the same number of trials.
"""

import hashlib
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from timm.data import Mixup
from torch import nn
from torch.nn import functional as F

from effml_common.errors import InputError
from effml_common.folders import cache_folder, cache_key
from effml_common.logging import Progress, say
from effml_common.stopping import check_finite
from scalekd.demo.arms import device_of, make_task
from scalekd.demo.data import CLASSES, DIGIT_CLASSES, Data, Images, shift_images, teacher_batch
from scalekd.demo.models import build_demo_student, build_demo_teacher

BATCH_SIZE = 50  # images per update of a student
GRADIENT_CLIP = 5.0  # largest norm of a gradient
WARMUP_PARTS = 20  # the warm-up is one of so many parts of a run
TEACHER_RATE = 3e-3  # peak learning rate
SMALLEST_LEAD = 3.0  # points that a teacher must be above the student alone
# Of the demo, which does not tune: what suited most arms in the study. A ViT fails at 2e-2.
DEMO_RATES = {"cnn": 2e-2, "mlp": 2e-2, "vit": 8e-3}


def train_arm(
    arm: str,
    kind: str,
    teacher: nn.Module,
    images: Images,
    *,
    epochs: int,
    rate: float,
    seed: int,
    strength: float = 1.0,
) -> nn.Module:
    """Train one student on the device of its teacher; returns it in evaluation mode.

    Images are drawn, shifted and mixed in main memory, so that they are the same on every device.

    Args:
        arm: Way to train, see ``make_task``.
        kind: Of the student: cnn, mlp or vit.
        teacher: In evaluation mode.
        images: Labelled images.
        epochs: Passes over them.
        rate: Peak learning rate.
        seed: Of initial weights, order and augmentation.
        strength: Factor of the distillation term.

    Raises:
        NonFiniteError: If the loss becomes NaN or infinite.
    """
    # A student of its own, its task and its optimizer.
    classes: Any = teacher.num_classes
    device = device_of(teacher)
    student = build_demo_student(kind, classes, seed)
    task = make_task(arm, student, teacher, strength).train()
    parameters = [p for p in task.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05, fused=True)

    # Sources of randomness that are the same for every arm.
    generator = torch.Generator().manual_seed(seed)
    mixup = Mixup(0.2, 1.0, num_classes=classes, label_smoothing=0.0) if arm == "mixup" else None
    steps, step = epochs * (len(images.x) // BATCH_SIZE), 0
    torch.manual_seed(seed)

    # Whole batches only.
    for _ in range(epochs):
        for index in torch.randperm(len(images.x), generator=generator).split(BATCH_SIZE):
            if len(index) < BATCH_SIZE:
                continue
            optimizer.param_groups[0]["lr"] = rate * warm_cosine(step, steps)
            x, y = shift_images(images.x[index], generator), images.y[index]
            x, y = mixup(x, y) if mixup else (x, y)

            # One update; nothing is changed when a value is not finite.
            loss = task(x.to(device), y.to(device))["loss"]
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, GRADIENT_CLIP)
            step += 1
            check_finite(loss.detach(), norm, step=step, term=arm)
            optimizer.step()
    return student.eval()


def warm_cosine(step: int, steps: int) -> float:
    """Return the factor of the rate: a warm-up over a twentieth of the run, then half a cosine."""
    warmup = min(1.0, (step + 1) / (steps / WARMUP_PARTS))
    return warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


def load_or_train_teacher(
    width: int = 32,
    steps: int = 1500,
    batch: int = 64,
    data: Data = "drawn",
    device: torch.device | None = None,
) -> nn.Module:
    """Return the demo's Swin, trained once and kept in the user's cache folder.

    Drawn images come as an unlimited stream, digits as all images that are not for testing, shifted.

    Args:
        width: Channels of its first stage.
        steps: Updates.
        batch: Images per update.
        data: What it learns.
        device: Where it computes and comes back (default: the CPU).

    Raises:
        NonFiniteError: If training diverges.
    """
    # A teacher depends on its settings and on the code that draws the images and builds the network.
    settings = {"width": width, "steps": steps, "batch": batch, "data": [data, hash_source()]}
    key = cache_key(settings, ("torch", "timm"))
    file = cache_folder("scalekd") / f"teacher-{key}.safetensors"
    model = build_demo_teacher(width, CLASSES if data == "drawn" else DIGIT_CLASSES)
    if file.exists():
        model.load_state_dict(load_file(file))
        return model.to(device).eval()

    say(f"training a Swin of width {width} once, about 2 minutes; it is kept in the cache folder")
    train_teacher(model.to(device), steps=steps, batch=batch, data=data)

    # Under another name first, since two processes may train the same teacher.
    file.parent.mkdir(parents=True, exist_ok=True)
    staging = file.with_suffix(f".{os.getpid()}.tmp")
    save_file(model.state_dict(), staging)
    staging.replace(file)
    return model.eval()


def train_teacher(model: nn.Module, *, steps: int, batch: int, data: Data) -> None:
    """Train a teacher by labels alone, on its own device.

    Raises:
        NonFiniteError: If training diverges.
    """
    device = device_of(model)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=TEACHER_RATE, weight_decay=0.05)
    with Progress("training the teacher", steps) as bar:
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = TEACHER_RATE * warm_cosine(step, steps)
            x, y = teacher_batch(batch, generator, data)
            loss = F.cross_entropy(model(x.to(device)), y.to(device))

            # One update; nothing is changed when a value is not finite.
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
            check_finite(loss.detach(), norm, step=step, term="teacher")
            optimizer.step()
            bar.advance(loss=loss.item())


def check_teacher_lead(teacher: float, alone: float) -> None:
    """Refuse to distil from a teacher that is hardly better than the student.

    Args:
        teacher: Top-1 accuracy of the teacher in percent.
        alone: Top-1 accuracy of a student that learned from labels alone.

    Raises:
        InputError: If the teacher is less than 3 points ahead.
    """
    if teacher < alone + SMALLEST_LEAD:
        raise InputError(
            f"the teacher has {teacher:.1f} % and the student alone {alone:.1f} %: too close to "
            f"show anything; train the teacher longer, or give the student fewer than all images"
        )


def hash_source() -> str:
    """Return a hash of the code that draws the images and builds the networks: 16 hex digits."""
    here = Path(__file__).parent
    text = (here / "data.py").read_text() + (here / "models.py").read_text()
    return hashlib.sha256(text.encode()).hexdigest()[:16]
