"""Find out on your own images whether ScaleKD beats timm's FeatureDistillationTask.

    python compare_scalekd_with_timm_features.py photos swin.safetensors [STUDENT TEACHER EPOCHS ...]

The same student is trained in three ways with the same images, order and epochs: with labels alone, with
timm's own task, and with ScaleKD, which needs more time for an epoch. Further arguments are the batch
size and the side of the images in pixels. Try other rates and seeds before you decide.
"""

import sys
import time

import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.task import ClassificationTask, DistillationTeacher, FeatureDistillationTask
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from scalekd import ScaleKDTask

photos, weights = sys.argv[1:3]
student_name, teacher_name = sys.argv[3:5] or ("resnet18", "swin_base_patch4_window7_224")
epochs, batch_size, size = map(int, sys.argv[5:8] or (30, 64, 224))
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
train, val = ImageFolder(f"{photos}/train"), ImageFolder(f"{photos}/val")
classes = len(train.classes)
options = {"num_classes": classes, "img_size": size}
teacher = timm.create_model(teacher_name, checkpoint_path=weights, **options).to(device)

common = {"device": device, "verbose": False}
results = {}
for way in ("labels alone", "timm features", "ScaleKD"):
    torch.manual_seed(0)
    student = timm.create_model(student_name, num_classes=classes).to(device)
    data_config = resolve_data_config({"input_size": (3, size, size)}, model=student)
    train.transform = create_transform(**data_config, is_training=True)
    val.transform = create_transform(**data_config)
    if way == "labels alone":
        task = ClassificationTask(student, nn.CrossEntropyLoss(), **common)
    elif way == "timm features":
        source = DistillationTeacher(teacher, device=device)
        task = FeatureDistillationTask(student, source, nn.CrossEntropyLoss(), **common)
    else:
        task = ScaleKDTask(student, teacher, img_size=(size, size), device=device)

    parameters = [p for p in task.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    started = time.perf_counter()
    for _ in range(epochs):
        for x, y in DataLoader(train, batch_size, shuffle=True, drop_last=True):
            optimizer.zero_grad()
            task(x.to(device), y.to(device))["loss"].backward()
            optimizer.step()
    seconds = time.perf_counter() - started
    with torch.no_grad():
        hits = [student.eval()(x.to(device)).argmax(1).cpu() == y for x, y in DataLoader(val, 64)]
    results[way] = 100 * float(torch.cat(hits).float().mean())
    print(f"{way}: top-1 {results[way]:.1f} % after {seconds:.0f} s of training")
