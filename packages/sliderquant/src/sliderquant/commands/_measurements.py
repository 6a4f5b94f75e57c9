"""The rows of ``quantize``'s report: the result, beside full precision and round-to-nearest."""

from effml_common.report import Row
from sliderquant.adapters.simulation import (
    blockwise_perplexity,
    learned_parameters,
    nearest_parameters,
)
from sliderquant.commands._job import Job
from sliderquant.config import FULL_BITS, SliderConfig


def reference_rows(job: Job) -> list[Row]:
    """Return full precision and round-to-nearest, to stand beside the result."""
    if not job.texts:
        return []

    # Perplexities of the model as it is, and of the baseline without calibration.
    decoder, dtype = job.decoder, job.opened.dtype
    full = blockwise_perplexity(decoder, job.texts, lambda block: None, cache=job.cache)
    nearest = None
    if job.config.wbits != FULL_BITS:
        nearest = blockwise_perplexity(
            decoder, job.texts, nearest_parameters(decoder, job.weights), job.activations, job.cache
        )

    rows = [_row("full precision", str(dtype), full, 8.0 * dtype.itemsize)]
    if nearest is not None:
        setting = describe_setting(job.config)
        rows.append(_row("round-to-nearest", setting, nearest, job.bits_per_weight))
    return rows


def result_row(job: Job) -> Row:
    """Return the calibrated model's row."""
    measured = blockwise_perplexity(
        job.decoder,
        job.texts,
        learned_parameters(job.decoder, job.learnables),
        job.activations,
        job.cache,
    )
    way = f"SliderQuant ({job.config.schedule})" if job.plan.windows else "compensated rounding"
    return _row(way, describe_setting(job.config), measured, job.bits_per_weight)


def _row(name: str, setting: str, perplexities: dict[str, float], bits: float) -> Row:
    metrics = {text: [value] for text, value in perplexities.items()}
    return Row(name, setting, metrics | {"bits per weight": [bits]})


def describe_setting(config: SliderConfig) -> str:
    """Return format, rotation and seed in a few words, such as "W4 g128 sym, calibration seed 2"."""
    groups = f"g{config.group_size}" if config.group_size else "per row"
    words = f"W{config.wbits} {groups} {'sym' if config.sym else 'asym'}"
    if config.abits != FULL_BITS:
        words += f", A{config.abits} per token {'sym' if config.act_sym else 'asym'}"
        words += " with Q, K, V" if config.quantize_attention else ""
    if config.rotate != "none":
        words += f", rotated ({config.rotate})"
    return f"{words}, calibration seed {config.seed}"
