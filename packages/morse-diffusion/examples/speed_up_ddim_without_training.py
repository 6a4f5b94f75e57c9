"""Extrapolate a pipeline's own estimates between its full steps: nothing is trained, nothing is added.

    python speed_up_ddim_without_training.py models/sd15 [STEPS PROMPT]

Both images cost the same STEPS calls of the UNet. The script writes plain.png, extrapolated.png and
reference.png, made with five times as many steps from the same noise, and prints how far the first two
are from it. A trained Dot has to be better than this to earn its cost.
"""

import sys

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from morse_diffusion import ExtrapolationDot, MorsePipeline, MorsePlan

model = sys.argv[1] if len(sys.argv) > 1 else "models/sd15"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 10
prompt = sys.argv[3] if len(sys.argv) > 3 else "a red bicycle"
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32

# First-order DPM-Solver++ is DDIM, for any number of steps.
pipe = StableDiffusionPipeline.from_pretrained(model, torch_dtype=dtype).to(device)
options = {"solver_order": 1, "timestep_spacing": "trailing"}
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **options)

# 2.5 times as many steps, of which the UNet makes the given number, most of them early.
plan = MorsePlan.spread(steps, round(1.5 * steps), early=1.5)
extrapolating = MorsePipeline.from_pipe(pipe, dot=ExtrapolationDot())

images = {}
for name, run, how_many in (
    ("reference", pipe, {"num_inference_steps": 5 * steps}),
    ("plain", pipe, {"num_inference_steps": steps}),
    ("extrapolated", extrapolating, {"plan": plan}),
):
    noise = torch.Generator().manual_seed(0)  # on the CPU, so that every device draws the same
    latents = run(prompt, guidance_scale=7.5, generator=noise, output_type="latent", **how_many)
    images[name] = latents.images.float()
    with torch.no_grad():
        decoded = pipe.vae.decode(latents.images / pipe.vae.config.scaling_factor).sample
    pipe.image_processor.postprocess(decoded)[0].save(f"{name}.png")

summary = extrapolating.summary()
print(f"{summary.plan.pattern}: {summary.steps('Dash')} calls of the UNet")
errors = {}
for name in ("plain", "extrapolated"):
    gap = images[name] - images["reference"]
    errors[name] = float(gap.norm() / images["reference"].norm())
    print(f"{name:12} relative error of the latents {errors[name]:.3f}")
