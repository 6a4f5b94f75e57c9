"""The DeepCache package on a pipeline, where it is installed: a baseline that repeats deep features."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

DEEPCACHE_INTERVAL = 3  # steps from one full evaluation to the next


@contextmanager
def deepcache_enabled(pipe: Any, interval: int = DEEPCACHE_INTERVAL) -> Iterator[None]:
    """Run a block with DeepCache on the pipeline's UNet."""
    from DeepCache import DeepCacheSDHelper  # pyright: ignore[reportMissingImports]

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()


def affordable_deepcache_steps(budget: float, cached_share: float) -> int:
    """Return how many steps of DeepCache a budget pays for.

    Args:
        budget: In LSD, the time of one full step.
        cached_share: Cost of a cached step in LSD.
    """
    spent, steps = 0.0, 0
    while True:
        cost = cached_share if steps % DEEPCACHE_INTERVAL else 1.0
        if spent + cost > budget + 1e-9:
            return steps
        spent, steps = spent + cost, steps + 1
