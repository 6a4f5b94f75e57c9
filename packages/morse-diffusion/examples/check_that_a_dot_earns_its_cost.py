"""Compare a Dot with no Dot and with free extrapolation, by distance to real images.

    python check_that_a_dot_earns_its_cost.py models/ddpm dot photos [BUDGET IMAGES SPEED_RATIO]

For pipelines of a bare UNet2DModel. All rows start from the same noise. The Dot earns its cost if its
distance is lower than those of the rows that need none. SPEED_RATIO is the number of Dot steps that take
as long as a full step; without it the networks are timed.
"""

import sys

import torch
from diffusers import DDPMPipeline, DPMSolverMultistepScheduler

from morse_diffusion import ExtrapolationDot, MorseDot, MorsePlan, ZeroDot, apply_morse, make_plan
from morse_diffusion.adapters.images import read_image_folder
from morse_diffusion.adapters.pixels import PixelPipeline
from morse_diffusion.adapters.timing import measure_times
from morse_diffusion.method.metrics import Reference

model, folder, photos = sys.argv[1:4] if len(sys.argv) > 3 else ("models/ddpm", "dot", "photos")
budget, images = map(int, sys.argv[4:6]) if len(sys.argv) > 5 else (5, 256)
device = "cuda" if torch.cuda.is_available() else "cpu"

# The samples of real images in their 20 main directions are what is compared.
loaded = DDPMPipeline.from_pretrained(model).to(device)
unet, config = loaded.unet.eval(), loaded.unet.config
size = (config.sample_size, config.sample_size)
real = read_image_folder(photos, size, config.in_channels, with_captions=False).images
reference = Reference.of(real)

# First-order DPM-Solver++ is DDIM, for any number of steps.
options = {"solver_order": 1, "timestep_spacing": "trailing"}
solver = DPMSolverMultistepScheduler.from_config(loaded.scheduler.config, **options)
pipe = PixelPipeline(unet, solver)
dot = MorseDot.from_pretrained(folder, dash=unet)
ratio = float(sys.argv[6]) if len(sys.argv) > 6 else measure_times(pipe, dot, 64).speed_ratio

plan, early = (make_plan(budget, ratio, r=1.5, early=early) for early in (1, 1.5))
rows = {
    "full steps alone": (ZeroDot(), MorsePlan.uniform(budget, 0)),
    "the Dash steps of the plan, no Dot": (ZeroDot(), plan),
    "extrapolation": (ExtrapolationDot(), MorsePlan.spread(budget, round(1.5 * budget), early=1.5)),
    "Dot": (dot, plan),
    "Dot, full steps early": (dot, early),
}
distances = {}
for name, (filler, steps) in rows.items():
    noise = torch.randn((images, config.in_channels, *size), generator=torch.manual_seed(0))
    with apply_morse(pipe, filler, steps):
        parts = [pipe(latents=x, num_inference_steps=steps.n_total) for x in noise.split(64)]
    distances[name] = reference.measure(torch.cat(parts).clamp(-1, 1).cpu())["fd"]
    cost = steps.lsd if filler is dot else steps.dash_steps
    print(f"{name:36} {steps.pattern:20} {cost:5.2f} LSD  Frechet distance {distances[name]:.2f}")
