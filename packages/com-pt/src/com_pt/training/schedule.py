"""The learning rate of a stage: linear warm-up, then a cosine."""

import math


def learning_rate(step: int, steps: int, warmup: int, peak: float, floor: float) -> float:
    """Return the rate of an update: linear warm-up, at most a tenth of the stage, then a cosine.

    Args:
        step: Number of the update, from 0.
        steps: Updates of the stage.
        warmup: Updates of the warm-up.
        peak: Rate at the end of the warm-up.
        floor: Rate at the end of the cosine; never above the peak.
    """
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    floor = min(floor, peak)
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
