"""The ``sensitivity`` command: what rounding one block (or one layer) alone does to the model.

The paper (arXiv 2603.25284) builds its windows on the finding that the first and the last blocks suffer
most. Weights are rounded to nearest, nothing is trained. All variants walk through the model together,
so that every block is read once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from effml_common.device import resolve_device
from effml_common.errors import NonFiniteError, memory_advice
from effml_common.folders import run_folder
from effml_common.logging import Progress, say
from effml_common.report import Report, ReportBuilder, Row
from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.hub import model_directory
from sliderquant.adapters.input_files import InputFiles
from sliderquant.adapters.model_folder import open_model
from sliderquant.adapters.shapes import check_group_size, decoder_shape
from sliderquant.adapters.text import begin_note, begin_tokens, chunks, read_tokens
from sliderquant.commands._sensitive_layers import (
    OUTSTANDING,
    bits_for,
    outstanding,
    row_setting,
)
from sliderquant.config import SensitivityConfig
from sliderquant.method.quantizer import WeightFormat, fake_quantize
from sliderquant.method_config import ADVISED_BITS

METRIC_WORDS = {
    "kl": "KL divergence from full precision [nats per token]",
    "ppl": "perplexity above full precision",
    "mse": "squared error of the last hidden states, relative",
}


@dataclass(frozen=True, kw_only=True)
class Damage:
    """What rounding did.

    Attributes:
        name: "block 3", "block 3 mlp.down_proj" or "blocks 0-3".
        ppl: Perplexity minus that of full precision.
        kl: Mean over tokens of KL(full precision || rounded), nats.
        mse: Squared error of the last hidden states over their mean square.
    """

    name: str
    ppl: float
    kl: float
    mse: float


def sensitivity(config: SensitivityConfig) -> Report:
    """Measure every block and write ``report.json``, ``report.html`` and ``sensitivity.png``.

    Returns:
        The report: one row per block, or per layer.

    Raises:
        InputError: If the model, the text or the device cannot be used.
    """
    with memory_advice("lower --nsamples or --seqlen"):
        return _measure_and_report(config)


def _measure_and_report(config: SensitivityConfig) -> Report:
    """Measure every block and write the report."""
    # The model, read block by block.
    builder = ReportBuilder("sliderquant", ("transformers", "tokenizers"))
    folder = run_folder(config.out, "sensitivity") / "run"
    device = resolve_device(config.device)
    opened = open_model(model_directory(config.model), device=device)
    decoder = opened.decoder
    for linears in decoder_shape(decoder).kinds():
        check_group_size(linears, config.group_size)

    # Chunks spread over all of the text.
    files = InputFiles().read(config.text, "text")
    stream = read_tokens(files, opened.tokenizer, opened.decoder.model)
    begin = begin_tokens(opened.tokenizer)
    note = begin_note(begin, opened.tokenizer)
    say(note)
    pieces = torch.cat(list(chunks(stream, min(config.seqlen, opened.context), begin=begin)))
    tokens = pieces[:: max(1, len(pieces) // config.nsamples)][: config.nsamples]

    # Every variant walks through the model beside the exact one.
    variants = _variants(decoder, config)
    size = 4 * (len(variants) + 1) * tokens.numel() * opened.config.hidden_size
    say(
        f"{len(variants)} variants on {tokens.numel()} tokens, {size / 2**30:.2f} GiB of activations"
    )
    fmt = WeightFormat(
        bits=config.wbits, group_size=config.group_size, sym=config.sym, dtype=opened.dtype
    )
    damages = measure(decoder, tokens, fmt, variants, prefix=config.mode == "prefix")

    # Table, advice and picture.
    folder.mkdir(parents=True, exist_ok=True)
    figures = _draw(folder, damages, config)
    notes = advice(damages, config.metric) if config.mode == "single" else []
    if notes and "--bits-for" in notes[-1]:
        say(f"quantize can read this report: --sensitivity {folder.parent}")
    return builder.write(
        folder,
        [
            Row(d.name, row_setting(config), {"ppl": [d.ppl], "kl": [d.kl], "mse": [d.mse]})
            for d in damages
        ],
        device=str(device),
        figures=figures,
        files=[f"run/{path.name}" for path in figures],
        notes=[note, *notes],
    )


def _variants(
    decoder: TransformersDecoder, config: SensitivityConfig
) -> list[tuple[str, int, tuple[str, ...]]]:
    """Return (name, block, weights to round) of everything that is measured."""
    variants = []
    for block in range(decoder.depth):
        names = decoder.layout(block).linears
        if config.by == "linear":
            variants += [
                (f"block {block} {name.removesuffix('.weight')}", block, (name,)) for name in names
            ]
        else:
            start = f"blocks 0-{block}" if config.mode == "prefix" else f"block {block}"
            variants.append((start, block, names))
    return variants


@torch.no_grad()
def measure(
    decoder: TransformersDecoder,
    tokens: Int[Tensor, "n t"],
    fmt: WeightFormat,
    variants: Sequence[tuple[str, int, Sequence[str]]],
    *,
    prefix: bool = False,
) -> list[Damage]:
    """Round the weights of one variant at a time, everything else in full precision.

    Args:
        decoder: The model.
        tokens: Samples of equal length.
        fmt: Grid.
        variants: Name, block and weights of each, in the order of the blocks.
        prefix: Keep the blocks before a variant's own rounded, too.

    Raises:
        NonFiniteError: If the model's outputs are not finite.
    """
    # A branch of hidden states for each variant, from the block that it rounds on.
    exact = decoder.block_inputs(tokens)
    rounded_so_far = exact.clone()
    branches: dict[str, Float[Tensor, "n t h"]] = {}
    steps = decoder.depth * (decoder.depth + 1) // 2
    with Progress("sensitivity", steps) as bar:
        for block in range(decoder.depth):
            decoder.hold([block])
            tensors = decoder.tensors(block)

            # Earlier variants pass the block as it is.
            for hidden in branches.values():
                _advance_(decoder, block, hidden, tensors)

            # The block's own variants start here, with their weights rounded.
            own = [v for v in variants if v[1] == block]
            for name, _, names in own:
                branches[name] = (rounded_so_far if prefix else exact).clone()
                rounded = {n: fake_quantize(tensors[n].float(), fmt) for n in names}
                _advance_(decoder, block, branches[name], {**tensors, **rounded})

            # What the next block's variants start from.
            if prefix:
                rounded_so_far = branches[own[-1][0]].clone()
            _advance_(decoder, block, exact, tensors)
            bar.advance(block + 1)

    decoder.hold([])
    return _damages(decoder, tokens, exact, branches)


def _advance_(
    decoder: TransformersDecoder, block: int, hidden: Tensor, tensors: dict[str, Tensor]
) -> None:
    """Push hidden states through one block, in place, sample by sample."""
    for part in hidden.split(1):
        part.copy_(decoder.run_block(block, part, tensors))


def _damages(
    decoder: TransformersDecoder,
    tokens: Tensor,
    exact: Tensor,
    branches: Mapping[str, Tensor],
) -> list[Damage]:
    """Compare every branch with the exact hidden states, sample by sample."""
    # Sums over samples of cross-entropy, divergence and squared error.
    outside = decoder.outside()
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in branches}
    base = 0.0
    for sample, row in enumerate(tokens):
        part = slice(sample, sample + 1)
        log_p = decoder.logits(exact[part], outside)[0].float().log_softmax(-1)
        base += _cross_entropy(log_p, row)
        for name, hidden in branches.items():
            log_q = decoder.logits(hidden[part], outside)[0].float().log_softmax(-1)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
            mse = (hidden[part] - exact[part]).square().mean() / exact[part].square().mean()
            sums[name] += torch.tensor([_cross_entropy(log_q, row), kl, mse.item()])
    if not all(torch.isfinite(total).all() for total in sums.values()):
        raise NonFiniteError("the model's outputs are not finite; its weights are damaged")

    # Means, perplexity as its difference to full precision.
    count = len(tokens)
    full = torch.tensor(base / count, dtype=torch.float64).exp().item()
    damages = []
    for name, total in sums.items():
        loss, kl, mse = (total / count).tolist()
        ppl = torch.tensor(loss, dtype=torch.float64).exp().item() - full
        damages.append(Damage(name=name, ppl=ppl, kl=max(kl, 0.0), mse=mse))
    return damages


def _cross_entropy(log_p: Float[Tensor, "t v"], tokens: Int[Tensor, " t"]) -> float:
    targets = tokens[1:].to(log_p.device)
    return torch.nn.functional.nll_loss(log_p[:-1], targets).item()


def advice(damages: Sequence[Damage], metric: str) -> list[str]:
    """Return what to make of it: who stands out, how much the two ends carry, what to tell quantize."""
    values = {damage.name: max(getattr(damage, metric), 0.0) for damage in damages}
    ranked = sorted(values, key=lambda name: -values[name])
    total = sum(values.values())
    notes = [f"by {metric}, most sensitive first: {', '.join(ranked[:5])}"]
    sensitive = outstanding(values)
    if sensitive:
        notes.append(
            f"more than {OUTSTANDING:g} times the median, keep at more bits: {', '.join(sensitive)}"
        )
    else:
        notes.append(
            f"nothing suffers more than {OUTSTANDING:g} times the median: keep all bits equal"
        )
    ends = [name for name in values if name.split(" ")[1] in (*_ends(values),)]
    if total > 0:
        share = sum(values[name] for name in ends) / total
        notes.append(f"first and last block: {100 * share:.0f} % of the summed {metric}")
    if sensitive:
        entries = " ".join(f"'{entry}'" for entry in bits_for(sensitive, ADVISED_BITS))
        notes.append(f"for quantize: --bits-for {entries}")
    return notes


def _ends(names: Mapping[str, float]) -> tuple[str, str]:
    blocks = [name.split(" ")[1] for name in names]
    return blocks[0], blocks[-1]


def _draw(folder: Path, damages: Sequence[Damage], config: SensitivityConfig) -> list[Path]:
    """Draw the chosen metric over the blocks."""
    if find_spec("matplotlib") is None:
        say("no picture: install sliderquant[plot]")
        return []
    from matplotlib.figure import Figure

    wide = max(6.0, 0.3 * len(damages))
    figure = Figure(figsize=(wide, 4), layout="constrained")
    panel = figure.subplots()
    values = [getattr(damage, config.metric) for damage in damages]
    panel.bar(range(len(damages)), values)  # on a linear axis, so that lengths compare
    panel.set_xticks(range(len(damages)), [d.name.partition(" ")[2] for d in damages], rotation=90)
    title = f"W{config.wbits} round-to-nearest, "
    title += "all blocks up to this one" if config.mode == "prefix" else "this one alone"
    label = "layer" if config.by == "linear" else "block"
    panel.set(xlabel=label, ylabel=METRIC_WORDS[config.metric], title=title)
    path = folder / "sensitivity.png"
    figure.savefig(path, dpi=120)
    return [path]
