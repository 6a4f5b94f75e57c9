"""sliderquant and what a user would install instead: one function per library and method.

Each takes a float32 model in memory and the calibration tokens, quantizes through the library's own
public functions, and returns the model that the library left behind. Settings of the peers are those
that their own examples recommend, on CPU and in float32; grids are asymmetric and as wide as asked.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.rounding import ActivationRounding
from sliderquant.adapters.simulation import merge_
from sliderquant.commands.inspect import make_plan
from sliderquant.config import FULL_BITS, SliderConfig
from sliderquant.demo.arms import calibrated_weights
from sliderquant.method.activations import ActivationFormat
from sliderquant.method.quantizer import WeightFormat
from sliderquant.method.round_to_nearest import rtn_weights

HEAD = "lm_head"
ROUNDED = 0.01  # relative change by 4-bit activations is near 0.1, that of float32 near 1e-7


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """How weights and activations are stored, the same for every method.

    Attributes:
        bits: Bits per weight; asymmetric grids.
        group: Input columns per scale; ``None`` for one scale per output row.
        abits: Bits per activation, rounded per token at run time, asymmetric; 16 leaves them.
    """

    bits: int
    group: int | None
    abits: int = FULL_BITS


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What a method gets to work with.

    Attributes:
        model: Full precision, float32, eval mode; may be changed in place.
        tokenizer: Its tokenizer.
        samples: Calibration tokens.
        grid: What to round to.
        options: The method's own, from the command line.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    samples: Int[Tensor, "n t"]
    grid: Grid
    options: Mapping[str, Any]


def why_not(method: str, grid: Grid) -> str | None:
    """Return why a library has no such grid, or ``None`` where it has."""
    if grid.abits == FULL_BITS:
        return None
    reasons = {
        "hqq": "it rounds weights only",
        "torchao": "it rounds activations to 8 bits or not at all",
    }
    return reasons.get(method)


def rtn(task: Task) -> tuple[PreTrainedModel, str]:
    """Round to nearest, without calibration: the package's own baseline."""
    decoder = TransformersDecoder(task.model)
    fmt = WeightFormat(
        bits=task.grid.bits, group_size=task.grid.group, sym=False, dtype=torch.float32
    )
    merge_(decoder, [rtn_weights(decoder, block, fmt) for block in range(decoder.depth)])
    _round_activations_(task)
    return task.model, "no calibration"


def slider(task: Task) -> tuple[PreTrainedModel, str]:
    """The package's own methods, with the settings in ``options["config"]``."""
    decoder = TransformersDecoder(task.model)
    config = SliderConfig(**task.options["config"])
    merge_(decoder, calibrated_weights(decoder, task.samples, config, "sliderquant"))
    _round_activations_(task)
    if config.method == "compensated":
        return task.model, "compensated rounding, no windows"
    visits = make_plan(config, None, decoder.depth).block_visits
    first = "compensated rounding, then " if config.method == "combined" else ""
    return task.model, f"{first}{visits} block visits x {config.window_epochs} epochs"


def epochs_in(task: Task, seconds: float) -> int:
    """Return how many epochs fit into a CPU time, by one run of the fewest epochs there can be."""
    config = SliderConfig(**task.options["config"])
    fewest = replace(config, epochs=config.stages)
    begin = time.process_time()
    calibrated_weights(TransformersDecoder(task.model), task.samples, fewest, "timing")
    return config.stages * max(1, round(seconds / (time.process_time() - begin)))


def _round_activations_(task: Task) -> None:
    """Round the inputs of all linear layers from now on, if the grid says so."""
    if task.grid.abits < FULL_BITS:
        fmt = ActivationFormat(bits=task.grid.abits, sym=False)
        ActivationRounding(task.model.model.layers, task.model.config, fmt)


def torchao(task: Task) -> tuple[PreTrainedModel, str]:
    """Round to nearest with torchao's arbitrary-width integer tensors."""
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]
        IntxWeightOnlyConfig,
        MappingType,
        PerAxis,
        PerGroup,
        quantize_,
    )

    grid = task.grid
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{grid.bits}"),
        granularity=PerGroup(grid.group) if grid.group else PerAxis(0),
        mapping_type=MappingType.ASYMMETRIC,
    )
    quantize_(
        task.model, config, lambda module, name: isinstance(module, nn.Linear) and name != HEAD
    )
    return task.model, "quantize_(IntxWeightOnlyConfig, asymmetric)"


