"""A folder of images, and the words that train on it in seconds."""

import json
from pathlib import Path

import torch
from PIL import Image

from effml_common.cli import main
from scalekd.cli import COMMANDS

TEACHER = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
STUDENT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
WORDS = [
    "--teacher", "vit_tiny_patch16_224", "--teacher-args", json.dumps(TEACHER),
    "--allow-random-teacher", "--student", "vit_tiny_patch16_224",
    "--student-args", json.dumps(STUDENT), "--img-size", "32", "--num-classes", "3",
    "--epochs", "2", "--batch-size", "8", "--lr", "1e-2", "--workers", "0", "--stem-norm", "ln",
    "--log-every", "1", "--quiet",
]  # fmt: skip


def make_photos(folder: Path, per_class: int = 12) -> Path:
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", per_class), ("val", 4)):
        for label, name in enumerate(("ant", "bee", "cat")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                image = torch.rand((40, 44, 3), generator=generator) * 90
                image[..., label] += 150
                path = folder / split / name / f"{i}.png"
                Image.fromarray(image.to(torch.uint8).numpy()).save(path)
    return folder


def scalekd(*words: object) -> int:
    return main("scalekd", "scalekd", COMMANDS, [str(word) for word in words])


def metrics_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
