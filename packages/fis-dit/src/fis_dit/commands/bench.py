"""The ``bench`` command: seconds of dense and sparse forwards at full shapes, with random weights."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from effml_common.device import device_name, resolve_device, synchronize
from effml_common.errors import InputError
from effml_common.logging import progress, say
from effml_common.report import Report, Row, environment, write_report
from fis_dit.adapters.apply import apply_fis
from fis_dit.adapters.pipelines import with_defaults
from fis_dit.adapters.registry import find_adapter
from fis_dit.config import BenchConfig, FISConfig
from fis_dit.method.cost import BlockShape, flops

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
    device, started = resolve_device(config.device), time.monotonic()
    architecture = ARCHITECTURES[config.arch]
    adapter = find_adapter(architecture.model)
    settings = {name: _setting(name, architecture.dense_ends) for name in config.settings}
    _refuse_or_estimate(config, architecture, device)

    # Text padding is trimmed in every arm where that is exact.
    model, inputs = build(architecture, device)
    trims = FISConfig(stride=1, drop_text_padding=adapter.trims_text)
    arms: dict[str, FISConfig] = {"dense": trims}
    arms |= {k: replace(v, drop_text_padding=adapter.trims_text) for k, v in settings.items()}
    measured = _measure(config, model, inputs, arms, device)

    depth = len(getattr(model, adapter.blocks))
    shape = adapter.shape(model.config)
    if config.arch == "tiny":
        shape = replace(shape, text=8)
    notes = [f"{depth} blocks, {architecture.dense_ends} dense at each end; one forward, batch 1"]
    report = Report(
        package="fis-dit",
        version=version("fis-dit"),
        command=sys.argv,
        seeds=[0],
        seconds=time.monotonic() - started,
        rows=_rows(config.arch, shape, depth, arms, measured),
        notes=notes,
        environment=environment(("diffusers",), device_name(device)),
    )
    out = Path(config.out or time.strftime("runs/bench-%Y%m%d-%H%M%S"))
    (out / "run").mkdir(parents=True, exist_ok=True)
    write_report(report, out / "run")
    return report


def _rows(
    arch: str,
    shape: BlockShape,
    depth: int,
    arms: Mapping[str, FISConfig],
    measured: Mapping[str, "Measured"],
) -> list[Row]:
    frames, tokens = ARCHITECTURES[arch].geometry
    dense_seconds, rows = statistics.median(measured["dense"].seconds), list[Row]()
    for name, setting in arms.items():
        # What the FLOPs model promises, and what the clock says.
        counted = setting if name != "dense" else FISConfig(blocks=())
        cost, arm = flops(shape, counted, depth, frames, tokens), measured[name]
        seconds = statistics.median(arm.seconds)
        metrics: dict[str, list[float]] = {
            "seconds": arm.seconds,
            "speed-up": [dense_seconds / value for value in arm.seconds],
            "by FLOPs": [cost.speedup],
            "share of it": [dense_seconds / seconds / cost.speedup],
            "TFLOP/s": [cost.sparse / seconds / 1e12],
        }
        if arm.peak_gib:
            metrics["peak GiB"] = [max(arm.peak_gib)]
        rows.append(Row(name, f"{arch}, {frames} x {tokens} tokens", metrics))
    return rows


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


def _refuse_or_estimate(
    config: BenchConfig, architecture: Architecture, device: torch.device
) -> None:
    """Say how long it takes on the CPU, or refuse where that is hours."""
    if device.type != "cpu":
        return
    frames, tokens = architecture.geometry
    values = with_defaults(architecture.model, architecture.settings)
    shape = find_adapter(architecture.model).shape(values)
    dense = flops(shape, FISConfig(blocks=()), values["num_layers"], frames, tokens).dense
    runs = (len(config.settings) + 1) * (config.repeats + config.warmup)
    seconds, gib = dense / CPU_FLOPS, architecture.parameters * 4 + 2
    if config.arch != "tiny":
        raise InputError(
            f"{config.arch} on the CPU would take about {seconds / 3600:.1f} hours a forward and "
            f"{gib:.0f} GiB; use --device cuda, or --arch tiny"
        )
    say(f"estimate: {runs} forwards, about {runs * seconds * 0.7 / 60:.1f} min, under 2 GiB")


def build(
    architecture: Architecture, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[Any, dict[str, Any]]:
    """A model with random weights and the arguments of one forward.

    Args:
        architecture: Its shapes.
        device: Of both.
        dtype: As in ``make_transformer``; default bfloat16, on the CPU float32.
    """
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    torch.manual_seed(0)
    with torch.device(device):
        model = make_transformer(architecture, dtype)
    return model, forward_inputs(
        architecture, model, lambda *shape: torch.randn(*shape, device=device, dtype=dtype)
    )


def make_transformer(architecture: Architecture, dtype: torch.dtype) -> Any:
    """A transformer with random weights on torch's default device, frozen.

    Args:
        architecture: Its shapes.
        dtype: Of the weights, save those that diffusers keeps in float32.
    """
    import diffusers

    # Made in its final type, as diffusers loads it: in float32 A14B would need 57 GB on the way.
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = getattr(diffusers, architecture.model)(**architecture.settings)
    finally:
        torch.set_default_dtype(default)
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, parameter in model.named_parameters():
        if any(part in name for part in kept):
            parameter.data = parameter.data.float()
    return model.eval().requires_grad_(False)


def forward_inputs(
    architecture: Architecture, model: Any, noise: Callable[..., torch.Tensor]
) -> dict[str, Any]:
    """Arguments of one forward, of one sample.

    Args:
        architecture: Of the model.
        model: The transformer.
        noise: Makes a tensor of a shape; the others follow its device and type.
    """
    hidden = noise(1, *architecture.latent)
    device, dtype = hidden.device, hidden.dtype
    inputs: dict[str, Any] = {
        "hidden_states": hidden,
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
    return inputs


@dataclass
class Measured:
    """Of every timed forward of an arm: seconds, and peak memory in GiB where the device tells it."""

    seconds: list[float] = field(default_factory=list)
    peak_gib: list[float] = field(default_factory=list)


@torch.no_grad()
def _measure(
    config: BenchConfig,
    model: Any,
    inputs: dict[str, Any],
    arms: dict[str, FISConfig],
    device: torch.device,
) -> dict[str, Measured]:
    """Time every forward; arms take turns, so that a busy machine hits all alike."""
    measured = {name: Measured() for name in arms}
    memory = {"cuda": torch.cuda, "xpu": torch.xpu}.get(device.type)
    with progress("timing", len(arms) * (config.repeats + config.warmup)) as bar:
        for repeat in range(config.warmup + config.repeats):
            for name, setting in arms.items():
                with apply_fis(model, setting):
                    synchronize(device)
                    if memory is not None:
                        memory.reset_peak_memory_stats(device)
                    start = time.perf_counter()
                    model(**inputs)
                    synchronize(device)
                    seconds = time.perf_counter() - start
                if repeat >= config.warmup:
                    measured[name].seconds.append(seconds)
                    if memory is not None:
                        measured[name].peak_gib.append(memory.max_memory_allocated(device) / 2**30)
                bar.advance()
    return measured
