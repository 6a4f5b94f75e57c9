"""Second moments of what the linear layers of a block read, in the quantized model.

Symbols: X [n, in] are the inputs of a layer group in the quantized model, F [n, in] those in the
full-precision model, W [out, in] its weights, E [n, out] what the outputs lack to equal the
full-precision model's. Layers that write to the residual stream also make up for what the stream lacks.
Other layers have E = (F - X) W^T, and where W has many rows it is enough to sum X^T (F - X); X and E of
a token are divided by the size of its X there, so that all tokens count alike. Products are computed in
float32, batch by batch, and summed in float64.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sliderquant.method.activations import ActivationFormat, fake_quantize_tokens
from sliderquant.method.decoder import Decoder
from sliderquant.method.layout import WEIGHT_SUFFIX, LayerGroup
from sliderquant.method.parallel import sum_over_processes
from sliderquant.method.precision import forward_precision, tf32_products
from sliderquant.method.ridge import HeldOutScore, factorize, ridge_update
from sliderquant.method.sampling import held_out_samples, to_device

PANELS = 8  # parts of X^T X, of which only those on and above the diagonal are computed
SMALLEST_PANEL = 128  # columns
NORM_EPSILON = 1e-6  # as in RMSNorm
# Tokens whose norms are computed at once, where all are not the fastest: a CPU copies them to float64,
# and from its cache six times as fast as from memory.
TOKENS_PER_NORM = {"cpu": 128}
BLOCK_OUTPUT = ""  # the name under which a decoder returns what a block gives


@dataclass(kw_only=True, slots=True, eq=False)
class BlockRun:
    """One block as one of the two models runs it, and how far it has come.

    Once the layers in front of the attention's output projection are final, what that projection reads
    is kept; once the projection is final, the residual stream behind it takes the place of the block's
    input. So nothing is computed again that cannot change any more, except gate and up projection.

    Attributes:
        hidden: Residual stream of this process's samples: in front of the block, then behind the
            attention, [n, t, h]; changed in place.
        tensors: Parameters of the block by name.
        output_projection: Name of the weight that ends the attention.
        activations: How the model rounds activations; ``None`` if it does not.
        heads: What the output projection reads, while that is known, [n, t, q].
        behind_attention: Whether ``hidden`` is the stream behind the attention.
    """

    hidden: Float[Tensor, "n t h"]
    tensors: dict[str, Tensor]
    output_projection: str
    activations: ActivationFormat | None = None
    heads: Float[Tensor, "n t q"] | None = None
    behind_attention: bool = False

    def attention_output(
        self, samples: slice, hidden: Float[Tensor, "b t h"]
    ) -> Float[Tensor, "b t h"] | None:
        """Return what the attention gives for some samples; ``None`` if it has to be computed."""
        # Behind the attention nothing is to be added to the stream any more.
        if self.behind_attention:
            return torch.zeros_like(hidden)
        if self.heads is None:
            return None
        heads = to_device(self.heads[samples], hidden.device)
        if self.activations is not None:
            heads = fake_quantize_tokens(heads, self.activations)
        bias = self.tensors.get(self.output_projection.removesuffix(WEIGHT_SUFFIX) + ".bias")
        return torch.nn.functional.linear(heads, self.tensors[self.output_projection], bias)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GroupMoments:
    """Sums over the tokens of all calibration samples, for one layer group, float64.

    Attributes:
        weight: W of all layers of the group, one below the other, float32 or float64.
        through_weight: Whether ``cross`` is X^T (F - X), to be multiplied with W^T.
        second: X^T X.
        cross: X^T E of all layers side by side, or X^T (F - X).
        strength: How much of the ridge update holds on samples that it was not fitted to, 0 to 1.
    """

    weight: Float[Tensor, "out in"]
    through_weight: bool
    second: Float[Tensor, "in in"]
    cross: Float[Tensor, "in k"]
    strength: Float[Tensor, ""]

    def activity(self) -> Float[Tensor, ""]:
        """Return the sum of the squared inputs: 0 if the layers read nothing, NaN or infinity if bad."""
        return self.second.diagonal().sum()

    def of_rows(self, rows: Int[Tensor, " r"]) -> "GroupMoments":
        """Return the moments of some rows of the weights."""
        rows = rows.to(self.weight.device)
        cross = self.cross if self.through_weight else self.cross[:, rows]
        return replace(self, weight=self.weight[rows], cross=cross)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleSplit:
    """How this process's samples are used; the last ones are held out.

    Attributes:
        fitted: How many come first.
        held_out: Whether any process holds samples out.
        batch_size: Samples per forward pass.
    """

    fitted: int
    held_out: bool
    batch_size: int


def split_samples(
    samples: int, batch_size: int, process: int = 0, processes: int = 1
) -> SampleSplit:
    """Return which of a process's samples are held out, see ``held_out_samples``.

    Args:
        samples: Calibration samples of all processes.
        batch_size: Samples per forward pass.
        process: Number of this process, which has every ``processes``-th sample from there on.
        processes: Their number.
    """
    kept_apart = held_out_samples(samples)
    return SampleSplit(
        fitted=len(range(process, samples - kept_apart, processes)),
        held_out=kept_apart > 0,
        batch_size=batch_size,
    )


def collect_moments(
    decoder: Decoder,
    block: int,
    group: LayerGroup,
    runs: tuple[BlockRun, BlockRun],
    split: SampleSplit,
    *,
    relay: bool = False,
) -> GroupMoments:
    """Return the moments of a layer group, summed over all processes; both runs come as far as that.

    Args:
        decoder: The model.
        block: Number of the block.
        group: Linear layers that read the same input.
        runs: The block in the full-precision and in the quantized model, in which earlier groups are
            rounded already.
        split: How the samples are used.
        relay: Let the full-precision model run on to the end of the block, and replace its hidden states
            by what comes out.
    """
    # What the output projection reads is kept from here on.
    weight = torch.cat([runs[0].tensors[name] for name in group.weights])
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    heads: list[Tensor | None] = [None, None]
    if group.ends_attention and not relay:
        shape = (*runs[0].hidden.shape[:2], weight.shape[1])
        heads = [run.hidden.new_empty(shape) for run in runs]

    # The ridge regression is fitted to the first samples and tried on the last ones.
    sums = Sums(weight, through_weight=_goes_through_weight(group, weight))
    passed = (decoder, block, group, runs, heads)
    own, size = len(runs[0].hidden), split.batch_size
    sums.add(_batches(*passed, range(0, split.fitted, size), sums, relay=relay))
    score = sums.fit() if split.held_out else None
    sums.add(_batches(*passed, range(split.fitted, own, size), sums, relay=relay), score)
    sums.share()

    for run, kept in zip(runs, heads, strict=True):
        run.heads = kept
        run.behind_attention |= group.begins_mlp is not None
    return GroupMoments(
        weight=weight,
        through_weight=sums.through_weight,
        second=sums.second,
        cross=sums.cross,
        strength=sums.second.new_zeros(()) if score is None else score.strength(),
    )


def _goes_through_weight(group: LayerGroup, weight: Float[Tensor, "out in"]) -> bool:
    """Return whether to sum X^T (F - X): one product of the inputs, or two of the weight's size."""
    outputs, inputs = weight.shape
    return group.stream_module is None and inputs < 2 * outputs


