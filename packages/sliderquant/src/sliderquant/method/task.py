"""What a calibration works on, and what it tells its caller as it goes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from sliderquant.config import SliderConfig
from sliderquant.method.activations import ActivationFormat
from sliderquant.method.decoder import Decoder, HiddenStateCache
from sliderquant.method.learnables import BlockLearnables


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowResult:
    """How one window went.

    Attributes:
        step: Count of finished windows over all stages, from 1.
        ratio: Intra-layer ratio of the stage.
        window: Block numbers.
        first_loss: Mean squared error of the first epoch, or of the first half of a single one.
        last_loss: Mean squared error of the last epoch, or of the second half.
        retries: Restarts at half the learning rate.
    """

    step: int
    ratio: float
    window: list[int]
    first_loss: float
    last_loss: float
    retries: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Listeners:
    """What the caller of ``calibrate`` wants to be told.

    Attributes:
        on_update: Called with the loss after each update of a window.
        on_window: Called after each window and stage; the place to save.
        on_block: Called once per block, in order, when it is final, while it is still in memory.
        on_experts: Called with a block and the tokens that each of its experts received.
        on_rounded: Called with a block, and for each of its layer groups, by the names of its weights,
            the strength of the ridge update; ``None`` where the inputs are all zero.
        on_rare_experts: Called with a block, the tokens of each expert that has too few of its own to be
            rounded for them, and how many would be enough.
    """

    on_update: Callable[[float], None]
    on_window: Callable[[WindowResult], None]
    on_block: Callable[[int], None]
    on_experts: Callable[[int, Tensor], None]
    on_rounded: Callable[[int, Mapping[tuple[str, ...], float | None]], None]
    on_rare_experts: Callable[[int, Mapping[int, int], int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationTask:
    """Everything that a method needs; see ``calibrate``.

    Attributes:
        decoder: The model; its own weights stay as they are.
        tokens: Calibration samples.
        windows: Block numbers per window; none for compensated rounding.
        learnables: One per block, set or trained in place.
        config: Method settings.
        activations: How the quantized model rounds activations; ``None`` if it does not.
        listeners: Whom to tell.
        cache: Given a name and hidden states, returns a copy of them that may live on disk.
        done: Windows finished in an earlier run, counted over all stages.
    """

    decoder: Decoder
    tokens: Int[Tensor, "n t"]
    windows: Sequence[Sequence[int]]
    learnables: Sequence[BlockLearnables]
    config: SliderConfig
    activations: ActivationFormat | None
    listeners: Listeners
    cache: HiddenStateCache
    done: int
