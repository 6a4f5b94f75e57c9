"""Distil a DeepLabV3 of torchvision into a small LR-ASPP, in a training loop of your own.

    python distil_lraspp_from_deeplabv3.py data teacher.pth 21 [STEPS BATCH SIDE TEACHER BACKBONE]

``data/images`` holds photos, ``data/labels`` a PNG of the same name for each: classes, or 255 to ignore.
``teacher.pth`` is the state dict of TEACHER, a deeplabv3_resnet101. The result is ``student.pth``.
"""

import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import tv_tensors
from torchvision.models import get_model
from torchvision.transforms import v2

from af_dcd import DistillConfig, Distiller

data, weights, classes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
steps, batch_size, side = map(int, sys.argv[4:7] or (40_000, 16, 512))
large, backbone = sys.argv[7:9] or ("deeplabv3_resnet101", "DEFAULT")
device = "cuda" if torch.cuda.is_available() else "cpu"

backbone = None if backbone == "none" else backbone
student = get_model("lraspp_mobilenet_v3_large", weights_backbone=backbone, num_classes=classes)
teacher = get_model(large, weights_backbone=None, num_classes=classes)
teacher.load_state_dict(torch.load(weights, weights_only=True), strict=False)  # noqa: TID251

# Both backbones are tapped at their last map; the teacher's, stride 8, is resized to the student's, 16.
taps = ("module:backbone:high", "module:backbone:out")
config = DistillConfig(hidden=256, pool=2, resize="teacher")
distiller = Distiller(student, teacher, taps, config).to(device)
distiller.prepare(torch.zeros(2, 3, side, side, device=device))
optimizer = torch.optim.SGD(distiller.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)

crop = v2.RandomCrop(side, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: 255})
dtypes = {tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64, "others": None}
normalize = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
transform = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.ToDtype(dtypes, scale=True), normalize])
files, history = [*(data / "images").iterdir()], []
for step in range(steps):
    crops = []
    for file in random.choices(files, k=batch_size):
        labels = tv_tensors.Mask(Image.open(data / "labels" / f"{file.stem}.png"))
        crops.append(transform(tv_tensors.Image(Image.open(file).convert("RGB")), labels))
    images, labels = (torch.stack(parts).to(device) for parts in zip(*crops, strict=True))
    result = distiller.train()(images)
    task = F.cross_entropy(result.output["out"], labels[:, 0], ignore_index=255)
    optimizer.zero_grad()
    (task + result.total).backward()
    optimizer.step()
    schedule.step()
    if step % 50 == 0 or step == steps - 1:
        history.append({k: float(v.detach()) for k, v in {"task": task, **result.losses}.items()})
        print(f"step {step + 1}:", *(f"{name} {value:.3g}" for name, value in history[-1].items()))
torch.save(student.state_dict(), "student.pth")
