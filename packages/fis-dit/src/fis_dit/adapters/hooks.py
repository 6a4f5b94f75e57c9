"""The hooks: one reads the video's shape and the step, the others make blocks sparse.

All of them are diffusers ``ModelHook``s on children of the transformer, never on its root, whose forward
accelerate's offloading restores after every pipeline call. Whatever depends on phase, step or shape is
decided by the geometry hook; a sparse block's hook reads tensors only, so that one compiled graph serves
all blocks with the same number of anchors.
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
from fis_dit.method.skipped_frames import fill_skipped_attention, fill_skipped_frames, gather_frames

GEOMETRY_HOOK = "fis_geometry"
BLOCK_HOOK = "fis_block"
ATTENTION_HOOK = "fis_attn"
KEPT_PLANS = 8
# diffusers caches that keep attention outputs from one step to the next.
ATTENTION_CACHES = ("PyramidAttentionBroadcastConfig", "FasterCacheConfig", "TaylorSeerCacheConfig")


class StepCounter(BaseState):
    """Forwards seen in one cache context, for pipelines that do not tell the step."""

    def __init__(self) -> None:
        self.count = 0

    def reset(self) -> None:
        """Start anew."""
        self.count = 0


class SparseHook(ModelHook, ABC):
    """Common to both sites: the phase's tensors, set before every forward; None runs dense.

    Args:
        number: Index of the block in the model.
        names: Of the positional arguments of the hooked module.
        per_token: Those to gather.
        config: Of the sparsity.
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
        self.plan: FrameIndex | None = None
        self.tokens = 0  # S; 0 until the geometry hook has run
        self.device: torch.device | None = None  # where the block's output was last time
        self.full_input: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None
        self.processor: Any = None  # set with kv="full"

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Gather the anchors, run the module on them, fill in the rest."""
        named = {**dict(zip(self.names, args, strict=False)), **kwargs}
        hidden, plan = named[self.names[0]], self.plan
        if hidden.shape[1] != self.tokens:
            raise HookStateError(self._misread(hidden))
        original: Any = self.fn_ref.original_forward
        if plan is None:
            return original(*args, **kwargs)
        return self.evaluate(module, original, named)

    def evaluate(
        self, module: nn.Module, forward: Callable[..., Any], named: Mapping[str, Any]
    ) -> Any:
        """Run ``forward`` on the anchors of ``self.plan`` and fill in the other frames."""
        hidden, plan = named[self.names[0]], self.plan
        assert plan is not None
        if self.processor is not None:
            read = self.full_input or (lambda _, arguments: arguments[self.names[0]])
            self.processor.lend(read, module, named)
        small = {**named, self.names[0]: gather_frames(hidden, plan)}
        tokens = hidden.shape[1]
        for name, rule in self.per_token.items():
            if small.get(name) is not None:
                small[name] = _gather_argument(small[name], rule, tokens, plan, name)
        out = forward(**small)
        computed = out[0] if isinstance(out, tuple) else out
        self.device = computed.device  # the next plan is made there
        full = self.fill(hidden, computed, plan)
        if self.debug and not bool(torch.isfinite(full).all()):
            raise NonFiniteError(
                f"the output of block {self.number} is not finite; lower the guidance or use float32"
            )
        return (full, *out[1:]) if isinstance(out, tuple) else full

    @abstractmethod
    def fill(self, hidden: Tensor, computed: Tensor, plan: FrameIndex) -> Tensor:
        """Outputs of all frames from those at the anchors."""

    def _misread(self, hidden: Tensor) -> str:
        found = f"{self.tokens} video tokens by the geometry" if self.tokens else "no geometry"
        return (
            f"block {self.number} got hidden states of shape {tuple(hidden.shape)}, but {found} was "
            "read; describe the layout with fis_dit.register_adapter"
        )


class BlockHook(SparseHook):
    """``sites="block"``: everything in the block is sparse."""

    def fill(self, hidden: Tensor, computed: Tensor, plan: FrameIndex) -> Tensor:
        """Lift the block's residual."""
        return fill_skipped_frames(hidden, computed, plan, self.lift)


