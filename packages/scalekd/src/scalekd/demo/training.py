"""The arms of the demo and the benchmark: one student, one data set, several ways to train it.

Every arm has the same images, epochs, augmentation (shifts), optimiser and schedule; the benchmark tunes
the peak learning rate of each and the strength of its distillation, with the same number of trials.
"""

import hashlib
import json
import math
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from timm.data import Mixup
from torch import nn
from torch.nn import functional as F

from effml_common.errors import InputError
from effml_common.finite import check_finite
from effml_common.logging import progress, say
from scalekd.demo.arms import device_of, make_task
from scalekd.demo.data import CLASSES, DIGIT_CLASSES, Data, Images, shifted, stream
from scalekd.demo.models import student_of, swin_teacher

BATCH = 50
GATE = 3.0  # points that a teacher must be above the student alone
# Of the demo, which does not tune: what suited most arms in the benchmark. A ViT fails at 2e-2.
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

    Raises:
        NonFiniteError: If the loss becomes NaN or infinite.
    """
    classes: Any = teacher.num_classes
    device = device_of(teacher)
    student = student_of(kind, classes, seed)
    task = make_task(arm, student, teacher, strength).train()
    parameters = [p for p in task.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05, fused=True)
    generator = torch.Generator().manual_seed(seed)
    mix = Mixup(0.2, 1.0, num_classes=classes, label_smoothing=0.0) if arm == "mixup" else None
    steps, step = epochs * (len(images.x) // BATCH), 0
    torch.manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(images.x), generator=generator).split(BATCH):
            if len(index) < BATCH:
                continue
            optimizer.param_groups[0]["lr"] = rate * warm_cosine(step, steps)
            x, y = shifted(images.x[index], generator), images.y[index]
            x, y = mix(x, y) if mix else (x, y)
            loss = task(x.to(device), y.to(device))["loss"]
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, 5.0)
            step += 1
            check_finite(loss.detach(), norm, step=step, term=arm)
            optimizer.step()
    return student.eval()


def warm_cosine(step: int, steps: int) -> float:
    """Factor of the rate: a warm-up over a twentieth of the run, then half a cosine."""
    return min(1.0, (step + 1) / (steps / 20)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def trained_teacher(
    width: int = 32,
    steps: int = 1500,
    batch: int = 64,
    data: Data = "drawn",
    device: torch.device | None = None,
) -> nn.Module:
    """The demo's Swin, trained once; kept in the user's cache folder.

    Drawn images come as an unlimited stream, digits as all images that are not for testing, shifted.
    It computes on ``device`` (default: the CPU) and comes back there.

    Raises:
        NonFiniteError: If training diverges.
    """
    settings = {"width": width, "steps": steps, "batch": batch, "data": [data, source_hash()]}
    file = cache_root() / f"teacher-{key_of(settings)}.safetensors"
    model = swin_teacher(width, CLASSES if data == "drawn" else DIGIT_CLASSES)
    if file.exists():
        model.load_state_dict(load_file(file))
        return model.to(device).eval()
    say(f"training a Swin of width {width} once, about 2 minutes; it is kept in the cache folder")
    model.to(device)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    with progress("training the teacher", steps) as bar:
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 3e-3 * warm_cosine(step, steps)
            x, y = stream(batch, generator, data)
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            check_finite(loss.detach(), norm, step=step, term="teacher")
            optimizer.step()
            bar.advance(loss=loss.item())
    file.parent.mkdir(parents=True, exist_ok=True)
    staging = file.with_suffix(f".{os.getpid()}.tmp")
    save_file(model.state_dict(), staging)
    staging.replace(file)
    return model.eval()


def check_gate(teacher: float, alone: float) -> None:
    """Refuse to distil from a teacher that is hardly better than the student.

    Raises:
        InputError: If it is less than 3 points ahead.
    """
    if teacher < alone + GATE:
        raise InputError(
            f"the teacher has {teacher:.1f} % and the student alone {alone:.1f} %: too close to "
            f"show anything; train the teacher longer, or give the student fewer than all images"
        )


def source_hash() -> str:
    """Hash of the code that draws the images and builds the networks."""
    here = Path(__file__).parent
    text = (here / "data.py").read_text() + (here / "models.py").read_text()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def key_of(settings: dict[str, Any]) -> str:
    """Cache key of settings and library versions."""
    libraries = {name: version(name) for name in ("torch", "timm")}
    text = json.dumps([settings, libraries], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cache_root() -> Path:
    """Folder of what the demo trains once."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "effml" / "scalekd"
