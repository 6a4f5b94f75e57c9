"""Settings of the methods: windows, storage format of the weights, training.

The symbols are those of the SliderQuant paper (arXiv 2603.25284): ``shallow`` and ``deep`` are L_s and
L_d, ``window`` and ``stride`` are s and i of the middle windows, ``gamma`` is the intra-layer ratio.
"""

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any, Literal

from effml_common.parsing import require, setting

SCHEDULES = ("slider", "fixed", "block")
FULL_BITS = 16
WEIGHT_BITS = (*range(2, 9), FULL_BITS)
GROUP_HELP = "input columns that share a scale; none for one scale per output row"
DEFAULT_GROUP = 128
ADVISED_BITS = 8  # of layers that suffer most from rounding
GGUF_GROUP = 32  # columns of a block of llama.cpp
GGUF_LAYER_REMEDY = "give 4, 8 with --sym, or 16, because GGUF stores these exactly"
# Headings of the help.
WEIGHTS, CALIBRATION = "weights and activations", "calibration"
WINDOWS = "windows, with --method slider or combined"
SLIDER, COMBINED = "training, with --method slider", "training, with --method combined"
# Settings of windows, of what the method slider trains in them, and of what combined trains.
WINDOW_SETTINGS = ("schedule", "shallow", "deep", "window", "stride", "target_input")
SLIDER_SETTINGS = (
    *("gamma", "intra_order", "lwc", "min_expert_tokens", "epochs"),
    *("lr_lora", "lr_lwc", "lr_scale", "lr_scale_by_batch", "lora_rank"),
)
COMBINED_SETTINGS = ("range_epochs", "lr_range")
# Settings of slider that say how its parameters are trained, not what they are.
TRAINING_SETTINGS = (
    *WINDOW_SETTINGS,
    *(name for name in SLIDER_SETTINGS if name not in ("lwc", "lora_rank")),
    *("nsamples", "seqlen", "batch_size"),
)
# What each method does not have.
FOREIGN_SETTINGS = {
    "compensated": {*WINDOW_SETTINGS, *SLIDER_SETTINGS, *COMBINED_SETTINGS},
    "combined": {*SLIDER_SETTINGS},
    "slider": {*COMBINED_SETTINGS},
}


def split_bits(entry: str) -> tuple[str, int]:
    """Return the pattern and the bits of an entry such as "layers.0.*=8".

    Raises:
        ConfigError: If it is no pattern with bits that a weight can have.
    """
    pattern, _, bits = entry.rpartition("=")
    known = bool(pattern) and bits in map(str, WEIGHT_BITS)
    remedy = "give PATTERN=BITS with 2 to 8 bits, or 16 to leave layers as they are"
    require(known, f"bits_for has {entry!r}", remedy)
    return pattern, int(bits)


def check(config: Any, name: str, holds: bool, remedy: str) -> None:
    """Refuse one setting, which the message names with its value."""
    require(holds, f"{name} is {getattr(config, name)}", remedy)


def check_least(config: Any, least: float, *names: str) -> None:
    """Refuse settings below a bound; those that are ``None`` pass."""
    for name in names:
        value = getattr(config, name)
        check(config, name, value is None or value >= least, f"give {least} or more")


