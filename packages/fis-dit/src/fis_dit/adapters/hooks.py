"""The hooks: one reads the video's shape and the step, the others make blocks sparse.

All of them are diffusers ``ModelHook``s on children of the transformer, never on its root, whose forward
accelerate's offloading restores after every pipeline call. Whatever depends on phase, step or shape is
decided by the geometry hook; the hook of a sparse block reads tensors only, so that one compiled graph
serves all blocks with the same number of anchors.
"""

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import BaseState, CacheContext, StateManager
from torch import Tensor, nn

from effml_common.errors import ConfigError, NonFiniteError
from effml_common.logging import warn
from fis_dit.adapters.geometry import Geometry
from fis_dit.adapters.layout import FISAdapter, PerToken
from fis_dit.config import FISConfig
from fis_dit.errors import HookStateError
from fis_dit.method.anchors import choose_anchors, draw_random_anchors
from fis_dit.method.neighbours import FrameIndex, find_neighbours, make_frame_index
from fis_dit.method.skipped_frames import (
    fill_skipped_attention,
    fill_skipped_frames,
    gather_frames,
)

GEOMETRY_HOOK = "fis_geometry"
BLOCK_HOOK = "fis_block"
ATTENTION_HOOK = "fis_attn"
KEPT_CLIP_LENGTHS = 8  # frame counts whose index tensors are kept
FEW_ANCHORS = 4  # fewer computed frames than this are worth a warning
# diffusers caches that keep attention outputs from one step to the next.
ATTENTION_CACHES = ("PyramidAttentionBroadcastConfig", "FasterCacheConfig", "TaylorSeerCacheConfig")


class SparseHook(ModelHook, ABC):
    """Runs a module on the anchors only, and fills in the other frames.

    ``frame_index`` holds the tensors of the phase; the geometry hook sets it before every forward, and
    None runs the module dense.

    Args:
        number: Index of the block in the model.
        names: Names of the positional arguments of the hooked module; the first is the video tokens.
        per_token: Arguments that are gathered with the frames.
        config: Settings of the sparsity.
    """

    def __init__(
        self,
        number: int,
        names: tuple[str, ...],
        per_token: Mapping[str, PerToken],
        config: FISConfig,
    ) -> None:
        super().__init__()
        self.number, self.names, self.per_token = number, names, per_token
        self.lift, self.debug = config.lift, config.debug
        self.frame_index: FrameIndex | None = None
        self.tokens = 0  # S; 0 until the geometry hook has run
        self.device: torch.device | None = None  # where the block's last output was
        # Set with kv="full": computes the attention's input of all frames, and takes it.
        self.full_input: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None
        self.processor: Any = None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the module sparse if this forward has anchors, otherwise dense.

        Raises:
            HookStateError: If the hidden states are not of the size that the geometry hook read.
        """
        named = {**dict(zip(self.names, args, strict=False)), **kwargs}
        hidden = named[self.names[0]]
        if hidden.shape[1] != self.tokens:
            raise HookStateError(self._describe_mismatch(hidden))
        original: Any = self.fn_ref.original_forward
        if self.frame_index is None:
            return original(*args, **kwargs)
        return self.run_sparse(module, original, named)

    def run_sparse(
        self, module: nn.Module, forward: Callable[..., Any], named: Mapping[str, Any]
    ) -> Any:
        """Run ``forward`` on the anchors of ``frame_index`` and fill in the other frames.

        Args:
            module: The hooked module.
            forward: What computes its output, without this hook.
            named: Arguments by name, for all frames.

        Returns:
            What the module returns for all frames: the video tokens, or a tuple that starts with them.
        """
        hidden, index = named[self.names[0]], self.frame_index
        assert index is not None

        # Full keys and values are computed inside the attention, from all frames.
        if self.processor is not None:
            read = self.full_input or (lambda _, arguments: arguments[self.names[0]])
            self.processor.lend(read, module, named)

        # The module sees the anchors only: their tokens and whatever goes with each token.
        small = {**named, self.names[0]: gather_frames(hidden, index)}
        for name, rule in self.per_token.items():
            if small.get(name) is not None:
                small[name] = _gather_argument(small[name], rule, hidden.shape[1], index, name)
        output = forward(**small)

        # The other frames are filled where the output is; so the next index is made there, too.
        computed = output[0] if isinstance(output, tuple) else output
        self.device = computed.device
        full = self.fill(hidden, computed, index)
        if self.debug and not bool(torch.isfinite(full).all()):
            raise NonFiniteError(
                f"the output of block {self.number} is not finite; lower the guidance or use float32"
            )
        return (full, *output[1:]) if isinstance(output, tuple) else full

    @abstractmethod
    def fill(self, hidden: Tensor, computed: Tensor, index: FrameIndex) -> Tensor:
        """Return the output of all frames "b s d" from the one at the anchors "b k d"."""

    def _describe_mismatch(self, hidden: Tensor) -> str:
        known = f"{self.tokens} video tokens by the geometry" if self.tokens else "no geometry"
        return (
            f"block {self.number} got hidden states of shape {tuple(hidden.shape)}, but {known} was "
            "read; describe the layout with fis_dit.register_adapter"
        )


class BlockHook(SparseHook):
    """``sites="block"``: everything in the block is sparse."""

    def fill(self, hidden: Tensor, computed: Tensor, index: FrameIndex) -> Tensor:
        """Interpolate what the block changed at the anchors."""
        return fill_skipped_frames(hidden, computed, index, self.lift)


class AttentionHook(SparseHook):
    """``sites="attn"``: only the self-attention is sparse."""

    def fill(self, hidden: Tensor, computed: Tensor, index: FrameIndex) -> Tensor:
        """Interpolate the attention's output, which the block adds with its own gate."""
        return fill_skipped_attention(computed, index, self.lift)


