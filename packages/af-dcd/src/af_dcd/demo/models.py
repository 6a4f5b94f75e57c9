"""The demo's segmenters, of mmsegmentation's own classes, and the teacher that is trained once."""

from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from af_dcd.config import PairConfig
from af_dcd.demo.data import CLASSES, IGNORED, Scenes, draw_scenes
from af_dcd.method.metrics import Scores
from effml_common.files import atomic_write
from effml_common.folders import cache_folder, cache_key
from effml_common.logging import Progress, say
from effml_common.stopping import check_finite

SCENE_SEEDS = {"teacher": 1, "students": 2, "development": 3, "test": 4}  # of disjoint sets
TEACHER_RATE = 3e-3  # highest learning rate
TEACHER_BATCH = 8  # crops an update
CROP_PIXELS = 64  # side of a training crop
WARM_UP_STEPS = 20
SCORED_TOGETHER = 20  # whole images in one forward pass
CPU = torch.device("cpu")


def segmenter_config(width: int) -> dict[str, Any]:
    """Describe a three-stage ResNet-18 at stride 4 with a one-layer head for mmseg's registry."""
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
        """Compute class scores [b, k, h/4, w/4] of images [b, 3, h, w]."""
        return self.model(images, mode="tensor")

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the map of the last stage [b, 4 width, h/4, w/4] and the class scores."""
        stages = self.model.extract_feat(images)
        return stages[-1], self.model.decode_head(stages)


def task_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Compute the cross entropy of up-sampled scores."""
    large = F.interpolate(scores, labels.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(large, labels, ignore_index=IGNORED)


@torch.no_grad()
def predict_labels(model: Segmenter, images: Tensor) -> Tensor:
    """Predict the classes [n, h, w] of whole images, in eval mode."""
    model.eval()
    maps = []
    for batch in images.split(SCORED_TOGETHER):
        large = F.interpolate(model(batch), batch.shape[2:], mode="bilinear", align_corners=False)
        maps.append(large.argmax(1))
    return torch.cat(maps)


def score_segmenter(model: Segmenter, scenes: Scenes) -> Scores:
    """Score a segmenter on whole scenes."""
    scores = Scores(len(CLASSES))
    scores.add(predict_labels(model, scenes.images), scenes.labels)
    return scores


def demo_teacher(config: PairConfig, device: torch.device = CPU) -> Segmenter:
    """Give the teacher on a device, from the user's cache or trained there now.

    Raises:
        NonFiniteError: If its training diverges.
    """
    # What an earlier run has trained.
    torch.manual_seed(0)
    teacher = Segmenter(config.teacher_width).to(device)
    path = cache_folder("af-dcd") / f"teacher-{teacher_key(config, device)}.safetensors"
    if path.is_file():
        teacher.load_state_dict(load_file(path))
        return teacher.eval()

    # Train it once, and keep it for later runs.
    say("training the teacher once, about 3 minutes; it is kept in the user cache folder")
    scenes = draw_scenes(config.teacher_scenes, SCENE_SEEDS["teacher"]).to(device)
    train_teacher(teacher, scenes, config.teacher_steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in teacher.state_dict().items()}
    atomic_write(path, save(weights))
    return teacher.eval()


def teacher_key(config: PairConfig, device: torch.device = CPU) -> str:
    """Name the teacher in the cache by its settings, the libraries and the kind of its device."""
    settings = {k: v for k, v in asdict(config).items() if k.startswith("teacher")}
    settings |= {"rate": TEACHER_RATE, "batch": TEACHER_BATCH, "crop": CROP_PIXELS}
    if device.type != "cpu":  # rounds differently, so that the weights are others
        settings["device"] = device.type
    return cache_key(settings, ("torch", "mmsegmentation"))


def train_teacher(model: Segmenter, scenes: Scenes, steps: int) -> None:
    """Train on labels with AdamW and the schedule of ``set_rate``.

    Raises:
        NonFiniteError: If the loss becomes NaN or infinite.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=TEACHER_RATE, weight_decay=1e-4)
    crop_generator = torch.Generator().manual_seed(0)
    with Progress("teacher", steps) as bar:
        for step in range(steps):
            # Forward and backward on fresh crops.
            set_rate(optimizer, TEACHER_RATE, step, steps)
            images, labels = scenes.crops(TEACHER_BATCH, CROP_PIXELS, crop_generator)
            loss = task_loss(model.train()(images), labels)
            optimizer.zero_grad()
            loss.backward()

            # Nothing is changed when the loss is not finite.
            check_finite(loss, step=step, term="cross entropy")
            optimizer.step()
            bar.advance(loss=loss.item())


def set_rate(optimizer: Any, rate: float, step: int, steps: int) -> None:
    """Set the learning rate of a step: the paper's polynomial fall, power 0.9, after a short rise."""
    for group in optimizer.param_groups:
        group["lr"] = rate * min(1.0, (step + 1) / WARM_UP_STEPS) * (1 - step / steps) ** 0.9