def changed_settings(config: "SliderConfig", names: Collection[str]) -> list[str]:
    """Return those of some settings of the method that are not at their defaults."""
    return [
        field.name
        for field in fields(SliderConfig)
        if field.name in names and getattr(config, field.name) != field.default
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowConfig:
    """Which decoder blocks are calibrated together, and in which order (spec of the schedule)."""

    schedule: str = setting(
        "slider",
        "slider (the method), fixed (one window size), block (one block at a time), "
        "or your own windows such as 0-3,2-5,4-7",
        group=WINDOWS,
    )
    shallow: int = setting(
        4, "blocks in the expanding windows at the front (paper: L_s)", group=WINDOWS
    )
    deep: int = setting(
        4, "blocks in the contracting windows at the back (paper: L_d)", group=WINDOWS
    )
    window: int = setting(2, "blocks in a middle window (paper: s)", group=WINDOWS)
    stride: int = setting(1, "blocks between middle windows (paper: i)", group=WINDOWS)

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            require(
                set(self.schedule) <= set("0123456789-, ") and any(map(str.isdigit, self.schedule)),
                f"schedule {self.schedule!r} is not known",
                f"use one of {', '.join(SCHEDULES)} or windows such as 0-3,2-5",
            )
        check_least(self, 0, "shallow", "deep")
        check_least(self, 1, "window")
        remedy = f"give 1 to window ({self.window}), because a larger one would leave blocks out"
        check(self, "stride", 1 <= self.stride <= self.window, remedy)


@dataclass(frozen=True, kw_only=True, slots=True)
class SliderConfig(WindowConfig):
    """The method: weight format, windows, intra-layer stages and training of the parameters.

    >>> SliderConfig(wbits=2, group_size=64, sym=False).method
    'compensated'
    >>> SliderConfig(method="slider", gamma=0.25).stages
    4
    """

    wbits: int = setting(4, "bits per weight, 2 to 8; 16 leaves weights as they are", group=WEIGHTS)
    abits: int = setting(
        16,
        "bits per activation, 4, 6 or 8, rounded per token at run time; 16 leaves them",
        group=WEIGHTS,
    )
    act_sym: bool = setting(
        True, "symmetric activation grid, for servers; no-act-sym: the paper", group=WEIGHTS
    )
    quantize_attention: bool = setting(
        False, "also round queries, keys and values (the paper)", group=WEIGHTS
    )
    group_size: int | Literal["auto"] | None = setting(
        "auto",
        GROUP_HELP
        + "; auto: 128, one per row where weights and activations have 8 bits (servers), 32 "
        "with --for gguf",
        group=WEIGHTS,
    )
    sym: bool = setting(
        True, "signed codes without zero point; no-sym fits 2 bits better", group=WEIGHTS
    )
    for_: Literal["any", "gguf"] = setting(
        "any",
        "who computes with the codes: gguf (llama.cpp) has scales in float16; any: nobody special",
        group=WEIGHTS,
    )
    bits_for: tuple[str, ...] = setting(
        (),
        "other bits for some layers, such as 'layers.0.*=8' 'down_proj=8'; a shell pattern fits a "
        "layer's name (layers.0.mlp.down_proj), or its end behind any dot; the last that fits counts",
        group=WEIGHTS,
    )
    ignore: tuple[str, ...] = setting(
        (),
        "layers that are not rounded, by patterns as in bits_for, which they win over",
        group=WEIGHTS,
    )
    gamma: float = setting(
        0.5, "intra-layer ratio: 0.5 rounds half of every row first; 1: all", group=SLIDER
    )
    intra_order: Literal["network", "window"] = setting(
        "network",
        "network: one pass over all windows per intra stage (released code); window: all stages "
        "inside each window (the paper's text)",
        group=SLIDER,
    )
    rotate: Literal["none", "r1", "r2", "both"] = setting(
        "none", "rotate offline: r1 the residual stream, r2 the value heads", group=WEIGHTS
    )
    method: Literal["compensated", "combined", "slider"] = setting(
        "compensated",
        "compensated: nothing is trained, each column's rounding error is carried into the next; "
        "combined: the same, then windows train the scales of the codes; "
        "slider: the paper, windows train a correction and the clipping, then codes are the nearest",
        group=CALIBRATION,
    )
    lwc: bool = setting(True, "train the clipping range; no-lwc keeps it open", group=SLIDER)
    channel_scale: Literal["auto", "on", "off"] = setting(
        "auto",
        "scale channels: slider trains the scales, compensated has them in closed form; auto: "
        "where activations are rounded, as in the paper",
        group=CALIBRATION,
    )
    target_input: Literal["fp", "quant"] = setting(
        "fp",
        "what the full-precision target sees: its own input, or the quantized model's",
        group=WINDOWS,
    )
    min_expert_tokens: int = setting(
        64, "experts that see fewer tokens in a block stay untrained", group=SLIDER
    )
    epochs: int = setting(
        20, "passes over the samples per window, split over the intra stages", group=SLIDER
    )
    batch_size: int = setting(1, "samples per update", group=CALIBRATION)
    lr_lora: float = setting(1e-4, "learning rate of the low-rank weight correction", group=SLIDER)
    lr_lwc: float = setting(1e-2, "learning rate of the clipping range", group=SLIDER)
    lr_scale: float = setting(1e-3, "learning rate of the channel scaling", group=SLIDER)
    lr_scale_by_batch: bool = setting(
        False, "multiply rates by the batch size (released code)", group=SLIDER
    )
    lora_rank: int = setting(
        4, "rank of the correction; it is merged before rounding", group=SLIDER
    )
    range_epochs: int = setting(
        1, "passes over the samples per window, in combined", group=COMBINED
    )
    lr_range: float = setting(
        5e-3, "learning rate of the logarithm of the codes' scales, in combined", group=COMBINED
    )
    nsamples: int = setting(128, "calibration samples", group=CALIBRATION)
    seqlen: int = setting(
        2048, "tokens per calibration sample; capped at the model's limit", group=CALIBRATION
    )
    seed: int = setting(
        2, "seed of the sample choice, the batch order and the initial values", group=CALIBRATION
    )

    def __post_init__(self) -> None:
        WindowConfig.__post_init__(self)  # zero-argument super() fails in dataclasses with slots
        if self.group_size == "auto":
            object.__setattr__(self, "group_size", self._usual_group_size())
        self._check_format()
        self._check_training()
        self._check_method()

    def _check_format(self) -> None:
        """Refuse bits and groups that no format stores."""
        activations = (4, 6, 8, FULL_BITS)
        kept = "give 2 to 8, or 16 for weights as they are"
        check(self, "wbits", self.wbits in WEIGHT_BITS, kept)
        for entry in self.bits_for:
            split_bits(entry)
        require("" not in self.ignore, "ignore has an empty pattern", "give names of layers")
        check(self, "abits", self.abits in activations, "give 4, 6 or 8, or 16 to round none")
        require(
            not self.quantize_attention or self.abits < FULL_BITS,
            f"quantize_attention rounds to abits, and abits is {self.abits}",
            "set abits to 4, 6 or 8",
        )
        check_least(self, 1, "group_size")
        if self.for_ == "gguf":
            self._check_gguf()

    def _usual_group_size(self) -> int | None:
        """Return the group size that the servers for these bits have kernels for."""
        if self.for_ == "gguf":
            return GGUF_GROUP
        return None if self.wbits == 8 and self.abits == 8 else DEFAULT_GROUP

    def _check_gguf(self) -> None:
        """Refuse what a GGUF file cannot hold without loss."""
        # With 16 bits for the others, the layers of bits_for are all that is rounded.
        exact = self.fits_gguf(self.wbits) and (self.wbits != FULL_BITS or bool(self.bits_for))
        remedy = "give 4, or 8 with --sym, because GGUF stores these exactly"
        check(self, "wbits", exact, remedy)
        for entry in self.bits_for:
            fits = self.fits_gguf(split_bits(entry)[1])
            require(fits, f"bits_for has {entry!r}, and --for is gguf", GGUF_LAYER_REMEDY)
        divides = self.columns_per_scale is not None and self.columns_per_scale % GGUF_GROUP == 0
        check(self, "group_size", divides, f"give {GGUF_GROUP} or a multiple of it for gguf")
        check(
            self, "abits", self.abits == FULL_BITS, "leave it at 16: llama.cpp rounds its own way"
        )

    def _check_training(self) -> None:
        """Refuse counts and rates that no calibration can use."""
        fits = 0 < self.gamma <= 1 and abs(1 / self.gamma - round(1 / self.gamma)) < 1e-6
        check(self, "gamma", fits, "give 1, 1/2, 1/3 ...: 1/gamma is the number of stages")
        check_least(self, 1, "batch_size", "lora_rank", "nsamples", "seqlen", "range_epochs")
        check_least(self, 0, "min_expert_tokens", "seed")
        require(
            self.epochs >= self.stages,
            f"epochs ({self.epochs}) are fewer than the {self.stages} intra-layer stages",
            "raise epochs or gamma",
        )
        for name in ("lr_lora", "lr_lwc", "lr_scale", "lr_range"):
            finite = 0 <= getattr(self, name) < float("inf")
            check(self, name, finite, "give 0 or more, such as 1e-3")

    def _check_method(self) -> None:
        """Refuse what the chosen method does not do."""
        changed = changed_settings(self, [f.name for f in fields(SliderConfig)])
        given = [name for name in changed if name in FOREIGN_SETTINGS[self.method]]
        owners = [m for m, foreign in FOREIGN_SETTINGS.items() if not foreign.intersection(changed)]
        require(
            not given,
            f"{', '.join(given)}: not a setting of the method {self.method}",
            f"add --method {' or '.join(owners)}, or leave it out" if owners else "leave it out",
        )
        require(
            self.wbits != FULL_BITS or bool(self.bits_for) or not self.ignore,
            "ignore leaves layers out, and with wbits 16 and no bits_for none is rounded",
            "set wbits or bits_for",
        )
        require(
            self.method == "slider" or not self.only_scales,
            "with wbits 16 compensated rounding has nothing to round",
            "set wbits, or add --method slider to train channel scales alone",
        )

    def fits_gguf(self, bits: int) -> bool:
        """Return whether a GGUF file holds weights of so many bits without loss."""
        return bits in (4, FULL_BITS) or (bits == 8 and self.sym)

    @property
    def columns_per_scale(self) -> int | None:
        """Input columns that share a scale; ``None`` for one scale per output row."""
        return None if self.group_size in (None, "auto") else int(self.group_size)

    @property
    def scales_channels(self) -> bool:
        """Whether channels are scaled."""
        automatic = self.channel_scale == "auto" and self.abits < FULL_BITS
        return automatic or self.channel_scale == "on"

    @property
    def only_scales(self) -> bool:
        """Whether channel scales are all that there is to choose."""
        return self.wbits == FULL_BITS and not self.bits_for and self.scales_channels

    @property
    def has_mixed_bits(self) -> bool:
        """Whether layers are asked to differ in their bits."""
        return bool(self.bits_for or self.ignore)

    @property
    def stages(self) -> int:
        """Number N = 1/gamma of intra-layer stages; codes that are there already need one."""
        return round(1 / self.gamma) if self.method == "slider" else 1

    @property
    def window_epochs(self) -> int:
        """Passes over the samples per window, over all stages."""
        return self.epochs if self.method == "slider" else self.range_epochs
