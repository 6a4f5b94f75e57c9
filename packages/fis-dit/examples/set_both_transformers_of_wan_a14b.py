"""Give the two transformers of Wan 2.2 A14B settings of their own.

    python set_both_transformers_of_wan_a14b.py models/Wan2.2-T2V-A14B-4-step [HEIGHT WIDTH FRAMES]

The transformer of the noisy first steps computes every third frame. The one of the last steps, which
draws the details, computes every second frame and sees the keys and values of all frames. The script
writes fis.gif and prints what each transformer did. Weights move to the GPU only while they are used.
"""

import sys

import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_gif

from fis_dit import FISConfig, apply_fis

model = sys.argv[1] if len(sys.argv) > 1 else "models/Wan2.2-T2V-A14B-4-step"
height, width, num_frames = map(int, sys.argv[2:5]) if len(sys.argv) > 4 else (720, 1280, 81)

dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
pipe = WanPipeline.from_pretrained(model, torch_dtype=dtype)
if torch.cuda.is_available():
    pipe.enable_model_cpu_offload()

settings = {
    "transformer": FISConfig(stride=3),
    "transformer_2": FISConfig(stride=2, kv="full"),
}
with apply_fis(pipe, settings) as handle:
    clip = pipe(
        "a fox in snow",
        height=height,
        width=width,
        num_frames=num_frames,
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pil",
    ).frames[0]
    summary = handle.summary()

export_to_gif(clip, "fis.gif", fps=16)
for name, item in summary.items():
    print(f"{name}: stride {item['stride']}, {item.get('forwards', 0)} of 4 steps")
    print(f"  sparse blocks {item['sparse_blocks']}")
    print(f"  anchors {item.get('anchors', 'none, it did not run')}")
