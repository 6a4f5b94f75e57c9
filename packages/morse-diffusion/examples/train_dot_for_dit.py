"""Train a Dot for a class-conditional DiT on latents of your own, and sample with it (experimental).

    python train_dot_for_dit.py models/DiT-XL-2-256 latents.npz dot [UPDATES BATCH]

latents.npz holds "latents", scaled as the transformer sees them, float [n, 4, height, width], and
"labels", integers [n]. `morse-diffusion train-dot` cannot encode data for DiT; DotTrainer takes any
tensors. The script writes the folder dot and class-0.png, class-1.png.
"""

import sys

import numpy as np
import torch
from diffusers import DiTPipeline, DPMSolverMultistepScheduler

from morse_diffusion import DotTrainer, MorseDot, MorsePlan, apply_morse
from morse_diffusion.adapters.estimate import GuidedDash
from morse_diffusion.adapters.schedulers import prediction_of, process_of
from morse_diffusion.training.data import TrainingData
from morse_diffusion.training.trainer import LoopConfig

model, arrays, folder = sys.argv[1:4] if len(sys.argv) > 3 else ("models/dit", "latents.npz", "dot")
updates, batch = map(int, sys.argv[4:6]) if len(sys.argv) > 5 else (20_000, 32)
guidance = (1.0, 6.0)  # range of scales that the Dot learns
device = "cuda" if torch.cuda.is_available() else "cpu"

pipe = DiTPipeline.from_pretrained(model).to(device)
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
with np.load(arrays) as file:
    latents, labels = torch.from_numpy(file["latents"]), torch.from_numpy(file["labels"])
data = TrainingData(clean=latents.float(), cond={"class_labels": labels.long()})

# The class after the last one stands for no class, as in the pipeline.
no_class = {"class_labels": torch.tensor([pipe.transformer.config.num_embeds_ada_norm])}
process, prediction = process_of(pipe.scheduler), prediction_of(pipe.scheduler)
dash = GuidedDash(pipe.transformer, process, prediction, no_class)

torch.manual_seed(0)
dot = MorseDot.build(pipe.transformer, m=1, channels=(64,), lora_rank=16, guidance=guidance)
loop = LoopConfig(steps=updates, batch=batch, lr=3e-4, guidance=guidance)
residual_left = DotTrainer(dash, dot, process, data, loop).run()
record = {"family": process.family, "prediction": prediction, "steps_of_process": process.steps}
dot.save_pretrained(folder, {**record, "residual_left": residual_left})
print(f"{residual_left:.0%} of the squared residual is left")

# The pipeline of DiT hides its guidance scale, so that Morse is given it too.
with apply_morse(pipe, dot, MorsePlan.uniform(8, 8), guidance_scale=4.0) as handle:
    noise = torch.Generator().manual_seed(0)
    call = {"class_labels": [0, 1], "guidance_scale": 4.0, "num_inference_steps": 16}
    pictures = pipe(**call, generator=noise).images
for label, picture in enumerate(pictures):
    picture.save(f"class-{label}.png")
summary = handle.summary()
print(summary)
