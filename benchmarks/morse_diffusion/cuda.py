"""Hot paths of morse-diffusion: Dash and Dot of Stable Diffusion 1.5 and XL, sampling steps, training.

A Dash call has the doubled batch of classifier-free guidance, a Dot call answers for both halves at
once. The steps of ``sample`` go through the hook on the UNet; the scheduler's own update stays outside.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from benchmarks.hot_path_timing import main
from benchmarks.hot_paths import HotPath, Kit, Step
from morse_diffusion.adapters.apply import apply_morse
from morse_diffusion.adapters.calls import Guidance
from morse_diffusion.adapters.dot import DotShape, MorseDot, UNetDot
from morse_diffusion.adapters.dot.io import fingerprint
from morse_diffusion.adapters.estimate import GuidedDash
from morse_diffusion.adapters.hook import DashEstimate, Trajectory
from morse_diffusion.method.jumps import Process
from morse_diffusion.method.objective import Draws
from morse_diffusion.method.sampler import ZeroDot
from morse_diffusion.method.schedule import MorsePlan
from morse_diffusion.training.accelerator import accelerator_on
from morse_diffusion.training.trainer import Batch, LoopConfig, update_average, update_dot

# The published config.json of each UNet, as far as it differs from the class's defaults.
SD15 = {"sample_size": 64, "cross_attention_dim": 768}
SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
}
TINY = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "transformer_layers_per_block": 1,
}
SHAPE = DotShape(m=2, channels=(96, 160), layers=1, lora_rank=64, guidance=(2.0, 10.0))
TINY_SHAPE = DotShape(m=1, channels=(8,), layers=1, lora_rank=4, guidance=(2.0, 10.0))
TIMES = [981.0, 961.0]
CPU = torch.device("cpu")
Build = Callable[[Kit, bool], Step]


class Pair(nn.Module):
    """A Dash, its Dot and the folded copies that the Dot keeps to itself; called, it is the Dot."""

    def __init__(self, dash: nn.Module, dot: MorseDot) -> None:
        super().__init__()
        self.dash, self.dot = dash, dot
        self.folded = nn.ModuleDict({k.replace(".", "/"): v for k, v in dot._folded.items()})

    def forward(self, *inputs: Any) -> Tensor:
        """Answer for a step."""
        return self.dot(*inputs)


@dataclass(frozen=True)
class Model:
    """One published UNet and what its pipeline gives it."""

    config: dict[str, Any]

    def unet(self, tiny: bool) -> UNet2DConditionModel:
        """The network, without a checkpoint."""
        build: Any = UNet2DConditionModel
        return build(**{**self.config, **(TINY if tiny else {})}).eval().requires_grad_(False)

    def pair(self, kit: Kit, tiny: bool, dtype: torch.dtype, *, fold: bool) -> Any:
        """The network and an untrained Dot around it, folded to sample or not."""

        def make() -> Pair:
            dash = nn.Module.to(self.unet(tiny), dtype=dtype)
            dot = UNetDot(dash, TINY_SHAPE if tiny else SHAPE).to(dtype)
            return Pair(dash, dot.fold_() if fold else dot)

        # A Dot drops its copies when it is moved; these have been moved with it.
        pair: Any = kit.module(make)
        pair.dot._folded = {k.replace("/", "."): v for k, v in pair.folded.items()}
        return pair

    def latents(self, kit: Kit, tiny: bool, batch: int, dtype: torch.dtype) -> Tensor:
        """What the denoiser sees."""
        side = (TINY if tiny else self.config)["sample_size"]
        return kit.randn(batch, 4, side, side, dtype=dtype)

    def text(self, kit: Kit, batch: int, dtype: torch.dtype) -> dict[str, Any]:
        """What goes with it."""
        width = self.config["cross_attention_dim"]
        cond: dict[str, Any] = {"encoder_hidden_states": kit.randn(batch, 77, width, dtype=dtype)}
        if "addition_embed_type" in self.config:
            pooled, ids = (kit.randn(batch, n, dtype=dtype) for n in (1280, 6))
            cond["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
        return cond


def dash_call(model: Model) -> Build:
    """The network on both halves of one image."""

    def build(kit: Kit, tiny: bool) -> Step:
        dtype = sampling_type(tiny)
        unet = kit.module(lambda: model.unet(tiny), dtype)
        x, text = model.latents(kit, tiny, 2, dtype), model.text(kit, 2, dtype)
        t = time_on(kit, TIMES[0])
        return without_gradients(lambda: unet(x, t, **text))

    return build


def dot_call(model: Model) -> Build:
    """The folded Dot on one image, on the guided estimate."""

    def build(kit: Kit, tiny: bool) -> Step:
        dtype = sampling_type(tiny)
        pair = model.pair(kit, tiny, dtype, fold=True)
        x, z = (model.latents(kit, tiny, 1, dtype) for _ in range(2))
        times = (time_on(kit, t).expand(1).float() for t in TIMES)
        inputs = (x, x, z, *times, {**model.text(kit, 1, dtype), "w": 7.5})
        return without_gradients(lambda: pair(*inputs))

    return build


def sample_step(model: Model, dot_step: bool) -> Build:
    """One call of the hooked denoiser: a Dash step, or the Dot step after it."""

    def build(kit: Kit, tiny: bool) -> Step:
        dtype = sampling_type(tiny)
        pair = model.pair(kit, tiny, dtype, fold=True)
        pipe = SimpleNamespace(
            unet=pair.dash,
            scheduler=DDIMScheduler(),
            do_classifier_free_guidance=True,
            guidance_scale=7.5,
        )
        hook = apply_morse(pipe, ZeroDot(), MorsePlan(2, (0,))).hook
        hook.dot = pair.dot
        x, text = model.latents(kit, tiny, 2, dtype), model.text(kit, 2, dtype)
        t = time_on(kit, TIMES[dot_step])

        # The state of a run at this step; its beginning is a path of its own.
        guidance = Guidance.detect(pipe, pair.dash, x, None, 1, text)
        estimate = model.latents(kit, tiny, 1, torch.float32)
        last = DashEstimate(x=x[1:], z=estimate, t=time_on(kit, TIMES[0]).expand(1).float())
        answer = (x,)

        def step() -> object:
            hook._run = Trajectory(
                scheduler_list=pipe.scheduler.timesteps, times=TIMES, start=0, plan=hook.plan,
                shape=x.shape, dtype=x.dtype, guidance=guidance, calls=int(dot_step),
                last=last, answer=answer,
            )  # fmt: skip
            return pair.dash(x, t, **text, return_dict=False)

        return without_gradients(step)

    return build


def recognition(kit: Kit, tiny: bool) -> Step:
    """The fingerprint of a Dash, taken at every call of a pipeline; here of 10 of its 686 weights."""
    block: Any = kit.module(
        lambda: Model(SD15).unet(tiny).mid_block.resnets[0], sampling_type(tiny)
    )
    return lambda: fingerprint(block)


def guided_dash(kit: Kit, tiny: bool) -> Step:
    """One guided estimate for 8 latents in bf16 autocast; an update asks for two."""
    model = Model(SD15)
    unet = kit.module(lambda: model.unet(tiny))
    process, batch = process_on(kit), batch_for(model, kit, tiny)
    dash = GuidedDash(unet, process, "epsilon", model.text(kit, 1, torch.float32))

    def step() -> object:
        with kit.autocast():
            return dash(batch.clean, batch.draws.t_s, batch.cond, batch.draws.w)

    return without_gradients(step)


def train_step(kit: Kit, tiny: bool, *, free_dash: bool = False) -> Step:
    """One update on 8 latents in bf16 autocast: the Dash twice with guidance, the Dot and back.

    With ``free_dash`` the estimates are there already, and what is left is the Dot's part.
    """
    model = Model(SD15)
    autocast = kit.device.type in ("cpu", "cuda")
    accelerator = accelerator_on(kit.device if autocast else CPU, "bf16" if autocast else "no")
    pair = model.pair(kit, tiny, torch.float32, fold=False)
    dot = pair.dot.train()
    process, batch = process_on(kit), batch_for(model, kit, tiny)
    dash: Any = GuidedDash(pair.dash, process, "epsilon", model.text(kit, 1, torch.float32))
    if free_dash:
        estimate = model.latents(kit, tiny, batch_size(tiny), torch.float32)
        dash = lambda *_: estimate  # noqa: E731

    # The optimizer as it is after its first step.
    optimizer = torch.optim.AdamW(dot.parameters(), lr=1e-4, weight_decay=0.0)
    for weight in dot.parameters():
        moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[weight] = {"step": torch.zeros(()), **moments}
    average = {name: weight.detach().clone() for name, weight in dot.named_parameters()}
    config = LoopConfig(steps=100_000, batch=batch_size(tiny), guidance=SHAPE.guidance)

    def step() -> object:
        losses = update_dot(
            dot, batch, optimizer, dash=dash, process=process, config=config,
            accelerator=accelerator, step=1,
        )  # fmt: skip
        update_average(average, dot, config.ema)
        return losses

    return step


def sampling_type(tiny: bool) -> torch.dtype:
    """The type that both checkpoints are sampled in; a CPU would only emulate it."""
    return torch.float32 if tiny else torch.float16


def batch_size(tiny: bool) -> int:
    """Images of an update."""
    return 2 if tiny else 8


def process_on(kit: Kit) -> Process:
    """A noise schedule of a thousand levels on the device."""
    levels = torch.linspace(0.999, 0.005, 1000, dtype=torch.float64, device=kit.device)
    return Process(family="vp", levels=levels)


def batch_for(model: Model, kit: Kit, tiny: bool) -> Batch:
    """One update's data and random numbers, where the trainer has put them."""
    size = batch_size(tiny)
    clean, noise, fresh = (model.latents(kit, tiny, size, torch.float32) for _ in range(3))
    t_s, t_o, w = (torch.full((size,), v, device=kit.device) for v in (981.0, 961.0, 7.5))
    draws = Draws(t_s=t_s, t_o=t_o, noise=noise, fresh=fresh, w=w)
    return Batch(clean=clean, cond=model.text(kit, size, torch.float32), draws=draws)


