"""Distil a large SegFormer of transformers into a small one, with the processor of the large one.

    python distil_segformer_b0_from_b5.py data models/b5 models/b0 [STEPS BATCH]

``data/images`` holds photos, and ``data/labels`` a PNG of the same name for each, with class numbers.
The first model is a SegFormer trained on these classes, beside its image processor. The second is the
small one; a classifier of other classes is replaced by a new one. The script writes the folder
``student``, which transformers loads without this package.
"""

import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import SegformerForSemanticSegmentation, SegformerImageProcessor

from af_dcd import DistillConfig, Distiller

data, large, small = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
steps, batch_size = map(int, sys.argv[4:6] or (40_000, 8))
device = "cuda" if torch.cuda.is_available() else "cpu"

processor = SegformerImageProcessor.from_pretrained(large)
teacher = SegformerForSemanticSegmentation.from_pretrained(large)
names = {"id2label": teacher.config.id2label, "label2id": teacher.config.label2id}
student = SegformerForSemanticSegmentation.from_pretrained(
    small, **names, ignore_mismatched_sizes=True
)

# Features are compared where the decoder has joined all stages, at stride 4.
tap = "module:decode_head.batch_norm"
distiller = Distiller(student, teacher, (tap, tap), DistillConfig(hidden=256)).to(device)

files, history = sorted((data / "images").iterdir()), []
for step in range(steps):
    chosen = [files[i] for i in torch.randint(len(files), (batch_size,))]
    images = [Image.open(file).convert("RGB") for file in chosen]
    labels = [Image.open(data / "labels" / f"{file.stem}.png") for file in chosen]
    batch = processor(images, labels, return_tensors="pt").to(device)

    # The branch is built from the first batch; the optimizer must come after it.
    if step == 0:
        distiller.prepare(pixel_values=batch["pixel_values"])
        optimizer = torch.optim.AdamW(distiller.parameters(), lr=6e-5, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=1.0)

    result = distiller.train()(**batch)  # the labels go to the student only
    optimizer.zero_grad()
    (result.output.loss + result.total).backward()
    optimizer.step()
    schedule.step()
    if step % 50 == 0 or step == steps - 1:
        terms = {"task": result.output.loss, **result.losses}
        history.append({name: float(value.detach()) for name, value in terms.items()})
        print(f"step {step + 1}:", *(f"{name} {value:.3g}" for name, value in history[-1].items()))

student.save_pretrained("student")
processor.save_pretrained("student")
