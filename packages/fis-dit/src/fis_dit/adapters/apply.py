"""Attach frame sparsity to a live diffusers pipeline or transformer, and take it off again."""

import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from effml_common.errors import ConfigError
from effml_common.logging import warn
from fis_dit.adapters.hooks import (
    ATTENTION_HOOK,
    BLOCK_HOOK,
    GEOMETRY_HOOK,
    AttentionHook,
    BlockHook,
    GeometryHook,
    SparseHook,
)
from fis_dit.adapters.layout import FISAdapter
from fis_dit.adapters.processors import FullKeysProcessor, TrimmedTextProcessor
from fis_dit.adapters.registry import find_adapter
from fis_dit.config import FISConfig
from fis_dit.errors import HookStateError, NotSupportedError
from fis_dit.method.cost import Cost, flops

COMPONENTS = ("transformer", "transformer_2")


@dataclass
class Attached:
    """One transformer with its hooks."""

    name: str
    model: nn.Module
    adapter: FISAdapter
    config: FISConfig
    blocks: tuple[int, ...]
    hooks: list[tuple[Any, str, Any]] = field(default_factory=list)  # with its new forward
    processors: list[tuple[Any, Any]] = field(default_factory=list)
    geometry: GeometryHook | None = None


class FISHandle:
    """What ``apply_fis`` returns: a summary, the predicted cost, and the way back.

    Also a context manager that removes on exit.
    """

    def __init__(self, attached: list[Attached]) -> None:
        self._attached = attached

    def summary(self) -> dict[str, Any]:
        """Per transformer: blocks, stride, and of the last forward its frames, step and anchors."""
        out: dict[str, Any] = {}
        for item in self._attached:
            told: dict[str, Any] = {
                "class": type(item.model).__name__,
                "sparse_blocks": list(item.blocks),
                "depth": len(_blocks(item.model, item.adapter)),
                "stride": item.config.stride,
                "sites": item.config.sites,
                "lift": item.config.lift,
            }
            if item.geometry is not None and item.geometry.last is not None:
                (frames, height, width), step = item.geometry.last
                ranks = range(len(item.blocks))
                shown = [item.geometry.anchors(frames, rank, step) for rank in ranks]
                dense = frames <= 2 or all(len(a) == frames for a in shown)
                told |= {"frames": frames, "tokens_per_frame": height * width, "last_step": step}
                told |= {"forwards": item.geometry.forwards, "dense": dense}
                told["anchors"] = [list(a) for a in dict.fromkeys(shown)]
            out[item.name] = told
        return out

    def flops(self, *, height: int, width: int, num_frames: int, steps: int = 4) -> dict[str, Cost]:
        """Predicted cost per transformer, for a clip in pixels (VAE factors of its family)."""
        return {
            item.name: clip_cost(
                type(item.model).__name__,
                item.model.config,  # pyright: ignore[reportArgumentType]
                item.config,
                (num_frames, height, width),
                steps=steps,
            )
            for item in self._attached
        }

    def reset(self) -> None:
        """Count denoising steps from 0 again; pipelines do so themselves."""
        for item in self._attached:
            if item.geometry is not None:
                item.geometry.counters.reset()

    def remove(self) -> None:
        """Take every hook and processor off; a second call does nothing.

        Raises:
            HookStateError: If a cache or skip hook was put on after ours; nothing is removed then.
        """
        for item in self._attached:
            for module, name, _ in item.hooks:
                _refuse_outer_hooks(module, name)
        for item in self._attached:
            _detach(item)
        self._attached = []

    def __enter__(self) -> "FISHandle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def apply_fis(target: Any, config: FISConfig | Mapping[str, FISConfig]) -> FISHandle:
    """Make a pipeline's transformers, or one transformer, frame-sparse.

    Call it before ``enable_cache`` and the like, so that ours is the innermost hook.

    Args:
        target: A diffusers pipeline or transformer.
        config: One for all transformers, or one for each of ``transformer`` and ``transformer_2``.

    Raises:
        UnsupportedModelError: (TypeError) No adapter for the class.
        ConfigError: (ValueError) A block is out of range, or a plan is for another model.
        HookStateError: (RuntimeError) Applied twice, or another hook would stand inside ours.
        NotSupportedError: (NotImplementedError) Context parallelism is on.
    """
    _check_diffusers()
    attached: list[Attached] = []
    try:
        for name, model, chosen in _targets(target, config):
            attached.append(_attach(name, model, chosen))
    except BaseException:
        for item in attached:
            _detach(item)
        raise
    return FISHandle(attached)