def hqq(task: Task) -> tuple[PreTrainedModel, str]:
    """Half-quadratic optimization of zero points; they stay real numbers, as HQQ stores them."""
    from hqq.core.quantize import BaseQuantizeConfig  # pyright: ignore[reportMissingImports]
    from hqq.models.hf.base import AutoHQQHFModel  # pyright: ignore[reportMissingImports]

    # Groups along the input columns, as in every other method and in HQQ's own fast kernels.
    config = BaseQuantizeConfig(nbits=task.grid.bits, group_size=task.grid.group, axis=1)
    AutoHQQHFModel.quantize_model(task.model, config, compute_dtype=torch.float32, device="cpu")
    return task.model, "AutoHQQHFModel.quantize_model(axis=1), real-valued zero points"


def gptq(task: Task) -> tuple[PreTrainedModel, str]:
    """GPTQ of llm-compressor."""
    from llmcompressor.modifiers.gptq import GPTQModifier  # pyright: ignore[reportMissingImports]

    recipe = [GPTQModifier(config_groups=_scheme(task.grid), ignore=[HEAD])]
    return _oneshot(task, recipe), "GPTQModifier: damping 0.01, static activation order"


def smoothquant_gptq(task: Task) -> tuple[PreTrainedModel, str]:
    """SmoothQuant and then GPTQ, llm-compressor's recipe for rounded activations."""
    from llmcompressor.modifiers.gptq import GPTQModifier  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.transform.smoothquant import (  # pyright: ignore[reportMissingImports]
        SmoothQuantModifier,
    )
    from llmcompressor.modifiers.transform.smoothquant.utils import (  # pyright: ignore[reportMissingImports]
        DEFAULT_SMOOTHQUANT_MAPPINGS,
    )

    # With norms behind the layers, what llm-compressor takes for the MLP's norm is that of the
    # attention's output, where scaling would change the function.
    behind_norms = list(DEFAULT_SMOOTHQUANT_MAPPINGS)
    if any(name.endswith(PRE_MLP_NORM) for name, _ in task.model.named_modules()):
        behind_norms[1] = (behind_norms[1][0], f"re:.*{PRE_MLP_NORM}")
    mappings = [*behind_norms, INSIDE_MLP] if task.options["inside"] else behind_norms
    recipe = [
        SmoothQuantModifier(smoothing_strength=0.8, mappings=mappings),
        GPTQModifier(config_groups=_scheme(task.grid), ignore=[HEAD]),
    ]
    places = "behind norms" + (" and inside the MLP" if task.options["inside"] else "")
    return _oneshot(task, recipe), f"SmoothQuantModifier(0.8), {places}; GPTQModifier"


def awq(task: Task) -> tuple[PreTrainedModel, str]:
    """AWQ of llm-compressor: channel scales from activations, then round-to-nearest."""
    from llmcompressor.modifiers.quantization import (  # pyright: ignore[reportMissingImports]
        QuantizationModifier,
    )
    from llmcompressor.modifiers.transform.awq import (  # pyright: ignore[reportMissingImports]
        AWQModifier,
    )
    from llmcompressor.pipelines.cache import (  # pyright: ignore[reportMissingImports]
        IntermediatesCache,
    )

    if not torch.cuda.is_available():
        # It pins memory for faster copies to a GPU, and fails where there is none (0.14.0.1).
        IntermediatesCache.pin_memory = lambda *_: None
    recipe = [
        AWQModifier(duo_scaling="both"),
        QuantizationModifier(config_groups=_scheme(task.grid), ignore=[HEAD]),
    ]
    return _oneshot(task, recipe), "AWQModifier(duo_scaling=both), QuantizationModifier"


def _scheme(grid: Grid) -> dict[str, Any]:
    """Return llm-compressor's description of the grid, for all linear layers."""
    weights = {
        "num_bits": grid.bits,
        "symmetric": False,
        "strategy": "group" if grid.group else "channel",
        "group_size": grid.group,
    }
    scheme: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    if grid.abits < FULL_BITS:
        scheme["input_activations"] = {
            "num_bits": grid.abits,
            "symmetric": False,
            "strategy": "token",
            "dynamic": True,
        }
    return {"group_0": scheme}


def _oneshot(task: Task, recipe: list[Any]) -> PreTrainedModel:
    """Run a recipe of llm-compressor on the calibration tokens, in their order."""
    from datasets import Dataset
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]

    tokens = {
        "input_ids": task.samples.tolist(),
        "attention_mask": torch.ones_like(task.samples).tolist(),
    }
    return oneshot(
        model=task.model,
        tokenizer=task.tokenizer,
        dataset=Dataset.from_dict(tokens),
        recipe=recipe,
        num_calibration_samples=len(task.samples),
        max_seq_length=task.samples.shape[1],
        batch_size=task.options["batch_size"],
        shuffle_calibration_samples=False,
    )


