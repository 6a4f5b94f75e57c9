"""Make the same clip dense and frame-sparse, and measure how far apart and how fast they are.

    python make_wan_video_faster.py models/wan-4-step [HEIGHT WIDTH FRAMES]

The directory holds a diffusers pipeline of Wan that is distilled to four steps. The script writes
dense.gif and fis.gif into the working directory and prints the PSNR of the sparse clip to the dense one
and the speed-up of the whole pipeline. Both clips start from the same noise.
"""

import sys
import time

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_gif

from fis_dit import FISConfig, apply_fis

model = sys.argv[1] if len(sys.argv) > 1 else "models/wan-4-step"
height, width, num_frames = map(int, sys.argv[2:5]) if len(sys.argv) > 4 else (720, 1280, 81)
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32

pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype).to(device)
call = {
    "prompt": "a fox in snow",
    "height": height,
    "width": width,
    "num_frames": num_frames,
    "guidance_scale": 1.0,  # distilled models run without guidance
}

clips, seconds = {}, {}
for name in ("dense", "fis"):
    handle = apply_fis(pipe, FISConfig(stride=2)) if name == "fis" else None
    pipe(**call, num_inference_steps=1, output_type="latent")  # warm-up, not timed

    start = time.perf_counter()
    noise = torch.Generator().manual_seed(0)  # on the CPU, so that every device draws the same
    output = pipe(**call, num_inference_steps=4, generator=noise, output_type="pil")
    seconds[name] = time.perf_counter() - start
    clips[name] = np.stack(output.frames[0])
    export_to_gif(output.frames[0], f"{name}.gif", fps=16)

    if handle is not None:
        summary = handle.summary()["transformer"]
        handle.remove()  # the pipeline is dense again

error = np.square(clips["fis"].astype(np.float64) - clips["dense"]).mean()
psnr = 10 * np.log10(255**2 / error)
speedup = seconds["dense"] / seconds["fis"]
print(f"{len(summary['sparse_blocks'])} of {summary['depth']} blocks are sparse")
print(f"anchors of the first sparse blocks: {summary['anchors']}")
print(f"PSNR to the dense clip {psnr:.1f} dB, {speedup:.2f}x faster with text encoder and VAE")
