"""Train a family of CLIP models as a chain, and load its largest member with open_clip alone.

    python train_clip_family_from_captions.py captions.tsv [cc3m-vit-tsbl runs/clip]

The table has a header and a row for each image: its path and one or several captions. The chain is a
YAML file or a recipe of the package; this one trains ViT-T, S, B and L with 7 captions an image. The
script prints what the family will cost before it starts. Run it again to continue after an
interruption.
"""

import sys
from dataclasses import replace

import open_clip
import torch

from com_pt import load_chain, plan_chain, run_chain

captions = sys.argv[1] if len(sys.argv) > 1 else "captions.tsv"
chain_file = sys.argv[2] if len(sys.argv) > 2 else "cc3m-vit-tsbl"
out = sys.argv[3] if len(sys.argv) > 3 else "runs/clip"

chain = load_chain(chain_file)
chain = replace(chain, data={**chain.data, "train": captions})
plan = plan_chain(chain)
for stage in plan.stages:
    forward, epochs = stage.forward / 1e9, stage.epochs
    print(f"{stage.name}: {forward:.3g} GMAC a forward pass, {epochs:g} epochs")
print(f"every member alone would cost {plan.ratio:.2f} times as much as the chain")

members = run_chain(chain, out, resume=True)
for member in members:
    print(f"{member.name}: {member.steps} updates, {member.macs / 1e9:.3g} GMAC")

# From here on nothing of com_pt is needed.
largest = members[-1].name
model = open_clip.create_model(f"local-dir:{out}/{largest}").eval()
image = torch.zeros(1, 3, *model.visual.image_size)
with torch.no_grad():
    embedding = model.encode_image(image, normalize=True)
print(f"{out}/{largest} is loaded; an image has {embedding.shape[1]} numbers")
