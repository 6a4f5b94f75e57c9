"""Every setting of sliderquant: its default, its unit and its check, once.

What the commands read and write stands here; the settings of the methods are in ``method_config``.

>>> QuantizeConfig(model="models/llama", calib=("notes.txt",), wbits=2, group_size=64).format
'compressed-tensors'
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from effml_common.device import DEVICE_HELP
from effml_common.parsing import require, setting
from sliderquant.method_config import (
    ADVISED_BITS,
    GGUF_LAYER_REMEDY,
    GROUP_HELP,
    TRAINING_SETTINGS,
    WEIGHT_BITS,
    changed_settings,
    check,
    check_least,
)
from sliderquant.method_config import FULL_BITS as FULL_BITS
from sliderquant.method_config import SliderConfig as SliderConfig
from sliderquant.method_config import WindowConfig as WindowConfig

CONTAINER_HELP = "store the codes in this many bits, 4 or 8, for servers that read no fewer"


def required_field(text: str) -> Any:
    """A field without a default, with the help that the command line shows."""
    return field(metadata={"help": text})


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeConfig(SliderConfig):
    """Quantize a local model directory and write a directory that transformers loads."""

    model: str = required_field("directory of a Hugging Face causal language model")
    calib: tuple[str, ...] = setting(
        (),
        "calibration files: text, or JSON (.jsonl, .json) with 'text' or chat 'messages', or data sets "
        "(hf:NAME/CONFIG:SPLIT); use text like what the model will read",
    )
    parameters: str | None = setting(
        None,
        "instead of calibrating, take the parameters of the authors' slider_parameters.pth; "
        "with --method slider --no-sym",
    )
    out: str | None = setting(None, "folder to write; default runs/quantize-<time>")
    eval_text: tuple[str, ...] = setting(
        (), "files to report perplexity on: full precision, round-to-nearest and this result"
    )
    resume: Literal["never", "auto"] = setting(
        "never", "auto continues an interrupted run in --out"
    )
    device: str = setting("auto", DEVICE_HELP)
    format: Literal["compressed-tensors", "native", "dense", "pre-quant", "gguf", "gptq"] = setting(
        "compressed-tensors",
        "compressed-tensors (packed; transformers, vLLM), native (packed; this package), dense "
        "(dequantized), pre-quant (calibrated but not rounded, for another quantizer); gguf and gptq "
        "are exported from native",
    )
    container_bits: int | None = setting(None, CONTAINER_HELP)
    sensitivity: str | None = setting(
        None,
        "report of the sensitivity command, or its folder: what stands out gets more bits",
    )
    sensitive_bits: int | None = setting(
        None, "bits of what stands out in that report, default 8; bits_for and ignore win over it"
    )
    cache: Literal["memory", "disk"] = setting(
        "memory", "where hidden states of the calibration samples live; disk is memory-mapped"
    )
    trust_remote_code: bool = setting(False, "run Python code that comes with the model")

    def __post_init__(self) -> None:
        self._check_exported()
        SliderConfig.__post_init__(self)
        if self.parameters is None:
            require(len(self.calib) > 0, "calib names no file", "give one or more text files")
        else:
            self._check_parameters()
        require(
            self.format != "pre-quant" or self.method == "slider",
            "compensated rounding leaves nothing for another quantizer to round",
            "choose another --format, or add --method slider",
        )
        check(self, "container_bits", self.container_bits in (None, 4, 8), "give 4, 8 or none")
        require(
            self.for_ == "any" or self.format == "native",
            f"--for {self.for_} makes a folder that export turns into the server's file, and format is "
            f"{self.format}",
            "add --format native",
        )
        self._check_sensitivity()

    def _check_exported(self) -> None:
        """Refuse formats that only ``export`` writes, naming the way there."""
        for name, flags in (("gguf", "--for gguf --format native"), ("gptq", "--format native")):
            require(
                self.format != name,
                f"format {name} is written by export",
                f"use {flags}, then `sliderquant export --format {name}`",
            )

    def _check_sensitivity(self) -> None:
        """Set the bits of what stands out; refuse them without a report, and those that none stores."""
        if self.sensitivity is not None and self.sensitive_bits is None:
            object.__setattr__(self, "sensitive_bits", ADVISED_BITS)
        require(
            self.sensitivity is not None or self.sensitive_bits is None,
            f"sensitive_bits is {self.sensitive_bits}, and no report says which layers",
            "add --sensitivity with a report",
        )
        stored = self.sensitive_bits in (None, *WEIGHT_BITS)
        check(self, "sensitive_bits", stored, "give 2 to 8, or 16 for weights as they are")
        if self.for_ == "gguf" and self.sensitive_bits is not None:
            exact = self.fits_gguf(self.sensitive_bits)
            check(self, "sensitive_bits", exact, GGUF_LAYER_REMEDY)

    def _check_parameters(self) -> None:
        """Refuse what does not go with parameters that were trained elsewhere."""
        require(not self.calib, "parameters and calib were given", "leave one of them out")
        require(
            self.method == "slider", f"parameters are not of {self.method}", "add --method slider"
        )
        remedy = (
            "add --no-sym: the released symmetric grid cannot be stored, its results are asymmetric"
        )
        require(not self.sym, "sym is true with parameters", remedy)
        check(
            self, "wbits", self.wbits != FULL_BITS, "give the bits for which parameters were made"
        )
        mixed = self.has_mixed_bits or self.sensitivity is not None
        require(
            not mixed, "parameters have the same bits in all layers", "leave out bits of layers"
        )
        remedy = "give the model as it was rotated, without --rotate"
        check(self, "rotate", self.rotate == "none", remedy)
        changed = changed_settings(self, TRAINING_SETTINGS)
        words = f"{', '.join(changed)}: nothing is trained with parameters"
        require(not changed, words, "leave it out")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Perplexity on text files, and lm-eval tasks, of a model directory in any format."""

    model: str = required_field("directory of a causal language model, quantized or not")
    text: tuple[str, ...] = setting((), "files: text or JSON, or data sets, as for calibration")
    tasks: tuple[str, ...] = setting(
        (), "lm-eval task files (YAML, with local data files), or folders of them"
    )
    seqlen: int | None = setting(
        None, "tokens per chunk of text; default the smaller of 2048 and the model's limit"
    )
    batch_size: int = setting(1, "chunks or requests per forward pass")
    limit: int | None = setting(None, "documents per task; default all")
    dtype: Literal["float32", "stored"] = setting(
        "float32", "type to compute in: float32 with the stored values, or the stored type"
    )
    out: str | None = setting(None, "folder of the report; default runs/eval-<time>")
    device: str = setting("auto", DEVICE_HELP)

    def __post_init__(self) -> None:
        require(
            bool(self.text or self.tasks), "nothing to evaluate on", "give --text or --tasks files"
        )
        check_least(self, 1, "batch_size", "limit")
        check_least(self, 2, "seqlen")  # the first token of a chunk is never predicted


