"""Predict how much faster Wan 2.2 A14B becomes with frame sparsity, without loading a weight.

    python predict_speedup_of_wan_a14b.py [CONFIG HEIGHT WIDTH FRAMES]

CONFIG is the config.json of a Wan transformer. Without it the shapes of A14B are used. The model is
built on the meta device, so this takes seconds and no memory. Speed-ups count the FLOPs of the
transformer blocks over four denoising steps. FRAMES are frames of the clip, before the VAE.
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from fis_dit import FISConfig, apply_fis

config = json.loads(Path(sys.argv[1]).read_text()) if len(sys.argv) > 1 else {}
height, width, num_frames = map(int, sys.argv[2:5]) if len(sys.argv) > 4 else (720, 1280, 81)

with torch.device("meta"):
    transformer = WanTransformer3DModel.from_config(config)
parameters = sum(parameter.numel() for parameter in transformer.parameters())
print(
    f"{parameters / 1e9:.2f} billion parameters, {num_frames} frames of {width} x {height} pixels"
)

settings = {
    "every 2nd frame": FISConfig(stride=2),
    "every 2nd frame, keys of all frames": FISConfig(stride=2, kv="full"),
    "every 2nd frame, self-attention only": FISConfig(stride=2, sites="attn"),
    "every 3rd frame": FISConfig(stride=3),
    "every 3rd frame, keys of all frames": FISConfig(stride=3, kv="full"),
}
speedups = {}
for name, setting in settings.items():
    with apply_fis(transformer, setting) as handle:
        cost = handle.flops(height=height, width=width, num_frames=num_frames)["transformer"]
    speedups[name] = cost.speedup
    print(f"{name:38} {cost.speedup:.2f}x, {cost.sparse / 1e15:.3g} PFLOP a clip")
