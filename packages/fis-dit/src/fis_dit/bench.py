"""The ``bench`` command: seconds of dense and sparse forwards at full shapes, with random weights."""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from effml_common.errors import InputError
from effml_common.logging import progress, say
from effml_common.report import Report, Row, environment, write_report
from fis_dit.adapters.apply import apply_fis
from fis_dit.adapters.table import adapter_of
from fis_dit.config import BenchConfig, FISConfig
from fis_dit.cost import flops

CPU_FLOPS = 3e10  # per second and core in float32, for the estimate only


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Shapes of a released model (or of a small stand-in) and of its clip.

    Attributes:
        model: Transformer class.
        settings: Its arguments, where they differ from the defaults.
        latent: (channels, frames, height, width) of the latent.
        geometry: Frames and tokens per frame.
        parameters: In billions.
        dense_ends: Dense blocks at each end.
    """

    model: str
    settings: dict[str, Any]
    latent: tuple[int, int, int, int]
    geometry: tuple[int, int]
    parameters: float
    dense_ends: int


ARCHITECTURES = {
    "tiny": Architecture(
        model="WanTransformer3DModel",
        settings={
            "num_attention_heads": 4,
            "attention_head_dim": 64,
            "ffn_dim": 1024,
            "num_layers": 4,
            "text_dim": 64,
        },
        latent=(16, 21, 28, 28),
        geometry=(21, 196),
        parameters=0.005,
        dense_ends=0,
    ),
    "wan-a14b": Architecture(
        model="WanTransformer3DModel",
        settings={},
        latent=(16, 21, 90, 160),
        geometry=(21, 3600),
        parameters=14.29,
        dense_ends=3,
    ),
    "wan-5b": Architecture(
        model="WanTransformer3DModel",
        settings={
            "num_attention_heads": 24,
            "ffn_dim": 14336,
            "num_layers": 30,
            "in_channels": 48,
            "out_channels": 48,
        },
        latent=(48, 31, 44, 80),
        geometry=(31, 880),
        parameters=5.0,
        dense_ends=2,
    ),
    "hy15": Architecture(
        model="HunyuanVideo15Transformer3DModel",
        settings={"task_type": "t2v"},
        latent=(65, 31, 45, 80),
        geometry=(31, 3600),
        parameters=8.33,
        dense_ends=4,
    ),
}


def bench(config: BenchConfig) -> Report:
    """Time dense and sparse forwards, interleaved, and compare with the FLOPs model.

    Raises:
        InputError: If the device is not there, or is the CPU and the model is not ``tiny``.
    """
    started, architecture = time.monotonic(), ARCHITECTURES[config.arch]
    adapter, device = adapter_of(architecture.model), torch.device(config.device)
    settings = {name: _setting(name, architecture.dense_ends) for name in config.settings}
    _refuse(config, architecture, len(settings))
    model, inputs = _build(architecture, device)
    shape, (frames, tokens) = adapter.shape(model.config), architecture.geometry
    if config.arch == "tiny":
        shape = replace(shape, text=8)
    depth = len(getattr(model, adapter.blocks))
    trims = FISConfig(stride=1, drop_text_padding=adapter.trims_text)
    arms: dict[str, FISConfig] = {"dense": trims}
    arms |= {k: replace(v, drop_text_padding=adapter.trims_text) for k, v in settings.items()}
    seconds = _measure(config, model, inputs, arms)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rows = []
    for name, setting in arms.items():
        cost = flops(
            shape, setting if name != "dense" else FISConfig(blocks=()), depth, frames, tokens
        )
        predicted, measured = cost.speedup, median["dense"] / median[name]
        metrics = {
            "seconds": seconds[name],
            "speed-up": [median["dense"] / value for value in seconds[name]],
            "by FLOPs": [predicted],
            "share of it": [measured / predicted],
            "TFLOP/s": [cost.sparse / median[name] / 1e12],
        }
        rows.append(Row(name, f"{config.arch}, {frames} x {tokens} tokens", metrics))
    notes = [f"{depth} blocks, {architecture.dense_ends} dense at each end; one forward, batch 1"]
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        notes.append(f"{torch.cuda.get_device_name(device)}, peak memory {peak:.1f} GiB")
    report = Report(
        package="fis-dit",
        version=version("fis-dit"),
        command=sys.argv,
        seeds=[0],
        seconds=time.monotonic() - started,
        rows=rows,
        notes=notes,
        environment=environment(("diffusers",), config.device),
    )
    out = Path(config.out or time.strftime("runs/bench-%Y%m%d-%H%M%S"))
    (out / "run").mkdir(parents=True, exist_ok=True)
    write_report(report, out / "run")
    return report


def _setting(name: str, dense_ends: int) -> FISConfig:
    sites, _, rest = name.partition("-n")
    stride, _, full = rest.partition("-")
    return FISConfig(
        stride=int(stride),
        sites=sites,  # pyright: ignore[reportArgumentType]
        kv="full" if full else "anchor",
        dense_head=dense_ends,
        dense_tail=dense_ends,
    )


def _refuse(config: BenchConfig, architecture: Architecture, settings: int) -> None:
    device = torch.device(config.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {config.device} is not there; use a machine with CUDA, or cpu")
    frames, tokens = architecture.geometry
    from fis_dit.adapters.pipelines import _with_defaults

    values = _with_defaults(architecture.model, architecture.settings)
    shape = adapter_of(architecture.model).shape(values)
    dense = flops(shape, FISConfig(blocks=()), values["num_layers"], frames, tokens).dense
    runs = (settings + 1) * (config.repeats + config.warmup)
    seconds, gib = dense / CPU_FLOPS, architecture.parameters * 4 + 2
    if device.type == "cpu" and config.arch != "tiny":
        raise InputError(
            f"{config.arch} on the CPU would take about {seconds / 3600:.1f} hours a forward and "
            f"{gib:.0f} GiB; use --device cuda, or --arch tiny"
        )
    if device.type == "cpu":
        say(f"estimate: {runs} forwards, about {runs * seconds * 0.7 / 60:.1f} min, under 2 GiB")


def _build(architecture: Architecture, device: torch.device) -> tuple[Any, dict[str, Any]]:
    import diffusers

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = getattr(diffusers, architecture.model)(**architecture.settings)
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, parameter in model.named_parameters():
        if not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)
    model.eval().requires_grad_(False)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    inputs: dict[str, Any] = {
        "hidden_states": noise(1, *architecture.latent),
        "timestep": torch.full((1,), 500.0, device=device),
        "return_dict": False,
    }
    if architecture.model == "HunyuanVideo15Transformer3DModel":
        inputs |= {
            "timestep": inputs["timestep"].to(dtype),
            "encoder_hidden_states": noise(1, 1000, 3584),
            "encoder_attention_mask": torch.ones(1, 1000, dtype=torch.long, device=device),
            "encoder_hidden_states_2": noise(1, 256, 1472),
            "encoder_attention_mask_2": torch.ones(1, 256, dtype=torch.long, device=device),
            "image_embeds": torch.zeros(1, 729, 1152, device=device, dtype=dtype),
        }
    else:
        width = model.config.text_dim
        inputs["encoder_hidden_states"] = noise(1, 8 if width == 64 else 512, width)
    if architecture.model == "WanTransformer3DModel" and architecture.latent[0] == 48:
        # TI2V-5B: a time step per token.
        total = architecture.geometry[0] * architecture.geometry[1]
        inputs["timestep"] = inputs["timestep"].expand(1, total).contiguous()
    return model, inputs


@torch.no_grad()
def _measure(
    config: BenchConfig, model: Any, inputs: dict[str, Any], arms: dict[str, FISConfig]
) -> dict[str, list[float]]:
    """Seconds of every forward; arms take turns, so that a busy machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    timer = _cuda_seconds if torch.device(config.device).type == "cuda" else _cpu_seconds
    with progress("timing", len(arms) * (config.repeats + config.warmup)) as bar:
        for repeat in range(config.warmup + config.repeats):
            for name, setting in arms.items():
                with apply_fis(model, setting):
                    value = timer(lambda: model(**inputs))
                if repeat >= config.warmup:
                    seconds[name].append(value)
                bar.advance()
    return seconds


def _cpu_seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _cuda_seconds(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000