def autoround(task: Task) -> tuple[PreTrainedModel, str]:
    """AutoRound: rounding and clipping by signed gradients, one block at a time."""
    from auto_round import AutoRound  # pyright: ignore[reportMissingImports]

    grid, options = task.grid, task.options
    scheme: dict[str, Any] = {"bits": grid.bits, "group_size": grid.group or -1, "sym": False}
    if grid.abits < FULL_BITS:
        scheme |= {"act_bits": grid.abits, "act_group_size": -1, "act_sym": False}
        scheme |= {"act_data_type": "int_asym", "act_dynamic": True}
    rounder = AutoRound(
        task.model,
        task.tokenizer,
        scheme={"data_type": "int", **scheme},
        dataset=list(task.samples.split(options["batch_size"])),
        iters=options["iters"],
        nsamples=len(task.samples),
        seqlen=task.samples.shape[1],
        batch_size=options["batch_size"],
        lr=options.get("lr"),  # its own choice: one over the number of iterations
        enable_torch_compile=False,
        device_map="cpu",
        seed=options["seed"],
        # Its default is bfloat16, in which it would also return the layers that stay unrounded.
        amp=False,
        **({"enable_alg_ext": True} if options["extended"] else {}),
    )
    model, _ = rounder.quantize()
    settings = f"{options['iters']} iterations of {options['batch_size']} samples, not compiled"
    if options.get("lr") is not None:
        settings += f", rate {options['lr']:g}"
    return model, settings + (", enable_alg_ext" if options["extended"] else "")


# What SmoothQuant leaves out on its own: layers whose inputs are smoothed, and the one in front.
INSIDE_MLP = (["re:.*down_proj"], "re:.*up_proj")
PRE_MLP_NORM = (
    "pre_feedforward_layernorm"  # the MLP's, where another norm stands behind the attention
)
METHODS = {
    "rtn": rtn,
    "torchao": torchao,
    "hqq": hqq,
    "gptq": gptq,
    "smoothquant-gptq": smoothquant_gptq,
    "awq": awq,
    "autoround": autoround,
    "slider": slider,
}
# Distribution and module of each; imported before the clock starts.
LIBRARIES = {
    "rtn": ("sliderquant", "sliderquant"),
    "torchao": ("torchao", "torchao.quantization"),
    "hqq": ("hqq", "hqq.models.hf.base"),
    "gptq": ("llmcompressor", "llmcompressor"),
    "smoothquant-gptq": ("llmcompressor", "llmcompressor"),
    "awq": ("llmcompressor", "llmcompressor"),
    "autoround": ("auto-round", "auto_round"),
    "slider": ("sliderquant", "sliderquant"),
}


def columns_of(model: PreTrainedModel) -> dict[str, int]:
    """Return the number of input columns of every linear layer that is to be rounded, by name."""
    return {
        name: layer.in_features
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name != HEAD
    }


@torch.no_grad()
def check_rounded(model: PreTrainedModel, columns: Mapping[str, int], grid: Grid) -> None:
    """Refuse a model whose linear layers do not compute with rounded weights and activations.

    Weights are read off a layer's answers to unit vectors, so that it does not matter how a library
    keeps them. Between unit vectors a grid per token is the same, so rounding of activations does
    not disturb them.

    Args:
        model: What a method returned.
        columns: Input columns of every layer, from ``columns_of`` the full-precision model.
        grid: What was asked for.

    Raises:
        ValueError: Naming the layer.
    """
    generator = torch.Generator().manual_seed(0)
    for name, width in columns.items():
        layer = model.get_submodule(name)
        weight = layer(torch.eye(width)).T
        ordered = weight.reshape(-1, grid.group or width).sort(dim=-1).values
        distinct = 1 + int((ordered.diff(dim=-1) != 0).sum(dim=-1).max())
        if distinct > 2**grid.bits:
            raise ValueError(f"{name} has {distinct} values in a group, not {2**grid.bits}")
        x = torch.randn(32, width, generator=generator)
        exact = x @ weight.T
        error = float((layer(x) - exact).norm() / exact.norm())
        if (error > ROUNDED) is (grid.abits == FULL_BITS):
            raise ValueError(f"{name}: answers to random inputs are off by {error:.1e}")