def remove_fis(target: Any) -> None:
    """Take frame sparsity off a pipeline or transformer, where the handle is out of reach."""
    for model in _transformers(target).values():
        found = getattr(model, "_fis_attached", None)
        if found is not None:
            FISHandle([found]).remove()


def clip_cost(
    model_class: str,
    model_config: Mapping[str, Any],
    config: FISConfig,
    clip: tuple[int, int, int],
    *,
    compression: tuple[int, int] | None = None,
    steps: int = 4,
) -> Cost:
    """Cost of a clip of (frames, height, width) in pixels."""
    adapter = find_adapter(model_class)
    frames, height, width = clip_geometry(adapter, model_config, clip, compression)
    depth = model_config["num_layers"]
    return flops(adapter.shape(model_config), config, depth, frames, height * width, steps)


def clip_geometry(
    adapter: FISAdapter,
    model_config: Mapping[str, Any],
    clip: tuple[int, int, int],
    compression: tuple[int, int] | None = None,
) -> tuple[int, int, int]:
    """(F, H, W) in tokens of a clip of (frames, height, width) in pixels."""
    time, space = compression or adapter.compression
    p_t, p_s = adapter.patch(model_config)
    latent = (clip[0] - 1) // time + 1
    return -(-latent // p_t), clip[1] // space // p_s, clip[2] // space // p_s


def _check_diffusers() -> None:
    version = importlib.metadata.version("diffusers")
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if not (0, 42) <= numbers < (0, 44):
        raise HookStateError(
            f"fis-dit was tested with diffusers 0.42 and 0.43, found {version}; install one of them"
        )


def _transformers(target: Any) -> dict[str, nn.Module]:
    if isinstance(target, nn.Module):
        return {"transformer": target}
    found = {name: getattr(target, name, None) for name in COMPONENTS}
    present = {name: model for name, model in found.items() if isinstance(model, nn.Module)}
    if not present:
        find_adapter(type(target).__name__)  # raises, listing what is supported
    return present


def _targets(
    target: Any, config: FISConfig | Mapping[str, FISConfig]
) -> Iterator[tuple[str, nn.Module, FISConfig]]:
    present = _transformers(target)
    if isinstance(config, FISConfig):
        config = dict.fromkeys(present, config)
    for name, chosen in config.items():
        if name not in present:
            raise ConfigError(
                f"there is no {name} here; give settings for {' and '.join(present)} only"
            )
        yield name, present[name], chosen


def _blocks(model: nn.Module, adapter: FISAdapter) -> nn.ModuleList:
    return getattr(model, adapter.blocks)


def _fitted(config: FISConfig, model: nn.Module, depth: int) -> FISConfig:
    """Check what a plan was made for."""
    name = type(model).__name__
    if config.model_class in (None, name) and config.layers in (None, depth):
        return config
    problem = (
        f"the plan is for {config.model_class} of {config.layers} blocks, not {name} of {depth}"
    )
    if config.strict:
        raise ConfigError(f"{problem}; plan again, or set strict=False")
    warn(f"{problem}; its block list was rescaled")
    return config.rescaled(depth)


def _attach(name: str, model: nn.Module, config: FISConfig) -> Attached:
    adapter = find_adapter(model)
    blocks = _blocks(model, adapter)
    config = _fitted(config, model, len(blocks))
    chosen = config.sparse_blocks(len(blocks))
    _refuse_what_breaks(model, adapter, config)
    item = Attached(name, model, adapter, config, chosen)
    model._fis_attached = item  # pyright: ignore[reportArgumentType]
    try:
        if config.drop_text_padding:
            for block in blocks:
                _replace_processor(item, getattr(block, adapter.attention), TrimmedTextProcessor)
        if not chosen:
            warn(f"{name}: no block is sparse; the model runs dense")
        elif config.stride > 1:
            _register(item, [blocks[number] for number in chosen])
    except BaseException:
        _detach(item)
        raise
    return item


def _register(item: Attached, blocks: list[nn.Module]) -> None:
    config, adapter, sparse = item.config, item.adapter, list[SparseHook]()
    for number, block in zip(item.blocks, blocks, strict=True):
        attention = getattr(block, adapter.attention)
        if config.sites == "block":
            hook: SparseHook = BlockHook(number, adapter.block_arguments, adapter.per_token, config)
            _hook(item, block, hook, BLOCK_HOOK)
        else:
            names, rules = adapter.attention_arguments, adapter.attention_per_token
            hook = AttentionHook(number, names, rules, config)
            _hook(item, attention, hook, ATTENTION_HOOK)
        if config.kv == "full":
            hook.processor = _replace_processor(item, attention, FullKeysProcessor)
            hook.full_input = adapter.attention_input if config.sites == "block" else None
        sparse.append(hook)
    item.geometry = GeometryHook(item.model, adapter, config, sparse)
    _hook(item, getattr(item.model, adapter.probe), item.geometry, GEOMETRY_HOOK)
    # Cache contexts reach only the hooks that the root knows of.
    registry = HookRegistry.check_if_exists_or_initialize(item.model)
    registry.invalidate_child_registries_cache()


def _hook(item: Attached, module: nn.Module, hook: ModelHook, name: str) -> None:
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(hook, name)
    item.hooks.append((module, name, module.forward))


def _replace_processor(item: Attached, attention: Any, kind: Any) -> Any:
    processor = kind(attention.processor)
    item.processors.append((attention, attention.processor))
    attention.processor = processor
    return processor


def _detach(item: Attached) -> None:
    for module, name, ours in reversed(item.hooks):
        registry: Any = module._diffusers_hook
        outer = module.forward if getattr(module, "_old_forward", None) is ours else None
        registry.remove_hook(name, recurse=False)
        if outer is not None:
            # accelerate has wrapped ours since (a device map, offloading), and stays.
            module._old_forward, module.forward = module.forward, outer
        if not registry.hooks:
            # Leave nothing behind: the class's own forward is found again.
            del module._diffusers_hook
            forward = module.__dict__.get("forward")
            if getattr(forward, "__func__", None) is type(module).forward:
                del module.__dict__["forward"]
    for attention, processor in reversed(item.processors):
        attention.processor = processor
    item.hooks, item.processors, item.geometry = [], [], None
    if hasattr(item.model, "_fis_attached"):
        del item.model._fis_attached
    if (root := getattr(item.model, "_diffusers_hook", None)) is not None:
        root.invalidate_child_registries_cache()
        if not root.hooks:
            del item.model._diffusers_hook


def _refuse_what_breaks(model: nn.Module, adapter: FISAdapter, config: FISConfig) -> None:
    name = type(model).__name__
    if getattr(model, "_fis_attached", None) is not None:
        raise HookStateError(f"{name} is frame-sparse already; use its handle, or remove_fis first")
    parallel = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    if parallel is not None or _has_hook(model, "cp_"):
        raise NotSupportedError(
            "context parallelism splits the frames between devices, which is not served yet; run "
            "on one device or use tensor parallelism"
        )
    if config.kv == "full" and adapter.attention_input is None:
        raise ConfigError(f"kv='full' is there for Wan only, not {name}; use kv='anchor'")
    if config.drop_text_padding and not adapter.trims_text:
        raise ConfigError(f"drop_text_padding is for HunyuanVideo 1.5, not {name}; turn it off")
    for block in _blocks(model, adapter):
        for module in (block, getattr(block, adapter.attention)):
            for hook_name, hook in _hooks(module):
                if hasattr(hook, "new_forward"):
                    raise HookStateError(
                        f"the hook {hook_name} is on {type(module).__name__} already and would stand "
                        "inside ours; call disable_cache() or remove it, apply_fis, then enable it"
                    )


def _refuse_outer_hooks(module: nn.Module, name: str) -> None:
    names = [hook_name for hook_name, _ in _hooks(module)]
    if name not in names:
        return
    for outer, hook in _hooks(module)[names.index(name) + 1 :]:
        if hasattr(hook, "new_forward"):
            raise HookStateError(
                f"the hook {outer} was put on after fis-dit, and removing ours would switch it off; "
                "call disable_cache() (or remove it) first"
            )


def _hooks(module: nn.Module) -> list[tuple[str, Any]]:
    registry: Any = getattr(module, "_diffusers_hook", None)
    return [] if registry is None else [(n, registry.hooks[n]) for n in registry._hook_order]


def _has_hook(model: nn.Module, prefix: str) -> bool:
    return any(name.startswith(prefix) for m in model.modules() for name, _ in _hooks(m))