class AttentionHook(SparseHook):
    """``sites="attn"``: only the self-attention is."""

    def fill(self, hidden: Tensor, computed: Tensor, plan: FrameIndex) -> Tensor:
        """Interpolate the attention's output, which the block adds with its own gate."""
        return fill_skipped_attention(computed, plan, self.lift)


def _gather_argument(value: Any, rule: PerToken, tokens: int, plan: FrameIndex, name: str) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_gather_argument(item, rule, tokens, plan, name) for item in value)
    if rule.ndim is not None and (value.ndim != rule.ndim or value.shape[rule.dim] == 1):
        return value
    if value.shape[rule.dim] != tokens:
        raise HookStateError(
            f"{name} of shape {tuple(value.shape)} has no entry for each of {tokens} video tokens; "
            "describe the layout with fis_dit.register_adapter"
        )
    return gather_frames(value, plan, rule.dim)


class GeometryHook(ModelHook):
    """Runs once per forward, on the probe: reads (F, H, W) and the step, sets every block's plan."""

    _is_stateful = True

    def __init__(
        self, root: nn.Module, adapter: FISAdapter, config: FISConfig, sparse: list[SparseHook]
    ) -> None:
        super().__init__()
        # In a list: a module attribute of a hook is none of the model's children.
        self._root, self._adapter, self._config = [root], adapter, config
        self._sparse = sparse
        self.counters = StateManager(StepCounter)  # pyright: ignore[reportArgumentType]
        self.last: tuple[Geometry, int] | None = None
        self.forwards = 0
        self._plans: OrderedDict[Any, FrameIndex | None] = OrderedDict()
        self._warned = False

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Decide this forward's plans; the probe's own arguments pass through."""
        root = self._root[0]
        self._check(root)
        geometry = self._adapter.geometry(root.config, args, kwargs)  # pyright: ignore[reportArgumentType]
        step, steps = self._step()
        self.last, self.forwards = (geometry, step), self.forwards + 1
        self._check_frames(geometry[0])
        dense = geometry[0] <= 2 or step in self._dense_steps(steps)
        tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        for rank, hook in enumerate(self._sparse):
            hook.tokens = math.prod(geometry)
            # With a device map every block has its own device, which its last output told.
            device = hook.device or tensor.device
            hook.plan = None if dense else self._plan(geometry[0], rank, step, device)
        return args, kwargs

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Start counting steps anew; diffusers calls it at the end of a pipeline call."""
        self.counters.reset()
        return module

    def anchors(self, frames: int, rank: int, step: int) -> tuple[int, ...]:
        """Anchors of the ``rank``-th sparse block at a step: residue (j + step * shift) mod n."""
        config = self._config
        residue = rank + step * config.step_shift
        if config.pattern == "static":
            residue = 0
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

    def _plan(self, frames: int, rank: int, step: int, device: torch.device) -> FrameIndex | None:
        chosen = self.anchors(frames, rank, step)
        key = (frames, chosen, device)
        if key not in self._plans:
            config = self._config
            if len(chosen) < 4 and not self._warned:
                self._warned = True
                warn(f"only {len(chosen)} of {frames} frames are computed; quality will be poor")
            plan = find_neighbours(
                frames, chosen, lift=config.lift, excluded=config.condition_frames
            )
            self._plans[key] = make_frame_index(plan, device) if plan.skipped else None
            self._forget_old_plans()
        self._plans.move_to_end(key)
        return self._plans[key]

    def _forget_old_plans(self) -> None:
        lengths = list(dict.fromkeys(key[0] for key in self._plans))
        for key in [key for key in self._plans if key[0] in lengths[:-KEPT_PLANS]]:
            del self._plans[key]

    def _step(self) -> tuple[int, int | None]:
        """Denoising step of this forward, and how many there are if anybody knows."""
        if self.counters._context is None:
            self.counters.set_context(CacheContext("default"))
            step, steps = self._counted(), None
            self.counters.set_context(None)
        else:
            step, steps = self._counted(), self.counters.context.num_inference_steps
            known = self.counters.context.step_index
            step = step if known is None else int(known)
        return step, steps or self._config.num_inference_steps

    def _counted(self) -> int:
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

    def _check(self, root: nn.Module) -> None:
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
