"""The demo's segmenters, of mmsegmentation's own classes, and the teacher that is trained once."""

import hashlib
import json
import os
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from af_dcd.config import PairConfig
from af_dcd.demo.data import CLASSES, IGNORED, Scenes, draw
from af_dcd.method.metrics import Scores
from effml_common.files import atomic_write
from effml_common.finite import check_finite
from effml_common.logging import progress, say

SEEDS = {"teacher": 1, "students": 2, "development": 3, "test": 4}  # of disjoint sets of scenes
RATE = 3e-3
TEACHER_BATCH = 8
CROP = 64  # side of a training crop, in pixels
CPU = torch.device("cpu")


def segmenter_config(width: int) -> dict[str, Any]:
    """A three-stage ResNet-18 at stride 4 with a one-layer head, as mmseg's registry builds it."""
    norm = {"type": "BN"}
    return {
        "type": "EncoderDecoder",
        "backbone": {
            "type": "ResNetV1c", "depth": 18, "base_channels": width, "stem_channels": width,
            "num_stages": 3, "strides": (1, 1, 1), "dilations": (1, 1, 2),
            "out_indices": (0, 1, 2), "norm_cfg": norm,
        },
        "decode_head": {
            "type": "FCNHead", "in_channels": 4 * width, "in_index": 2, "channels": 2 * width,
            "num_convs": 1, "concat_input": False, "num_classes": len(CLASSES),
            "norm_cfg": norm, "dropout_ratio": 0.0, "align_corners": False,
        },
    }  # fmt: skip


class Segmenter(nn.Module):
    """An mmseg model as a plain function of images; gives class scores at stride 4."""

    def __init__(self, width: int) -> None:
        super().__init__()
        from af_dcd.adapters.mmseg.shims import build_model

        self.model = build_model(segmenter_config(width))

    def forward(self, images: Tensor) -> Tensor:
        """Class scores [b, k, h/4, w/4] of images [b, 3, h, w]."""
        return self.model(images, mode="tensor")

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Last stage and class scores."""
        stages = self.model.extract_feat(images)
        return stages[-1], self.model.decode_head(stages)


def task_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of up-sampled scores."""
    large = F.interpolate(scores, labels.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(large, labels, ignore_index=IGNORED)


@torch.no_grad()
def label_maps(model: Segmenter, images: Tensor) -> Tensor:
    """Predicted classes [n, h, w] of whole images, in eval mode."""
    model.eval()
    maps = []
    for part in images.split(20):
        large = F.interpolate(model(part), part.shape[2:], mode="bilinear", align_corners=False)
        maps.append(large.argmax(1))
    return torch.cat(maps)


def score(model: Segmenter, scenes: Scenes) -> Scores:
    """Scores on whole scenes."""
    scores = Scores(len(CLASSES))
    scores.add(label_maps(model, scenes.images), scenes.labels)
    return scores


def demo_teacher(config: PairConfig, device: torch.device = CPU) -> Segmenter:
    """The teacher on a device, from the user's cache or trained there now.

    Raises:
        NonFiniteError: If its training diverges.
    """
    torch.manual_seed(0)
    teacher = Segmenter(config.teacher_width).to(device)
    path = cache_root() / f"teacher-{key_of(config, device)}.safetensors"
    if path.is_file():
        teacher.load_state_dict(load_file(path))
        return teacher.eval()
    say("training the teacher once, about 3 minutes; it is kept in the user cache folder")
    scenes = draw(config.teacher_scenes, SEEDS["teacher"]).to(device)
    train_teacher(teacher, scenes, config.teacher_steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, save({k: v.contiguous() for k, v in teacher.state_dict().items()}))
    return teacher.eval()


def train_teacher(model: Segmenter, scenes: Scenes, steps: int) -> None:
    """Train on labels: AdamW, rate falling along a polynomial."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(0)
    with progress("teacher", steps) as bar:
        for step in range(steps):
            set_rate(optimizer, RATE, step, steps)
            images, labels = scenes.crops(TEACHER_BATCH, CROP, generator)
            loss = task_loss(model.train()(images), labels)
            optimizer.zero_grad()
            loss.backward()
            check_finite(loss, step=step, term="cross entropy")
            optimizer.step()
            bar.advance(loss=loss.item())


def set_rate(optimizer: Any, rate: float, step: int, steps: int) -> None:
    """The polynomial fall of the paper, power 0.9, after a short rise."""
    for group in optimizer.param_groups:
        group["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - step / steps) ** 0.9


def key_of(config: PairConfig, device: torch.device = CPU) -> str:
    """Cache key of the teacher's settings, the libraries and the kind of device it is trained on."""
    settings = {k: v for k, v in asdict(config).items() if k.startswith("teacher")}
    settings |= {"rate": RATE, "batch": TEACHER_BATCH, "crop": CROP}
    if device.type != "cpu":  # rounds differently, so that the weights are others
        settings["device"] = device.type
    libraries = {name: version(name) for name in ("torch", "mmsegmentation")}
    text = json.dumps([settings, libraries], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cache_root() -> Path:
    """Folder of what the demo trains once."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "effml" / "af-dcd"
