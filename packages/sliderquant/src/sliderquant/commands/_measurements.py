"""The rows of ``quantize``'s report: the result, beside full precision and round-to-nearest."""

from collections.abc import Callable

import torch
from torch import Tensor

from effml_common.report import Row
from sliderquant.commands._job import Job
from sliderquant.config import FULL_BITS, QuantizeConfig, SliderConfig
from sliderquant.method.activations import ActivationFormat
from sliderquant.method.metrics import PIECE, chunk_losses, perplexity_of
from sliderquant.method.round_to_nearest import rtn_weights

# Parameters of a block to use in place of the model's own.
Replacement = Callable[[int], dict[str, Tensor]]


def reference_rows(job: Job) -> list[Row]:
    """Return full precision and round-to-nearest, to stand beside the result."""
    if not job.texts:
        return []

    # The model as it is, and the baseline without calibration.
    dtype, setting = job.opened.dtype, describe_setting(job.config)
    full = _measure(job, lambda block: {}, None)
    rows = [_row("full precision", str(dtype), full, 8.0 * dtype.itemsize)]
    if any(job.formats):
        nearest = _measure(
            job, lambda block: rtn_weights(job.decoder, block, job.formats[block]), job.activations
        )
        rows.append(_row("round-to-nearest", setting, nearest, job.bits_per_weight))
    return rows


def result_row(job: Job) -> Row:
    """Return the calibrated model's row."""
    trained = job.config.parameters is None
    way = {
        "compensated": "compensated rounding",
        "combined": f"compensated rounding + windows ({job.config.schedule})",
        "slider": f"SliderQuant ({job.config.schedule if trained else 'released parameters'})",
    }[job.config.method]
    setting = describe_setting(job.config)
    measured = _measure(
        job,
        lambda block: job.learnables[block](job.decoder.tensors(block)),
        job.activations,
    )
    return _row(way, setting, measured, job.bits_per_weight)


@torch.no_grad()
def _measure(
    job: Job, replaced: Replacement, activations: ActivationFormat | None
) -> dict[str, float]:
    """Return perplexities of the job's texts with one block in memory at a time.

    Args:
        job: Model, texts, and where hidden states live.
        replaced: Parameters to use.
        activations: Rounding of activations; ``None`` for none.
    """
    decoder, result = job.decoder, {}
    for name, chunks in job.texts.items():
        hidden = job.cache("evaluation", decoder.block_inputs(torch.cat(list(chunks))))
        for block in range(decoder.depth):
            decoder.hold([block])
            parameters = decoder.tensors(block) | replaced(block)
            for part in hidden.split(1):
                part.copy_(decoder.run_block(block, part, parameters, activations))
        decoder.hold([])

        # The head is read once, for all chunks; a whole chunk's logits may be larger than the model.
        outside = decoder.outside()
        losses = []
        for part, tokens in zip(hidden.split(1), torch.cat(list(chunks)).split(1), strict=True):
            pieces = (decoder.logits(piece, outside) for piece in part.split(PIECE, dim=1))
            losses.append(chunk_losses(pieces, tokens))
        result[name] = perplexity_of(torch.cat(losses))
    return result


def _row(name: str, setting: str, perplexities: dict[str, float], bits: float) -> Row:
    metrics = {text: [value] for text, value in perplexities.items()}
    return Row(name, setting, metrics | {"bits per weight": [bits]})


def describe_setting(config: SliderConfig) -> str:
    """Return format, rotation and seed in a few words, such as "W4 g128 sym, calibration seed 2"."""
    groups = f"g{config.group_size}" if config.columns_per_scale else "per row"
    bits = f"W{config.wbits} mixed" if config.bits_for else f"W{config.wbits}"
    words = f"{bits} {groups} {'sym' if config.sym else 'asym'}"
    words += ", some layers left out" if config.ignore else ""
    if config.abits != FULL_BITS:
        words += f", A{config.abits} per token {'sym' if config.act_sym else 'asym'}"
        words += " with Q, K, V" if config.quantize_attention else ""
    if config.rotate != "none":
        words += f", rotated ({config.rotate})"
    if isinstance(config, QuantizeConfig) and config.parameters is not None:
        return words  # trained elsewhere, with a seed that the file does not say
    return f"{words}, calibration seed {config.seed}"