def _gather_argument(value: Any, rule: PerToken, tokens: int, index: FrameIndex, name: str) -> Any:
    """Keep the anchors' entries of an argument with one entry for each of ``tokens`` tokens."""
    if isinstance(value, tuple | list):
        return tuple(_gather_argument(item, rule, tokens, index, name) for item in value)
    if rule.ndim is not None and (value.ndim != rule.ndim or value.shape[rule.dim] == 1):
        return value
    if value.shape[rule.dim] != tokens:
        raise HookStateError(
            f"{name} of shape {tuple(value.shape)} has no entry for each of {tokens} video tokens; "
            "describe the layout with fis_dit.register_adapter"
        )
    return gather_frames(value, index, rule.dim)


class StepCounter(BaseState):
    """Number of forwards in one cache context, for pipelines that do not tell the step."""

    def __init__(self) -> None:
        self.count = 0

    def reset(self) -> None:
        """Start anew."""
        self.count = 0


class GeometryHook(ModelHook):
    """Runs once per forward, on the probe: reads (F, H, W) and the step, sets every block's index.

    Args:
        root: The transformer.
        adapter: How it is laid out.
        config: Settings of the sparsity.
        sparse_hooks: Hooks of the sparse blocks, in the order of depth.
    """

    _is_stateful = True

    def __init__(
        self,
        root: nn.Module,
        adapter: FISAdapter,
        config: FISConfig,
        sparse_hooks: list[SparseHook],
    ) -> None:
        super().__init__()
        # In a list: a module attribute of a hook is none of the model's children.
        self._root, self._adapter, self._config = [root], adapter, config
        self.sparse_hooks = sparse_hooks
        self.counters = StateManager(StepCounter)  # pyright: ignore[reportArgumentType]
        self.last: tuple[Geometry, int] | None = None  # geometry and step of the last forward
        self.forwards = 0
        self._indices: OrderedDict[Any, FrameIndex | None] = OrderedDict()
        self._warned = False

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Decide what every sparse block computes; the probe's own arguments pass through."""
        # What this forward is: a clip of so many frames, at one denoising step.
        root = self._root[0]
        self._refuse_training_and_caches(root)
        geometry = self._adapter.geometry(root.config, args, kwargs)  # pyright: ignore[reportArgumentType]
        step, steps = self._current_step()
        self.last, self.forwards = (geometry, step), self.forwards + 1
        self._check_frames(geometry[0])

        # With a device map every block has its own device, known from its last output.
        dense = geometry[0] <= 2 or step in self._dense_steps(steps)
        tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        for rank, hook in enumerate(self.sparse_hooks):
            hook.tokens = math.prod(geometry)
            device = hook.device or tensor.device
            hook.frame_index = None if dense else self._frame_index(geometry[0], rank, step, device)
        return args, kwargs

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Start counting steps anew; diffusers calls it at the end of a pipeline call."""
        self.counters.reset()
        return module

    def anchors_of(self, frames: int, rank: int, step: int) -> tuple[int, ...]:
        """Return the anchors of one sparse block: residue (j + step * shift) mod n.

        Args:
            frames: F, latent frames of the clip.
            rank: j, position of the block among the sparse blocks.
            step: Denoising step, from 0.
        """
        config = self._config
        residue = 0 if config.pattern == "static" else rank + step * config.step_shift
        chosen = choose_anchors(
            frames,
            config.stride,
            residue,
            boundaries=config.boundaries,
            equalize=config.equalize,
        )
        if config.pattern == "random":
            seed = rank + 1000 * step * bool(config.step_shift)
            return draw_random_anchors(frames, len(chosen), seed, boundaries=config.boundaries)
        return chosen

    def _frame_index(
        self, frames: int, rank: int, step: int, device: torch.device
    ) -> FrameIndex | None:
        """Return the index tensors of one block, made once for each set of anchors and device."""
        config, chosen = self._config, self.anchors_of(frames, rank, step)
        key = (frames, chosen, device)
        if key not in self._indices:
            if len(chosen) < FEW_ANCHORS and not self._warned:
                self._warned = True
                warn(f"only {len(chosen)} of {frames} frames are computed; quality will be poor")
            neighbours = find_neighbours(
                frames, chosen, lift=config.lift, excluded=config.condition_frames
            )
            index = make_frame_index(neighbours, device) if neighbours.skipped else None
            self._indices[key] = index
            self._forget_old_lengths()

        self._indices.move_to_end(key)
        return self._indices[key]

    def _forget_old_lengths(self) -> None:
        lengths = list(dict.fromkeys(key[0] for key in self._indices))
        for key in [key for key in self._indices if key[0] in lengths[:-KEPT_CLIP_LENGTHS]]:
            del self._indices[key]

    def _current_step(self) -> tuple[int, int | None]:
        """Return the denoising step of this forward, and the number of steps if anybody knows it."""
        if self.counters._context is None:
            self.counters.set_context(CacheContext("default"))
            step, steps = self._count_forward(), None
            self.counters.set_context(None)
        else:
            step, steps = self._count_forward(), self.counters.context.num_inference_steps
            known = self.counters.context.step_index
            step = step if known is None else int(known)
        return step, steps or self._config.num_inference_steps

    def _count_forward(self) -> int:
        """Count this forward in the current cache context; return how many came before it."""
        counter = self.counters.get_state()
        step = counter.count
        counter.count += 1
        if counter.count == self._config.num_inference_steps:
            counter.count = 0
        return step

    def _dense_steps(self, steps: int | None) -> set[int]:
        chosen = self._config.dense_steps
        if any(step < 0 for step in chosen) and steps is None:
            raise ConfigError(
                "dense_steps counts from the end, but this pipeline does not tell its number of "
                "steps; set num_inference_steps in FISConfig"
            )
        return {step if step >= 0 else step + (steps or 0) for step in chosen}

    def _refuse_training_and_caches(self, root: nn.Module) -> None:
        config = self._config
        if root.training and torch.is_grad_enabled() and not config.allow_grad:
            raise HookStateError(
                "the transformer is in training mode and records gradients; call .eval(), or set "
                "allow_grad=True"
            )
        cache = type(getattr(root, "_cache_config", None)).__name__
        if cache in ATTENTION_CACHES and (config.step_shift or config.dense_steps):
            raise HookStateError(
                f"{cache} keeps attention outputs between steps, but step_shift or dense_steps "
                "changes their shape; set step_shift=0 and dense_steps=(), or call disable_cache()"
            )

    def _check_frames(self, frames: int) -> None:
        config = self._config
        if config.frames in (None, frames):
            return
        problem = f"the plan was made for {config.frames} latent frames, this clip has {frames}"
        if config.strict:
            raise ConfigError(f"{problem}; plan again, or set strict=False")
        if not self._warned:
            self._warned = True
            warn(problem)
