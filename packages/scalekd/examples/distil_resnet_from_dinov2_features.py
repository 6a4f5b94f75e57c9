"""Train a ResNet-50 on the features of DINOv2, which has never seen your classes.

    python distil_resnet_from_dinov2_features.py photos [STUDENT TEACHER WEIGHTS EPOCHS BATCH SIZE]

The folder holds train/CLASS/*.jpg and val/CLASS/*.jpg. The teacher has no logits for these classes, so
that the logit term is off: the student learns from the labels and the teacher's features. Without a file
of weights timm downloads the teacher's own. Run the script again to continue after an interruption; the
result is the folder runs/dinov2.
"""

import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file

from scalekd import TrainConfig, train

photos = sys.argv[1]
student, teacher = sys.argv[2:4] or ("resnet50", "vit_base_patch14_dinov2.lvd142m")
weights = sys.argv[4] if len(sys.argv) > 4 else None
epochs, batch_size, size = map(int, sys.argv[5:8] or (100, 256, 224))
classes = sum(path.is_dir() for path in Path(photos, "train").iterdir())

config = TrainConfig(
    data_dir=photos,
    num_classes=classes,
    student=student,
    teacher=teacher,
    teacher_args=f'{{"num_classes": 0, "img_size": {size}}}',  # DINOv2 without a classifier
    teacher_checkpoint=weights,
    kd_alpha=0.0,
    recipe="traditional",
    epochs=epochs,
    batch_size=batch_size,
    scale_lr=True,  # the recipe's rate is for 256 images
    img_size=size,
    amp="bf16" if torch.cuda.is_available() else "none",
    workers=8 if torch.cuda.is_available() else 0,
    resume="auto",
    out="runs/dinov2",
)
report = train(config)
for name, values in report.rows[0].metrics.items():
    print(f"{name} on val: {values[0]:.2f}")

# From here on nothing of scalekd is needed.
model = timm.create_model(student, num_classes=classes)
model.load_state_dict(load_file("runs/dinov2/student.safetensors"))
print(f"timm loads it: {sum(p.numel() for p in model.parameters()):,} parameters")