@dataclass(frozen=True, kw_only=True, slots=True)
class SensitivityConfig:
    """Round one block at a time to nearest, and measure what it does to the model."""

    model: str = required_field("directory of a full-precision causal language model")
    text: tuple[str, ...] = required_field("files: text or JSON, or data sets, as for calibration")
    wbits: int = setting(2, "bits per weight, 2 to 8")
    group_size: int | None = setting(128, GROUP_HELP)
    sym: bool = setting(True, "signed codes without zero point")
    mode: Literal["single", "prefix"] = setting(
        "single", "single: one block rounded, the others not; prefix: all blocks up to it"
    )
    by: Literal["block", "linear"] = setting(
        "block", "what is rounded at a time: a decoder block, or one linear layer of it"
    )
    metric: Literal["kl", "ppl", "mse"] = setting(
        "kl", "what the plot and the ranking show; the table has all three"
    )
    nsamples: int = setting(8, "chunks of text, spread over all of it")
    seqlen: int = setting(512, "tokens per chunk; capped at the model's limit")
    out: str | None = setting(None, "folder of the report; default runs/sensitivity-<time>")
    device: str = setting("auto", DEVICE_HELP)

    def __post_init__(self) -> None:
        require(len(self.text) > 0, "text names no file", "give one or more text files")
        check(self, "wbits", 2 <= self.wbits <= 8, "give 2 to 8")
        require(
            not (self.by == "linear" and self.mode == "prefix"),
            "prefix mode goes block by block",
            "use --by block, or --mode single",
        )
        check_least(self, 1, "nsamples", "group_size")
        check_least(self, 2, "seqlen")


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """Tokens per second of a native model and of its dense twin, on your device."""

    model: str = required_field("directory that quantize wrote with --format native")
    prompt: int = setting(128, "tokens of the prompt")
    tokens: int = setting(32, "tokens generated behind it")
    repeats: int = setting(3, "timed repetitions, after one to warm up")
    out: str | None = setting(None, "folder of the report; default runs/bench-<time>")
    device: str = setting("auto", DEVICE_HELP)

    def __post_init__(self) -> None:
        check_least(self, 1, "prompt", "tokens", "repeats")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Write a native quantized model in another format; only gguf may round, and says how much."""

    model: str = required_field("directory that quantize wrote with --format native")
    format: Literal["compressed-tensors", "gguf", "gptq", "dense", "native"] = setting(
        "compressed-tensors",
        "compressed-tensors (packed; transformers, vLLM), gguf (packed; llama.cpp), gptq (packed; other "
        "servers), dense (dequantized), native (a copy)",
    )
    text: tuple[str, ...] = setting(
        (), "with --format gguf: files to measure on what rounding scales to float16 costs"
    )
    out: str | None = setting(None, "folder to write; default runs/export-<time>")
    container_bits: int | None = setting(None, CONTAINER_HELP)

    def __post_init__(self) -> None:
        check(self, "container_bits", self.container_bits in (None, 4, 8), "give 4, 8 or none")
        require(
            self.format == "gguf" or not self.text,
            "text is measured for gguf alone, because no other format rounds",
            "leave it out, or add --format gguf",
        )
        require(
            self.format != "gguf" or self.container_bits is None,
            f"container_bits is {self.container_bits}, and gguf has containers of its own",
            "leave it out",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectConfig(SliderConfig):
    """Windows, cost and memory plan, without reading a weight."""

    model: str | None = setting(None, "directory whose config.json gives the shapes")
    layers: int | None = setting(None, "number of decoder blocks, instead of a model")

    def __post_init__(self) -> None:
        SliderConfig.__post_init__(self)
        require(
            (self.model is None) != (self.layers is None),
            "inspect needs either a model directory or a number of layers",
            "give --model DIR or --layers N",
        )
        require(
            self.model is not None or not self.has_mixed_bits,
            "bits_for and ignore name layers, and a number of layers has no names",
            "give --model DIR",
        )
        check_least(self, 1, "layers")


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoModelConfig:
    """The small Llama that the demo trains once."""

    layers: int = setting(8, "decoder blocks of the demo model")
    hidden_size: int = setting(128, "width of the demo model, a multiple of 64")
    context: int = setting(128, "tokens per sequence")
    vocab_size: int = setting(2048, "tokens of the BPE vocabulary")
    train_steps: int = setting(800, "updates of the demo model's own training")
    train_batch: int = setting(16, "sequences per training update")
    train_lr: float = setting(4e-3, "peak learning rate of the demo model's training")
    model_seed: int = setting(0, "seed of the demo model")

    def __post_init__(self) -> None:
        divides = self.hidden_size % 64 == 0 and self.hidden_size > 0
        check(self, "hidden_size", divides, "give a multiple of 64, the demo's group size")
        check_least(self, 257, "vocab_size")
        check_least(self, 1, "layers", "context", "train_steps", "train_batch")


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig(DemoModelConfig):
    """Train a small Llama once, quantize it five ways, compare the perplexities."""

    seeds: int = setting(1, "calibration seeds; claims need 3")
    bits: tuple[int, ...] = setting((4, 3, 2), "weight bits to compare")
    out: str | None = setting(None, "folder of the report; default runs/demo-<time>")
    device: str = setting("auto", DEVICE_HELP)
    nsamples: int = setting(32, "calibration samples")
    epochs: int = setting(4, "passes of SliderQuant over the samples per window")

    def __post_init__(self) -> None:
        DemoModelConfig.__post_init__(self)
        check_least(self, 1, "seeds", "nsamples")
        check_least(self, 2, "epochs")  # one for each intra-layer stage
        stored = bool(self.bits) and all(2 <= bits <= 8 for bits in self.bits)
        check(self, "bits", stored, "give bits from 2 to 8, such as 4 3 2")
