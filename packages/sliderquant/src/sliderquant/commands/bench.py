"""The ``bench`` command: tokens per second of a packed model and of its dense twin, on your device."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from effml_common.device import resolve_device, synchronize
from effml_common.folders import run_folder
from effml_common.logging import Progress
from effml_common.parsing import require
from effml_common.report import Report, ReportBuilder, Row
from sliderquant.adapters.hub import model_directory
from sliderquant.adapters.native import load
from sliderquant.config import BenchConfig
from sliderquant.method.packed import PackedLinear
from sliderquant.method.quantizer import QuantizedWeight

NOTES = {
    "torch": "packed layers were timed in plain PyTorch, which dequantizes the weight at every pass "
    "(the Triton kernel needs a GPU)",
    "triton": "packed layers were timed with the Triton kernel, which multiplies up to 8 rows without "
    "writing the weight out; longer prompts dequantize it",
}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens per second of one pass.

    Attributes:
        prefill: Of the prompt, all tokens at once.
        decode: Of greedy generation with a cache, one token at a time.
    """

    prefill: float
    decode: float


def bench(config: BenchConfig) -> Report:
    """Time a native model against the same model with dequantized weights, in turns.

    Returns:
        The report: one row per model, one value per repetition.

    Raises:
        InputError: If the directory is no native model, the device is not there, or the model cannot
            read as many tokens.
    """
    # The same model twice: packed, and with its weights written out.
    builder = ReportBuilder("sliderquant", ("transformers",))
    run_dir = run_folder(config.out, "bench") / "run"
    device = resolve_device(config.device)
    kernel = kernel_on(device)
    directory = model_directory(config.model)
    packed = load(directory, device, kernel=kernel)
    dense = unpack_layers_(load(directory, device))
    models = {"packed": packed, "dense": dense}

    # Both read the same random prompt.
    prompt = _random_prompt(config, packed)

    # They take turns, so that a busy machine slows both.
    speeds: dict[str, list[Speed]] = {name: [] for name in models}
    with Progress("timing", 2 * (config.repeats + 1)) as bar:
        for turn in range(config.repeats + 1):
            for name, model in models.items():
                speed = measure(model, prompt.to(device), config.tokens)
                if turn:  # the first turn warms up
                    speeds[name].append(speed)
                bar.advance()

    # One value per repetition.
    rows = [
        Row(
            name,
            f"prompt {prompt.shape[1]}, batch 1, {packed.dtype}",
            {
                "prefill tokens/s": [s.prefill for s in speeds[name]],
                "decode tokens/s": [s.decode for s in speeds[name]],
                "weights MB": [held_bytes(model) / 1e6],
            },
        )
        for name, model in models.items()
    ]
    return builder.write(
        run_dir,
        rows,
        device=str(device),
        notes=[f"the two models took turns; {NOTES[kernel]}"],
    )


def _random_prompt(config: BenchConfig, model: PreTrainedModel) -> Tensor:
    """Return a prompt [1, t] that leaves room for the tokens behind it."""
    context = model.config.max_position_embeddings
    require(
        config.tokens < context,
        f"tokens is {config.tokens}, and the model reads {context} with the prompt",
        "lower --tokens",
    )
    length = min(config.prompt, context - config.tokens)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (1, length), generator=generator)


def kernel_on(device: torch.device) -> Literal["torch", "triton"]:
    """Return how packed layers multiply few rows on a device: Triton's kernel needs a GPU."""
    return "triton" if device.type == "cuda" else "torch"


def unpack_layers_(
    model: PreTrainedModel,
    values_of: Callable[[QuantizedWeight], Tensor] = QuantizedWeight.dequantize,
) -> PreTrainedModel:
    """Replace packed linear layers by dense ones, in place.

    Args:
        model: From ``load``.
        values_of: Returns the values of a weight; default those that it has when it runs.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            # In the type that the model computes in, which codes for llama.cpp do not have.
            weight = values_of(module.unpack()).to(module.get_buffer("like").dtype)
            linear = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            linear.bias = module.bias
            model.set_submodule(name, linear)
    return model


def held_bytes(model: nn.Module) -> int:
    """Return the memory of parameters and buffers; tied ones count once."""
    held = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    return sum(held.values())


@torch.no_grad()
def measure(model: PreTrainedModel, prompt: Tensor, tokens: int) -> Speed:
    """Time one prompt and ``tokens`` greedy steps behind it."""

    def measure_seconds(run: Callable[[], object]) -> float:
        synchronize(prompt.device)
        begin = time.perf_counter()
        run()
        synchronize(prompt.device)
        return time.perf_counter() - begin

    state: dict[str, object] = {}

    def prefill() -> None:
        out = model(input_ids=prompt, use_cache=True)
        state["cache"], state["next"] = out.past_key_values, out.logits[:, -1:].argmax(-1)

    def decode() -> None:
        for _ in range(tokens):
            out = model(input_ids=state["next"], past_key_values=state["cache"], use_cache=True)
            state["next"] = out.logits[:, -1:].argmax(-1)

    return Speed(
        prefill=prompt.shape[1] / measure_seconds(prefill), decode=tokens / measure_seconds(decode)
    )
