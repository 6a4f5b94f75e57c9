"""Train a Dot for a Stable Diffusion pipeline, whatever scheduler it ships with.

    python train_dot_for_stable_diffusion.py models/sd15 photos dot [UPDATES BATCH]

photos holds images, with captions in metadata.jsonl or in .txt files. The script replaces the
scheduler, because the PNDM of Stable Diffusion 1 calls the network twice at one time. The folder dot is
then read by MorseDot.from_pretrained. `morse-diffusion train-dot` can also resume an interrupted run.
"""

import sys

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from morse_diffusion import DotTrainer, MorseDot
from morse_diffusion.adapters.estimate import GuidedDash
from morse_diffusion.adapters.schedulers import prediction_of, process_of
from morse_diffusion.training.data import encode_folder
from morse_diffusion.training.trainer import LoopConfig

model, photos, folder = sys.argv[1:4] if len(sys.argv) > 3 else ("models/sd15", "photos", "dot")
updates, batch = map(int, sys.argv[4:6]) if len(sys.argv) > 5 else (100_000, 8)
device = "cuda" if torch.cuda.is_available() else "cpu"

pipe = StableDiffusionPipeline.from_pretrained(model).to(device)
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
encoded = encode_folder(pipe, photos, guidance=(2.0, 10.0))  # latents and text, in memory
print(f"{len(encoded.data.clean)} latents of {list(encoded.data.clean.shape[1:])}")

# The Dot wraps two extra levels around the UNet, whose own blocks then see 16 times fewer pixels.
torch.manual_seed(0)
dot = MorseDot.build(pipe.unet, m=2, channels=(96, 160), lora_rank=64, guidance=encoded.guidance)
print(f"{dot.own_parameters() / 1e6:.2f} million weights of its own")

# What the Dash says at two times, with one jump of the sampler between them.
process, prediction = process_of(pipe.scheduler), prediction_of(pipe.scheduler)
dash = GuidedDash(pipe.unet, process, prediction, encoded.negative)
loop = LoopConfig(steps=updates, batch=batch, lr=1e-4, guidance=encoded.guidance)
residual_left = DotTrainer(dash, dot, process, encoded.data, loop).run()

# With this record MorsePipeline refuses schedulers that the Dot was not trained for.
dot.save_pretrained(
    folder,
    {
        "family": process.family,
        "prediction": prediction,
        "steps_of_process": process.steps,
        "updates": updates,
        "residual_left": residual_left,
    },
)
print(f"{residual_left:.0%} of the squared residual is left")
