"""Make a live diffusers pipeline or transformer frame-sparse, and dense again."""

import importlib.metadata
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from effml_common.errors import ConfigError
from fis_dit.adapters.attach import MARK, Attachment, attach, detach, refuse_outer_hooks
from fis_dit.adapters.clips import clip_cost
from fis_dit.adapters.registry import find_adapter
from fis_dit.config import FISConfig
from fis_dit.errors import HookStateError
from fis_dit.method.cost import Cost

COMPONENTS = ("transformer", "transformer_2")  # of a pipeline; Wan 2.2 A14B has both
OLDEST_DIFFUSERS, FIRST_UNTESTED_DIFFUSERS = (0, 42), (0, 44)


def apply_fis(target: Any, config: FISConfig | Mapping[str, FISConfig]) -> "FISHandle":
    """Make a pipeline's transformers, or one transformer, frame-sparse.

    Call it before ``enable_cache`` and the like, so that ours is the innermost hook.

    Args:
        target: A diffusers pipeline or transformer.
        config: One for all transformers, or one for each of ``transformer`` and ``transformer_2``.

    Returns:
        A handle that tells what runs, and takes the sparsity off again.

    Raises:
        UnsupportedModelError: (TypeError) If the class has no adapter.
        ConfigError: (ValueError) If a block is out of range, or a plan is for another model.
        HookStateError: (RuntimeError) If it was applied before, or another hook would stand inside ours.
        NotSupportedError: (NotImplementedError) If context parallelism is on.

    >>> from diffusers import WanTransformer3DModel
    >>> sizes = {"num_attention_heads": 1, "attention_head_dim": 12, "ffn_dim": 8, "num_layers": 4}
    >>> model = WanTransformer3DModel(**sizes, text_dim=8, freq_dim=8)
    >>> with apply_fis(model, FISConfig(stride=2)) as handle:
    ...     handle.summary()["transformer"]["sparse_blocks"]
    [1, 2]
    """
    _check_diffusers()
    attachments: list[Attachment] = []
    try:
        for name, model, model_config in _match_configs(target, config):
            attachments.append(attach(name, model, model_config))
    except BaseException:
        for attachment in attachments:
            detach(attachment)
        raise
    return FISHandle(attachments)


def remove_fis(target: Any) -> None:
    """Take frame sparsity off a pipeline or transformer, where the handle is out of reach.

    Args:
        target: A diffusers pipeline or transformer; one that is dense stays as it is.

    Raises:
        HookStateError: If a cache or skip hook was put on after ours.

    >>> from diffusers import WanTransformer3DModel
    >>> sizes = {"num_attention_heads": 1, "attention_head_dim": 12, "ffn_dim": 8, "num_layers": 4}
    >>> model = WanTransformer3DModel(**sizes, text_dim=8, freq_dim=8)
    >>> handle = apply_fis(model, FISConfig())
    >>> remove_fis(model)
    """
    for model in _find_transformers(target).values():
        attachment = getattr(model, MARK, None)
        if attachment is not None:
            FISHandle([attachment]).remove()


class FISHandle:
    """What ``apply_fis`` returns: a summary, the predicted cost, and the way back.

    It is also a context manager that removes the sparsity on exit.

    Args:
        attachments: The transformers with their hooks.
    """

    def __init__(self, attachments: list[Attachment]) -> None:
        self._attachments = attachments

    def summary(self) -> dict[str, Any]:
        """Describe each transformer: its blocks, and frames, step and anchors of its last forward."""
        return {
            item.name: {**_describe_settings(item), **_describe_last_forward(item)}
            for item in self._attachments
        }

    def flops(self, *, height: int, width: int, num_frames: int, steps: int = 4) -> dict[str, Cost]:
        """Predict the cost of each transformer on a clip in pixels (VAE factors of its family).

        Args:
            height: Pixels.
            width: Pixels.
            num_frames: Frames of the clip, before the VAE.
            steps: Denoising steps.
        """
        return {
            item.name: clip_cost(
                type(item.model).__name__,
                item.model.config,  # pyright: ignore[reportArgumentType]
                item.config,
                (num_frames, height, width),
                steps=steps,
            )
            for item in self._attachments
        }

    def reset(self) -> None:
        """Count denoising steps from 0 again; pipelines do so themselves."""
        for attachment in self._attachments:
            if attachment.geometry is not None:
                attachment.geometry.counters.reset()

    def remove(self) -> None:
        """Take every hook and processor off; a second call does nothing.

        Raises:
            HookStateError: If a cache or skip hook was put on after ours; nothing is removed then.
        """
        for attachment in self._attachments:
            refuse_outer_hooks(attachment)
        for attachment in self._attachments:
            detach(attachment)
        self._attachments = []

    def __enter__(self) -> "FISHandle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _describe_settings(attachment: Attachment) -> dict[str, Any]:
    return {
        "class": type(attachment.model).__name__,
        "sparse_blocks": list(attachment.sparse_blocks),
        "depth": len(attachment.blocks),
        "stride": attachment.config.stride,
        "sites": attachment.config.sites,
        "lift": attachment.config.lift,
    }


def _describe_last_forward(attachment: Attachment) -> dict[str, Any]:
    """What the last forward of a transformer was; nothing before the first one."""
    geometry = attachment.geometry
    if geometry is None or geometry.last is None:
        return {}
    (frames, height, width), step = geometry.last
    ranks = range(len(attachment.sparse_blocks))
    anchor_sets = [geometry.anchors_of(frames, rank, step) for rank in ranks]
    return {
        "frames": frames,
        "tokens_per_frame": height * width,
        "last_step": step,
        "forwards": geometry.forwards,
        "dense": frames <= 2 or all(len(anchors) == frames for anchors in anchor_sets),
        "anchors": [list(anchors) for anchors in dict.fromkeys(anchor_sets)],
    }


def _check_diffusers() -> None:
    version = importlib.metadata.version("diffusers")
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if not OLDEST_DIFFUSERS <= numbers < FIRST_UNTESTED_DIFFUSERS:
        raise HookStateError(
            f"fis-dit was tested with diffusers 0.42 and 0.43, not {version}; install one of them"
        )


def _find_transformers(target: Any) -> dict[str, nn.Module]:
    """Find the transformers of a pipeline by name; a transformer is its own."""
    if isinstance(target, nn.Module):
        return {"transformer": target}
    components = {name: getattr(target, name, None) for name in COMPONENTS}
    present = {name: model for name, model in components.items() if isinstance(model, nn.Module)}
    if not present:
        find_adapter(type(target).__name__)  # raises, listing what is supported
    return present


def _match_configs(
    target: Any, config: FISConfig | Mapping[str, FISConfig]
) -> Iterator[tuple[str, nn.Module, FISConfig]]:
    """Pair every transformer with its settings."""
    present = _find_transformers(target)
    if isinstance(config, FISConfig):
        config = dict.fromkeys(present, config)
    for name, model_config in config.items():
        if name not in present:
            raise ConfigError(
                f"there is no {name} here; give settings for {' and '.join(present)} only"
            )
        yield name, present[name], model_config
