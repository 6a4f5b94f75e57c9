"""The demo's models: a small Wan transformer, the same distilled to four steps, a clip classifier.

The teacher is trained by flow matching. The student starts from it and learns, for each of the four
fixed noise levels, the line from there to where the teacher's 32-step path meets the next one. The
package ships all of them (``python -m fis_dit.demo.models NAME FOLDER`` is the script that made them).
"""

import math
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from effml_common.errors import InputError
from effml_common.logging import Progress, say
from effml_common.stopping import check_finite
from fis_dit.demo.data import CLIP_SETS, FRAMES, TEXT_WIDTH, draw_clips, encode_labels

ASSETS = Path(__file__).parents[1] / "assets"
STUDENT_STEPS = 4
TEACHER_STEPS = 32
SHIFT = 3.0  # of the noise levels towards the noisy end, as in the released video models
KINDS = ("teacher", "student", "classifier")


def wan_config(name: str) -> dict[str, object]:
    """Return the arguments of a data set's ``WanTransformer3DModel``: 8 blocks of width 48."""
    patch = CLIP_SETS[name].patch
    return {
        "patch_size": (1, patch, patch),
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "in_channels": 1,
        "out_channels": 1,
        "text_dim": TEXT_WIDTH,
        "freq_dim": 32,
        "ffn_dim": 96,
        "num_layers": 8,
        "rope_max_seq_len": 64,
    }


def make_transformer(name: str) -> nn.Module:
    """Make an untrained transformer, float32, on the CPU."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**wan_config(name))  # pyright: ignore[reportArgumentType]


class ClipClassifier(nn.Module):
    """Two 3-D convolutions and a linear layer; its features measure sets of clips.

    They are pooled over space and not over time, so that one broken frame is seen.

    Args:
        classes: Number of labels.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 16, 3, stride=(1, 2, 2), padding=1)
        self.second = nn.Conv3d(16, 32, 3, stride=2, padding=1)
        self.head = nn.Linear(32, classes + 1)

    def features(self, values: Tensor) -> Tensor:
        """Return features "b t 32" of standardised clips "b 1 f h w", one for every other frame."""
        return F.gelu(self.second(F.gelu(self.first(values)))).mean((3, 4)).transpose(1, 2)

    def forward(self, values: Tensor) -> Tensor:
        """Return logits of the labels and, last, an estimate of the speed; "b classes+1"."""
        return self.head(self.features(values).mean(1))


def noise_levels(steps: int, shift: float = SHIFT) -> list[float]:
    """Return the ``steps`` + 1 noise levels of an Euler sampler, from 1 to 0, shifted."""
    even = [1 - i / steps for i in range(steps + 1)]
    return [shift * u / (1 + (shift - 1) * u) for u in even]


def predict_velocity(model: nn.Module, x: Tensor, level: float | Tensor, prompt: Tensor) -> Tensor:
    """Return the model's velocity of noisy clips "b 1 f h w" at one noise level, or one per clip."""
    time = torch.as_tensor(level, dtype=torch.float32, device=x.device).expand(len(x)) * 1000
    return model(x, time, prompt, return_dict=False)[0]


