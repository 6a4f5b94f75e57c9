"""Make an open_clip ViT-B that gives the same embeddings as a finished ViT-S.

    python grow_clip_vit_b_from_vit_s.py models/clip-vit-s [ViT-B-16]

The directory holds a model that open_clip loads with ``local-dir:``, with an embedding of the same
width as the larger model's. The larger one is a name that open_clip knows, or a JSON file with its
settings. The script writes the folder ``grown`` and prints how far the embeddings of random images and
texts moved. Train the grown model as you trained the small one, with fewer updates.
"""

import sys
from pathlib import Path

import open_clip
import torch

from com_pt import grow
from com_pt.adapters.open_clip_models import save_clip

source = sys.argv[1] if len(sys.argv) > 1 else "models/clip-vit-s"
name = sys.argv[2] if len(sys.argv) > 2 else "ViT-B-16"
if name.endswith(".json"):
    open_clip.add_model_config(name)
    name = Path(name).stem

small = open_clip.create_model(f"local-dir:{source}").eval()
large = open_clip.create_model(name).eval()
report = grow(small, large, mode="lossless")  # writes into large
print(f"{report.inherited:.0%} of the larger model's weights are inherited")
for stack, layers in report.layers.items():
    print(f"{stack}: the new layers are grown from {layers}")

# The same random inputs for both models.
images = torch.randn(8, 3, *small.visual.image_size)
texts = torch.randint(1, small.vocab_size, (8, small.context_length))
with torch.no_grad():
    moved = {
        "image": float((small.encode_image(images) - large.encode_image(images)).abs().max()),
        "text": float((small.encode_text(texts) - large.encode_text(texts)).abs().max()),
    }
for stream, difference in moved.items():
    print(f"largest change of the {stream} embeddings: {difference:.1e}")

# The settings are saved too, because lossless growth may have changed the eps of the norms.
save_clip(large, open_clip.get_model_config(name), Path("grown"))
print('open_clip.create_model("local-dir:grown") loads the model')
