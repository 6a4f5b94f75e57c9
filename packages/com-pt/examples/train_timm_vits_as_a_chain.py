"""Train vision transformers of timm as a chain: each starts from the one before it.

    python train_timm_vits_as_a_chain.py train.csv val.csv 1000 [EPOCHS BATCH IMAGE PATCH WIDTH ...]

The CSV files have a header and the columns path and label, a number below the third argument. By
default ViT-Ti, S and B are trained on images of 224 pixels. The first member trains for EPOCHS, the
later ones for 0.19 and 0.12 of them. The script writes one folder for each member into runs/vits and
prints their accuracy on val.csv, right after growth and at the end.
"""

import sys

import timm
import torch

from com_pt import ChainConfig, plan_chain, run_chain
from com_pt.method_config import StageConfig

train, val, classes = sys.argv[1], sys.argv[2], int(sys.argv[3])
epochs, batch, image, patch = map(int, sys.argv[4:8] or (90, 1024, 224, 16))
widths = [int(word) for word in sys.argv[8:]] or [192, 384, 768]

# Heads keep their size along a chain; larger members have more of them.
head_width = min(64, widths[0])
stages = tuple(
    StageConfig(
        name=f"vit-{width}",
        model={
            "name": "vit_tiny_patch16_224",
            "embed_dim": width,
            "num_heads": width // head_width,
            "img_size": image,
            "patch_size": patch,
        },
        batch_size=batch,
        growth="lossless",
    )
    for width in widths
)
chain = ChainConfig(
    task="classify",
    data={"train": train, "val": val, "classes": classes},
    stages=stages,
    individual_epochs=epochs,
    precision="bf16" if torch.cuda.is_available() else "fp32",
    workers=8 if torch.cuda.is_available() else 0,
)
print(f"every member alone would cost {plan_chain(chain).ratio:.2f} times as much as the chain")

members = run_chain(chain, "runs/vits")
for member in members:
    start = f"{member.start['top-1']:.1%}" if member.start else "random weights"
    print(f"{member.name}: top-1 from {start} to {member.metrics['top-1']:.1%}")

largest = timm.create_model(f"local-dir:runs/vits/{members[-1].name}", pretrained=True)
print(f"timm loads it: {sum(p.numel() for p in largest.parameters()):,} parameters")
