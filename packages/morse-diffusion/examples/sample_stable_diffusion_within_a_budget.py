"""Make the same image by full steps alone and by Morse, in about the same time.

    python sample_stable_diffusion_within_a_budget.py models/sd15 dot [BUDGET PROMPT SPEED_RATIO]

The budget counts steps of the full network. The script writes plain.png and morse.png, which start from
the same noise, and prints what Morse did. SPEED_RATIO is the number of Dot steps that take as long as a
full step; without it a short run measures it.
"""

import sys
import time

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from morse_diffusion import MorseDot, MorsePipeline

model, folder = sys.argv[1:3] if len(sys.argv) > 2 else ("models/sd15", "dot")
budget = int(sys.argv[3]) if len(sys.argv) > 3 else 10
prompt = sys.argv[4] if len(sys.argv) > 4 else "a red bicycle"
speed_ratio = float(sys.argv[5]) if len(sys.argv) > 5 else None
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32

pipe = StableDiffusionPipeline.from_pretrained(model, torch_dtype=dtype).to(device)
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
dot = MorseDot.from_pretrained(folder, dash=pipe.unet)
fast = MorsePipeline.from_pipe(pipe, dot=dot, speed_ratio=speed_ratio, early=1.5)
if speed_ratio is None:
    fast.measure_speed_ratio(prompt, guidance_scale=7.5)

seconds = {}
for name in ("plain", "morse"):
    start = time.perf_counter()
    noise = torch.Generator().manual_seed(0)  # on the CPU, so that every device draws the same
    if name == "plain":
        result = pipe(prompt, num_inference_steps=budget, guidance_scale=7.5, generator=noise)
    else:
        result = fast(prompt, budget_lsd=budget, guidance_scale=7.5, generator=noise)
    seconds[name] = time.perf_counter() - start
    result.images[0].save(f"{name}.png")

summary = fast.summary()
print(summary)
print(f"plain {seconds['plain']:.2f} s, Morse {seconds['morse']:.2f} s, decoder included")
