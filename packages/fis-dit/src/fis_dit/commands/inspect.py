"""The ``inspect`` command: what a setting would cost on a model, without one weight."""

from dataclasses import dataclass, replace
from typing import Any

from fis_dit.adapters.apply import clip_geometry
from fis_dit.adapters.pipelines import read_plan, read_transformer_config
from fis_dit.adapters.registry import find_adapter
from fis_dit.config import FISConfig, InspectConfig
from fis_dit.method.anchors import choose_anchors
from fis_dit.method.cost import Cost, flops

STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What ``inspect`` found; prints as a table.

    Attributes:
        model_class: Transformer class.
        parameters: Of the transformer.
        frames: Latent frames F.
        tokens: Tokens per frame P.
        depth: Number of blocks.
        config: The setting.
        cost: Per run of four steps.
        anchor_sets: Of every phase.
    """

    model_class: str
    parameters: int
    frames: int
    tokens: int
    depth: int
    config: FISConfig
    cost: Cost
    width: int
    anchor_sets: tuple[tuple[int, ...], ...]

    @property
    def memory(self) -> dict[str, float]:
        """GiB in bfloat16: weights, and one block's activations dense and sparse (16 widths each)."""
        total = self.frames * self.tokens
        share = max(self.cost.counts) / self.frames if self.config.sites == "block" else 1.0
        dense = 16 * total * self.width * 2 / 2**30
        return {
            "weights": self.parameters * 2 / 2**30,
            "activations_dense": dense,
            "activations_sparse": dense * share + 2 * total * self.width * 2 / 2**30,
        }

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            "model_class": self.model_class,
            "parameters": self.parameters,
            "frames": self.frames,
            "tokens_per_frame": self.tokens,
            "depth": self.depth,
            "sparse_blocks": list(self.config.sparse_blocks(self.depth)),
            "anchors": [list(a) for a in self.anchor_sets],
            "dense_pflop": self.cost.dense / STEPS / 1e15,
            "sparse_pflop": self.cost.sparse / STEPS / 1e15,
            "speedup_per_block": self.cost.per_block,
            "speedup": self.cost.speedup,
            "memory_gib": self.memory,
        }

    def __rich__(self) -> Any:
        from rich.table import Table

        d = self.to_json()
        table = Table("what", "value", title=f"{self.model_class}, stride {self.config.stride}")
        table.add_row("parameters", f"{self.parameters / 1e9:.2f} billion")
        table.add_row("latent frames x tokens", f"{self.frames} x {self.tokens}")
        table.add_row("sparse blocks", f"{len(d['sparse_blocks'])} of {self.depth}")
        for residue, chosen in enumerate(self.anchor_sets):
            table.add_row(f"anchors, residue {residue}", " ".join(map(str, chosen)))
        dense, sparse = d["dense_pflop"], d["sparse_pflop"]
        table.add_row("PFLOP per forward, dense / FIS", f"{dense:.4g} / {sparse:.4g}")
        table.add_row("speed-up per sparse block", f"{self.cost.per_block:.2f}x")
        table.add_row("speed-up of the transformer", f"{self.cost.speedup:.2f}x (by FLOPs)")
        for name, value in self.memory.items():
            table.add_row(f"GiB in bfloat16, {name.replace('_', ' ')}", f"{value:.3g}")
        return table


def inspect(config: InspectConfig) -> Inspection:
    """Predict cost and memory of a model at a clip size; builds the model on the meta device.

    Raises:
        InputError: If the config cannot be read or the class has no adapter.
        ConfigError: If the plan does not fit the model.
    """
    name, values, compression = read_transformer_config(config.model)
    adapter, depth = find_adapter(name), values["num_layers"]
    chosen = read_plan(config.plan) or FISConfig.from_preset(config.preset)
    if config.stride is not None:
        chosen = replace(chosen, stride=config.stride)
    clip = (config.num_frames, config.height, config.width)
    frames, height, width = clip_geometry(adapter, values, clip, compression)
    tokens, shape = height * width, adapter.shape(values)
    phases = range(min(chosen.stride, frames))
    return Inspection(
        model_class=name,
        parameters=_parameters(name, values),
        frames=frames,
        tokens=tokens,
        depth=depth,
        config=chosen,
        cost=flops(shape, chosen, depth, frames, tokens, STEPS),
        width=shape.width,
        anchor_sets=tuple(
            choose_anchors(
                frames, chosen.stride, r, boundaries=chosen.boundaries, equalize=chosen.equalize
            )
            for r in phases
        ),
    )


def _parameters(name: str, values: dict[str, Any]) -> int:
    import diffusers
    import torch

    with torch.device("meta"):
        model = getattr(diffusers, name)(**values)
    return sum(parameter.numel() for parameter in model.parameters())
