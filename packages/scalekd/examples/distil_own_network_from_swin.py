"""Teach a network that timm does not know, by the names of two of its modules.

    python distil_own_network_from_swin.py images.safetensors swin.safetensors [TEACHER STEPS BATCH SIZE]

The first file holds images [n, 3, SIZE, SIZE] in [0, 1] and labels [n], the second one weights of the
teacher for the same classes. Replace the network below by your own. It is written to own-network.pt.
"""

import sys

import timm
import torch
from safetensors.torch import load_file
from torch import nn

from scalekd import ScaleKDConfig, ScaleKDTask

data = load_file(sys.argv[1])
images, labels = data["images"], data["labels"]
teacher_name = sys.argv[3] if len(sys.argv) > 3 else "swin_tiny_patch4_window7_224"
steps, batch_size, size = map(int, sys.argv[4:7] or (20_000, 64, 224))
classes = int(labels.max()) + 1
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class OwnNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 7, stride=4, padding=3), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Linear(128, classes)

    def forward(self, x):
        return self.head(self.last(self.middle(self.stem(x))).mean((2, 3)))


student = OwnNetwork()
options = {"num_classes": classes, "img_size": size, "checkpoint_path": sys.argv[2]}
teacher = timm.create_model(teacher_name, **options)
task = ScaleKDTask(
    student,
    teacher,
    config=ScaleKDConfig(w_full=0.4, w_ac=0.3, tau=1.0, kd_t=4.0),  # gentle, for few updates
    taps=("middle", "last"),  # the earlier map first
    student_norm=((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),  # this network sees images in [0, 1]
    img_size=(size, size),
    device=device,
).train()
optimizer = torch.optim.AdamW(task.parameters(), lr=2e-3, weight_decay=0.05)
for step in range(steps):
    index = torch.randint(len(images), (batch_size,))
    result = task(images[index].to(device), labels[index].to(device))
    optimizer.zero_grad()
    result["loss"].backward()
    optimizer.step()
    if step % 100 == 0 or step == steps - 1:
        shares = {name: f"{share:.0%}" for name, share in task.shares(result).items()}
        print(f"step {step}: loss {result['loss'].item():.3f}, of which {shares}")
torch.save(student.state_dict(), "own-network.pt")
