"""Measure which blocks of a Wan pipeline tolerate sparsity, and write the setting to plan.json.

    python choose_sparse_blocks_of_wan.py models/wan-4-step prompts.txt [SPEEDUP HEIGHT WIDTH FRAMES]

prompts.txt holds one prompt a line. plan.json is read by `fis-dit generate --plan plan.json` and by
FISConfig.from_json. The method "endpoint" instead of "local" needs one more pass for each block.
"""

import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from fis_dit import FISConfig, apply_fis, plan

model = sys.argv[1] if len(sys.argv) > 1 else "models/wan-4-step"
prompts = Path(sys.argv[2] if len(sys.argv) > 2 else "prompts.txt").read_text().splitlines()
target_speedup = float(sys.argv[3]) if len(sys.argv) > 3 else 2.0
height, width, num_frames = map(int, sys.argv[4:7]) if len(sys.argv) > 6 else (720, 1280, 81)
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32

pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype).to(device)
setting = plan(
    pipe,
    [prompt for prompt in prompts if prompt.strip()],
    target_speedup,
    num_inference_steps=4,
    method="local",
    clip=(num_frames, height, width),
)
Path("plan.json").write_text(setting.to_json())

# The same speed-up, by FLOPs, from the saved file.
saved = FISConfig.from_json(Path("plan.json").read_text())
with apply_fis(pipe, saved) as handle:
    cost = handle.flops(height=height, width=width, num_frames=num_frames)["transformer"]
dense_blocks = sorted(set(range(saved.layers)) - set(saved.blocks))
print(f"dense blocks: {dense_blocks}")
print(f"speed-up by FLOPs: {cost.speedup:.2f}x (wanted {target_speedup:.2f}x)")
