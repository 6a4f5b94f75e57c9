"""Find out on your own data whether the method beats plain logits distillation in the same time.

    python compare_with_logits_distillation_at_equal_time.py train val models/b5 models/b0 [4000 8 3]

``train`` and ``val`` hold ``images`` and ``labels``, ``models/b5`` a SegFormer with its processor, and
``models/b0`` its student. The numbers are updates of the whole method, batch size and seeds.
"""

import sys
import time
from itertools import product
from pathlib import Path

import torch
from PIL import Image
from transformers import SegformerForSemanticSegmentation, SegformerImageProcessor

from af_dcd import DistillConfig, Distiller

train, val, large, small = sys.argv[1:5]
steps, batch_size, seeds = map(int, sys.argv[5:8] or (4_000, 8, 3))
device = "cuda" if torch.cuda.is_available() else "cpu"
processor = SegformerImageProcessor.from_pretrained(large)
teacher = SegformerForSemanticSegmentation.from_pretrained(large)
classes, taps = teacher.config.num_labels, ("module:decode_head.batch_norm",) * 2
configs = {"whole method": DistillConfig(), "logits only": DistillConfig(lambda_fd=0, lambda_ctr=0)}

data = {}  # all images, in memory
for folder in (train, val):
    files = sorted(Path(folder, "images").iterdir())
    labels = [Image.open(Path(folder, "labels", f"{file.stem}.png")) for file in files]
    photos = [Image.open(file).convert("RGB") for file in files]
    data[folder] = processor(photos, labels, return_tensors="pt")
runs, seconds = [], 0.0
for seed, (name, config) in product(range(seeds), configs.items()):
    torch.manual_seed(seed)
    student = SegformerForSemanticSegmentation.from_pretrained(small)
    distiller = Distiller(student, teacher, taps, config).to(device)
    distiller.prepare(data[train]["pixel_values"][:2].to(device)).train()
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=6e-5)

    step, started = 0, time.perf_counter()
    while step < steps if name == "whole method" else time.perf_counter() < started + seconds:
        picks = torch.randint(len(data[train]["labels"]), (batch_size,))
        result = distiller(**{k: v[picks].to(device) for k, v in data[train].items()})
        optimizer.zero_grad()
        (result.output.loss + result.total).backward()
        optimizer.step()
        step += 1
    seconds = time.perf_counter() - started  # the whole method comes first and sets them

    counts = torch.zeros(classes, classes)  # pixels of each true class and predicted class
    for image, true in zip(data[val]["pixel_values"], data[val]["labels"], strict=True):
        output = student.eval().requires_grad_(False)(image[None].to(device))
        predicted = processor.post_process_semantic_segmentation(output, [true.shape])[0].cpu()
        pairs = (classes * true + predicted)[true != 255]
        counts += pairs.bincount(minlength=classes**2).view(classes, classes)
    iou = counts.diag() / (counts.sum(0) + counts.sum(1) - counts.diag())
    runs.append((name, step, 100 * float(iou.nanmean())))  # a class that nobody sees is no number
    print(f"seed {seed}, {name}: {step} updates, mIoU {runs[-1][2]:.1f} %")
