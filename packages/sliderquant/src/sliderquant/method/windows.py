"""Inter-layer sliding: which consecutive decoder blocks are calibrated together, in which order.

Paper: "SliderQuant" (ICLR 2026, arXiv 2603.25284), section on inter-layer sliding. L is the number of
blocks; a window is the list of its block numbers. Three kinds follow each other, front to back:
expanding windows over the shallow blocks (PESW), fixed windows over the middle (FSSW), contracting
windows over the deep blocks (PCSW).
"""

import math
import re

from effml_common.errors import ConfigError
from sliderquant.config import SliderConfig, WindowConfig


def expanding_windows(shallow: int) -> list[list[int]]:
    """Return [0], [0, 1], ... up to ``shallow`` blocks (PESW): block 0 is in every one."""
    return [list(range(k + 1)) for k in range(shallow)]


def fixed_windows(start: int, stop: int, size: int, stride: int) -> list[list[int]]:
    """Return windows of ``size`` blocks from ``start``, every ``stride`` blocks, within ``stop`` (FSSW).

    A tail that the stride leaves over gets a last window that ends at ``stop``.

    Args:
        start: First block.
        stop: End, exclusive.
        size: Blocks per window (s).
        stride: Blocks between window starts (i).
    """
    windows = [list(range(first, first + size)) for first in range(start, stop - size + 1, stride)]
    if not windows or windows[-1][-1] < stop - 1:
        windows.append(list(range(max(0, stop - size), stop)))
    return windows


def contracting_windows(layers: int, deep: int) -> list[list[int]]:
    """Return the last ``deep`` blocks, then one block fewer each (PCSW): the last is in every one."""
    return [list(range(first, layers)) for first in range(layers - deep, layers)]


def slider_windows(layers: int, shallow: int, deep: int, size: int, stride: int) -> list[list[int]]:
    """Return the whole schedule: expanding, fixed, contracting.

    The fixed part shares o = s - i blocks with its neighbours on both sides, so that every middle
    block is optimized equally often. A model too small for both ends is halved between them.

    Args:
        layers: Number of decoder blocks (L), 1 or more.
        shallow: Blocks in the expanding part (L_s).
        deep: Blocks in the contracting part (L_d).
        size: Blocks per middle window (s).
        stride: Blocks between middle windows (i).
    """
    # A model that is too small for both ends is halved; one window bridges the two halves.
    overlap = size - stride
    if layers < shallow + deep:
        shallow = math.ceil(layers / 2)
        deep = layers - shallow
        bridge = [b for b in range(shallow - overlap, shallow + overlap) if 0 <= b < layers]
        middle = [bridge] if overlap and deep else []
    else:
        # The middle shares its first and last blocks with the ends.
        start, stop = max(0, shallow - overlap), min(layers, layers - deep + overlap)
        middle = fixed_windows(start, stop, min(size, layers), stride) if stop > start else []
    return expanding_windows(shallow) + middle + contracting_windows(layers, deep)


def parse_windows(text: str) -> list[list[int]]:
    """Read windows such as ``0-3,2-5,6``, both ends included.

    Raises:
        ConfigError: If a part is neither a number nor an ascending range.
    """
    windows = []
    for word in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise ConfigError(f"window {word!r} is no range of blocks; write for example 0-3,2-5")
        windows.append(list(range(first, last + 1)))
    return windows


def check_windows(windows: list[list[int]], layers: int) -> None:
    """Refuse windows that go backwards, leave a block out or do not end at the last block.

    Raises:
        ConfigError: Naming the first problem.
    """
    # From front to back, within the model.
    starts = [window[0] for window in windows]
    if starts != sorted(starts):
        raise ConfigError("window starts go backwards; order the windows from front to back")
    beyond = max(max(window) for window in windows)
    if beyond >= layers:
        raise ConfigError(
            f"a window reaches block {beyond}; the model's last block is {layers - 1}"
        )

    # Every block is calibrated, the last one in the last window.
    left_out = sorted(set(range(layers)).difference(*windows))
    if left_out:
        raise ConfigError(f"no window holds block {left_out[0]}; cover every block")
    if windows[-1][-1] != layers - 1:
        raise ConfigError(f"the last window must end at block {layers - 1}; append one that does")


def make_windows(layers: int, config: WindowConfig) -> list[list[int]]:
    """Return the windows that ``config.schedule`` asks for.

    Args:
        layers: Number of decoder blocks.
        config: Window settings.

    Returns:
        Block numbers per window, in calibration order.

    Raises:
        ConfigError: If the user's own windows do not fit the model.

    Example:
        >>> from sliderquant.config import WindowConfig
        >>> make_windows(6, WindowConfig(shallow=2, deep=2))
        [[0], [0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [5]]
    """
    if config.schedule == "slider":
        windows = slider_windows(layers, config.shallow, config.deep, config.window, config.stride)
    elif config.schedule == "fixed":
        windows = slider_windows(layers, 0, 0, config.window, config.stride)
    elif config.schedule == "block":
        windows = slider_windows(layers, 0, 0, 1, 1)
    else:
        windows = parse_windows(config.schedule)
    check_windows(windows, layers)
    return windows


def block_visits(windows: list[list[int]]) -> int:
    """Return how many times a block is calibrated in all: the cost unit of equal-budget comparisons."""
    return sum(len(window) for window in windows)


def passes(windows: int, config: SliderConfig) -> list[list[tuple[int, int]]]:
    """Return the (window, stage) pairs of every pass over the network, in order.

    ``network``: one pass per intra-layer stage, as in the authors' code. ``window``: one pass, all
    stages inside each window, as in the paper's text.
    """
    numbers, stages = range(windows), range(config.stages)
    if config.intra_order == "network":
        return [[(number, stage) for number in numbers] for stage in stages]
    return [[(number, stage) for number in numbers for stage in stages]]
