"""Train a ResNet-18 with a fine-tuned Swin as its teacher, in a training loop of your own.

    python distil_resnet_from_swin.py photos swin.safetensors [STUDENT TEACHER EPOCHS BATCH SIZE]

The folder holds train/CLASS/*.jpg and val/CLASS/*.jpg. The file holds weights of the teacher for the
same classes, as timm saves them. The script prints the terms of the loss and the accuracy on val, and
writes resnet.pth, which timm loads without this package.
"""

import sys

import timm
import torch
from timm.data import create_transform, resolve_data_config
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from scalekd import ScaleKDTask

photos, weights = sys.argv[1:3]
student_name, teacher_name = sys.argv[3:5] or ("resnet18", "swin_base_patch4_window7_224")
epochs, batch_size, size = map(int, sys.argv[5:8] or (100, 256, 224))
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
workers = 8 if device.type == "cuda" else 0

train, val = ImageFolder(f"{photos}/train"), ImageFolder(f"{photos}/val")
classes = len(train.classes)
student = timm.create_model(student_name, num_classes=classes)
teacher = timm.create_model(teacher_name, num_classes=classes, checkpoint_path=weights)

# Images as the student expects them; the task turns them into what the teacher expects.
data_config = resolve_data_config({"input_size": (3, size, size)}, model=student)
train.transform = create_transform(**data_config, is_training=True)
val.transform = create_transform(**data_config)
batches = DataLoader(train, batch_size, shuffle=True, drop_last=True, num_workers=workers)

# The projectors are part of task.parameters() while the student trains, and are left behind after it.
task = ScaleKDTask(student, teacher, img_size=(size, size), device=device).train()
optimizer = torch.optim.SGD(task.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
for epoch in range(epochs):
    for images, labels in batches:
        result = task(images.to(device), labels.to(device))
        optimizer.zero_grad()
        result["loss"].backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    terms = {name: value.item() for name, value in result.items() if name != "output"}
    print(f"epoch {epoch + 1}:", {name: round(value, 3) for name, value in terms.items()})

student.eval()
with torch.no_grad():
    hits = [student(x.to(device)).argmax(1).cpu() == y for x, y in DataLoader(val, batch_size)]
top1 = 100 * float(torch.cat(hits).float().mean())
torch.save(student.state_dict(), "resnet.pth")
print(f"top-1 {top1:.1f} % on {len(val)} images; resnet.pth holds the student alone")