class Sums:
    """X^T X and X^T E, or X^T (F - X), over the tokens so far.

    X^T X is symmetric; below the diagonal it is filled in by ``fit`` and ``share``.
    """

    def __init__(self, weight: Float[Tensor, "out in"], *, through_weight: bool) -> None:
        outputs, inputs = weight.shape
        self.weight, self.through_weight = weight, through_weight
        self.second = weight.new_zeros(inputs, inputs, dtype=torch.float64)
        self.cross = self.second.new_zeros(inputs, inputs if through_weight else outputs)

    def add(
        self,
        batches: Iterable[tuple[Float[Tensor, "n in"], Float[Tensor, "n k"]]],
        score: HeldOutScore | None = None,
    ) -> None:
        """Add the tokens of some batches, which are held out if there is a score."""
        for x, lacking in batches:
            if score is not None:
                score.add(x, lacking)
            for panel in _panels(len(self.second)):
                self.second[panel, panel.start :] += x[:, panel].T @ x[:, panel.start :]
            self.cross += x.T @ lacking
            del x, lacking  # freed before the next batch is computed

    def share(self) -> None:
        """Let every process have the sums over all processes."""
        self._mirror_()
        self.second, self.cross = (sum_over_processes(total) for total in (self.second, self.cross))

    def fit(self) -> HeldOutScore:
        """Return the score of the update that fits the tokens so far, of all processes."""
        self._mirror_()
        second, cross = sum_over_processes(self.second), sum_over_processes(self.cross)
        update = ridge_update(factorize(second, self.weight.dtype), cross)
        return HeldOutScore(update, self.weight if self.through_weight else None)

    def _mirror_(self) -> None:
        """Write what stands above the diagonal of X^T X below it."""
        for panel in _panels(len(self.second)):
            self.second[panel.stop :, panel] = self.second[panel, panel.stop :].T