def denoise(
    model: nn.Module, noise: Tensor, prompt: Tensor, levels: Sequence[float]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Denoise by Euler steps, yielding (velocity, clips after the step).

    Args:
        model: The transformer.
        noise: "b 1 f h w".
        prompt: "b 2 16".
        levels: Noise levels, from 1 to 0.
    """
    x = noise
    for step, (level, following) in enumerate(pairwise(levels)):
        with model.cache_context("cond", step_index=step, num_inference_steps=len(levels) - 1):  # pyright: ignore[reportCallIssue]
            v = predict_velocity(model, x, level, prompt)
        x = x + (following - level) * v
        yield v, x


def load_model(name: str, kind: str, folder: Path = ASSETS) -> nn.Module:
    """Load a trained model of a data set, in evaluation mode.

    Args:
        name: "shapes" or "digits".
        kind: "teacher", "student" or "classifier".
        folder: Of the weights; default those shipped with the package.

    Raises:
        InputError: If the file is not there.
    """
    path = folder / f"{name}-{kind}.safetensors"
    if not path.is_file():
        raise InputError(
            f"there are no weights {path.name}; python -m fis_dit.demo.models makes them"
        )
    model = (
        ClipClassifier(CLIP_SETS[name].classes) if kind == "classifier" else make_transformer(name)
    )
    # Half precision on disk; buffers such as rotary tables are made anew.
    weights = {key: value.float() for key, value in load_file(path).items()}
    model.load_state_dict(weights, strict=False)
    return model.eval().requires_grad_(False)


def train_teacher(name: str, batch: int = 12, seed: int = 0) -> nn.Module:
    """Train by flow matching: predict noise minus clip at a random noise level.

    Args:
        name: "shapes" or "digits".
        batch: Clips of an update.
        seed: Of weights, clips and noise.
    """
    torch.manual_seed(seed)
    model, steps = make_transformer(name), CLIP_SETS[name].teacher_steps
    clips, labels, _ = draw_clips(name, 4096, seed=seed)
    optimizer, schedule = _make_optimizer(model, steps, 2e-3)
    generator = torch.Generator().manual_seed(seed)

    with Progress(f"{name}: teacher", steps) as bar:
        for step in range(steps):
            # Clips, noise, and the level at which they are mixed.
            rows = torch.randint(len(clips), (batch,), generator=generator)
            x, prompt = clips[rows], encode_labels(labels[rows])
            level = torch.sigmoid(torch.randn(batch, generator=generator) + math.log(SHIFT) / 2)
            noise = torch.randn(x.shape, generator=generator)
            share = level.view(-1, 1, 1, 1, 1)

            noisy = share * noise + (1 - share) * x
            loss = F.mse_loss(predict_velocity(model, noisy, level, prompt), noise - x)
            _update(model, optimizer, schedule, loss, step)
            bar.advance(loss=f"{loss.item():.3f}")
    return model


@torch.no_grad()
def follow_teacher(teacher: nn.Module, name: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Follow the teacher's 32-step paths, and keep where they stand at the student's levels.

    Args:
        teacher: The trained teacher.
        name: "shapes" or "digits".
        count: Number of paths.
        seed: Of noise and labels.

    Returns:
        Points "5 count 1 f h w" from pure noise to the clip, and prompts "count 2 16".
    """
    # Prompts, and the levels at which the student steps.
    generator = torch.Generator().manual_seed(seed)
    spec = CLIP_SETS[name]
    prompt = encode_labels(torch.randint(spec.classes, (count,), generator=generator))
    coarse_levels = noise_levels(STUDENT_STEPS)
    inner_steps = TEACHER_STEPS // STUDENT_STEPS

    # The teacher takes eight steps between two of these levels.
    parts: list[Tensor] = []
    with Progress(f"{name}: teacher paths", count) as bar:
        for rows in torch.arange(count).split(64):
            x = torch.randn(len(rows), 1, FRAMES, spec.size, spec.size, generator=generator)
            points = [x]
            for start, end in pairwise(coarse_levels):
                levels = [start + (end - start) * i / inner_steps for i in range(inner_steps + 1)]
                *_, (_, x) = denoise(teacher, x, prompt[rows], levels)
                points.append(x)
            parts.append(torch.stack(points))
            bar.advance(len(rows))
    return torch.cat(parts, 1), prompt


def distil(teacher: nn.Module, name: str, batch: int = 16) -> nn.Module:
    """Distil four straight steps out of the teacher's paths.

    Args:
        teacher: The trained teacher.
        name: "shapes" or "digits".
        batch: Points of an update.
    """
    # The lines that the student shall follow, as points and slopes.
    torch.manual_seed(1)
    steps, count = CLIP_SETS[name].student_steps, CLIP_SETS[name].paths
    points, prompts = follow_teacher(teacher, name, count, seed=1)
    levels = torch.tensor(noise_levels(STUDENT_STEPS))
    slopes = (points[1:] - points[:-1]) / (levels[1:] - levels[:-1]).view(-1, 1, 1, 1, 1, 1)

    # It starts from the teacher's weights.
    student = make_transformer(name)
    student.load_state_dict(teacher.state_dict())
    optimizer, schedule = _make_optimizer(student, steps, 1e-3)
    generator = torch.Generator().manual_seed(2)
    with Progress(f"{name}: student", steps) as bar:
        for step in range(steps):
            rows = torch.randint(count, (batch,), generator=generator)
            segment = torch.randint(STUDENT_STEPS, (batch,), generator=generator)
            x, slope = points[segment, rows], slopes[segment, rows]
            loss = F.mse_loss(predict_velocity(student, x, levels[segment], prompts[rows]), slope)
            _update(student, optimizer, schedule, loss, step)
            bar.advance(loss=f"{loss.item():.3f}")
    return student


def train_classifier(name: str, steps: int = 400, batch: int = 32) -> nn.Module:
    """Train the clip classifier on labels and speeds.

    Args:
        name: "shapes" or "digits".
        steps: Updates.
        batch: Clips of an update.
    """
    torch.manual_seed(3)
    model = ClipClassifier(CLIP_SETS[name].classes)
    clips, labels, speeds = draw_clips(name, 4096, seed=3)
    optimizer, schedule = _make_optimizer(model, steps, 3e-3)
    generator = torch.Generator().manual_seed(3)
    with Progress(f"{name}: classifier", steps) as bar:
        for step in range(steps):
            rows = torch.randint(len(clips), (batch,), generator=generator)
            out = model(clips[rows])
            loss = F.cross_entropy(out[:, :-1], labels[rows]) + F.mse_loss(out[:, -1], speeds[rows])
            _update(model, optimizer, schedule, loss, step)
            bar.advance(loss=f"{loss.item():.3f}")
    return model


def _make_optimizer(
    model: nn.Module, steps: int, rate: float
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps + 1, pct_start=0.05
    )


def _update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    loss: Tensor,
    step: int,
) -> None:
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    check_finite(loss, norm, step=step, term="mean squared error")
    optimizer.step()
    schedule.step()


def make_assets(name: str, folder: Path) -> None:
    """Train what is missing and write it in half precision.

    Args:
        name: "shapes" or "digits".
        folder: Of the weights; files that are there stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("teacher", "classifier", "student"):
        path = folder / f"{name}-{kind}.safetensors"
        if path.exists():
            continue
        if kind == "student":
            model = distil(load_model(name, "teacher", folder), name)
        else:
            model = train_teacher(name) if kind == "teacher" else train_classifier(name)
        weights = {key: value.half().contiguous() for key, value in model.named_parameters()}
        save_file({key: value.detach() for key, value in weights.items()}, path)
        say(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    make_assets(sys.argv[1], Path(sys.argv[2]))