def time_on(kit: Kit, value: float) -> Tensor:
    """A time on the device, as a scheduler's list gives it."""
    return torch.full((), int(value), device=kit.device)


def without_gradients(step: Step) -> Step:
    """The step, as a pipeline runs it."""
    return torch.no_grad()(step)


# What the host reads of each call: its time, and whether all values are finite.
READS = {"hook.py:_check_finite": True}
DASH_READS, DOT_READS = (READS | {"hook.py:_locate": t} for t in TIMES)
UPDATE_READS = {"stopping.py:check_finite": 1.0, "trainer.py:update_dot": 1.0}
SD15_MODEL, SDXL_MODEL = Model(SD15), Model(SDXL)

PATHS = [
    HotPath("Dash call, SD 1.5, batch 2", dash_call(SD15_MODEL)),
    HotPath("Dot call, SD 1.5, batch 1", dot_call(SD15_MODEL)),
    HotPath("Dash call, SDXL, batch 2", dash_call(SDXL_MODEL)),
    HotPath("Dot call, SDXL, batch 1", dot_call(SDXL_MODEL)),
    HotPath(
        "sample, Dash step, SD 1.5", sample_step(SD15_MODEL, False),
        allow=DASH_READS, compile=False,
    ),
    HotPath(
        "sample, Dot step, SD 1.5", sample_step(SD15_MODEL, True),
        allow=DOT_READS, compile=False,
    ),
    HotPath(
        "sample, Dash step, SDXL", sample_step(SDXL_MODEL, False),
        allow=DASH_READS, compile=False,
    ),
    HotPath(
        "sample, Dot step, SDXL", sample_step(SDXL_MODEL, True),
        allow=DOT_READS, compile=False,
    ),
    HotPath(
        "train-dot step, SD 1.5, batch 8", train_step, fake="cpu",
        allow=UPDATE_READS, compile=False,
    ),
    HotPath(
        "train-dot, the Dash's two estimates", guided_dash, fake="cpu", scaled=2, compile=False
    ),
    HotPath(
        "train-dot, the Dot's update", partial(train_step, free_dash=True), fake="cpu",
        allow=UPDATE_READS, compile=False,
    ),
    HotPath(
        "fingerprint of SD 1.5, at every call", recognition, scaled=686 / 10,
        allow={"io.py:fingerprint": 1.0}, compile=False,
    ),
]  # fmt: skip

if __name__ == "__main__":
    main("morse_diffusion", PATHS)