def _panels(size: int) -> list[slice]:
    """Return the rows of each part of X^T X."""
    width = max(SMALLEST_PANEL, -(-size // PANELS))
    return [slice(begin, min(begin + width, size)) for begin in range(0, size, width)]


def _batches(
    decoder: Decoder,
    block: int,
    group: LayerGroup,
    runs: tuple[BlockRun, BlockRun],
    heads: Sequence[Tensor | None],
    begins: range,
    sums: Sums,
    *,
    relay: bool,
) -> Iterator[tuple[Float[Tensor, "n in"], Float[Tensor, "n k"]]]:
    """Run both models up to a layer group; yield X, and E or F - X, of each batch of tokens.

    What has come to be final on the way is kept in ``runs`` and ``heads``.
    """
    reader, stream = group.weights[0].removesuffix(WEIGHT_SUFFIX), group.stream_module
    modules = list(
        dict.fromkeys(name for name in (reader, stream, group.begins_mlp) if name is not None)
    )
    exact, quantized = runs
    for begin in begins:
        samples = slice(begin, min(begin + begins.step, begins.stop))
        asked = [*modules, BLOCK_OUTPUT] if relay else modules
        wanted = run_inside(decoder, block, exact, samples, asked)
        present = run_inside(decoder, block, quantized, samples, modules)

        # What has come to be final is not computed again.
        for run, seen, kept in zip(runs, (wanted, present), heads, strict=True):
            if kept is not None:
                kept[samples] = seen[reader]
            if group.begins_mlp is not None:
                run.hidden[samples] = seen[group.begins_mlp]
        if relay:
            exact.hidden[samples] = wanted[BLOCK_OUTPUT]

        # X is what the layers multiply with.
        x = present[reader]
        if quantized.activations is not None:
            x = fake_quantize_tokens(x, quantized.activations)
        x = x.to(sums.weight.dtype).flatten(0, -2)
        lacking = wanted[reader].flatten(0, -2) - x

        # All tokens count alike for a layer's own output. A layer that writes to the stream also makes
        # up for what the stream lacks, whatever it reads itself.
        if stream is None:
            relative = inverse_size(x)
            x, lacking = x * relative, lacking * relative

        # Whoever takes the batch multiplies it in TF32, too.
        with tf32_products(decoder.device):
            if not sums.through_weight:
                lacking = lacking @ sums.weight.T
            if stream is not None:
                lacking += wanted[stream].flatten(0, -2)
                lacking -= present[stream].flatten(0, -2)
            yield x, lacking
        del wanted, present, x, lacking  # freed before the next batch is computed


def inverse_size(tokens: Float[Tensor, "n in"]) -> Float[Tensor, "n 1"]:
    """Return what RMSNorm multiplies each token with.

    What layers read differs in size from token to token, also behind a norm whose gains differ. The
    squared error of a token grows with the square of its size; its effect behind the next norm does not.
    """
    size = TOKENS_PER_NORM.get(tokens.device.type, len(tokens))
    norms = torch.cat(
        [
            torch.linalg.vector_norm(part, dim=-1, keepdim=True, dtype=torch.float64)
            for part in tokens.split(size)
        ]
    )
    return (norms.square() / tokens.shape[-1] + NORM_EPSILON).rsqrt().to(tokens.dtype)


def run_inside(
    decoder: Decoder, block: int, run: BlockRun, samples: slice, modules: Sequence[str]
) -> dict[str, Tensor]:
    """Return what modules of a block are called with for some samples; "" is what the block returns."""
    hidden = to_device(run.hidden[samples], decoder.device)
    with forward_precision(decoder.device):
        attention = run.attention_output(samples, hidden)
        return decoder.inputs_inside(
            block, hidden, run.tensors, modules, run.activations, attention
        )
