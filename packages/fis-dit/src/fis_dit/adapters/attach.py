"""Put the hooks on one transformer, and take them off so that nothing stays behind."""

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

MARK = "_fis_attached"  # attribute of a transformer that is frame-sparse


@dataclass
class Attachment:
    """One transformer with its hooks.

    Attributes:
        name: Of the pipeline's component.
        model: The transformer.
        adapter: How it is laid out.
        config: Settings of the sparsity, fitted to the model.
        sparse_blocks: Indices of the sparse blocks, ascending.
        hooks: Hooked module, name of the hook, and the module's forward with the hook.
        processors: Attention, and the processor that was replaced.
        geometry: The hook on the probe; None if no block is sparse.
    """

    name: str
    model: nn.Module
    adapter: FISAdapter
    config: FISConfig
    sparse_blocks: tuple[int, ...]
    hooks: list[tuple[Any, str, Any]] = field(default_factory=list)
    processors: list[tuple[Any, Any]] = field(default_factory=list)
    geometry: GeometryHook | None = None

    @property
    def blocks(self) -> nn.ModuleList:
        """All blocks of the transformer."""
        return blocks_of(self.model, self.adapter)


def blocks_of(model: nn.Module, adapter: FISAdapter) -> nn.ModuleList:
    """Return the list of blocks of a transformer."""
    return getattr(model, adapter.blocks)


def attach(name: str, model: nn.Module, config: FISConfig) -> Attachment:
    """Make one transformer frame-sparse; if that fails, it is as it was.

    Args:
        name: Of the pipeline's component.
        model: The transformer.
        config: Settings of the sparsity.

    Raises:
        UnsupportedModelError: (TypeError) If its class has no adapter.
        ConfigError: (ValueError) If a block is out of range, or a plan is for another model.
        HookStateError: (RuntimeError) If it is frame-sparse already, or another hook would stand inside.
        NotSupportedError: (NotImplementedError) If context parallelism is on.
    """
    # What would go wrong is refused before anything is changed.
    adapter = find_adapter(model)
    _refuse_state_of_model(model, adapter)
    _refuse_settings_of_other_families(model, adapter, config)

    # Which blocks are sparse.
    blocks = blocks_of(model, adapter)
    config = config.fit_to_model(type(model).__name__, len(blocks))
    sparse_blocks = config.sparse_blocks(len(blocks))

    # Hooks and processors go on together, or not at all.
    attachment = Attachment(name, model, adapter, config, sparse_blocks)
    setattr(model, MARK, attachment)
    try:
        if config.drop_text_padding:
            for block in blocks:
                attention = getattr(block, adapter.attention)
                _replace_processor(attachment, attention, TrimmedTextProcessor)
        if not sparse_blocks:
            warn(f"{name}: no block is sparse; the model runs dense")
        elif config.stride > 1:
            _register_hooks(attachment)
    except BaseException:
        detach(attachment)
        raise
    return attachment


def detach(attachment: Attachment) -> None:
    """Take every hook and processor of a transformer off, the last one first."""
    for module, name, sparse_forward in reversed(attachment.hooks):
        _remove_hook(module, name, sparse_forward)
    for attention, processor in reversed(attachment.processors):
        attention.processor = processor
    attachment.hooks, attachment.processors, attachment.geometry = [], [], None

    # Cache contexts must not look for hooks that are gone.
    model = attachment.model
    if hasattr(model, MARK):
        delattr(model, MARK)
    root: Any = getattr(model, "_diffusers_hook", None)
    if root is not None:
        root.invalidate_child_registries_cache()
        if not root.hooks:
            del model._diffusers_hook


def refuse_outer_hooks(attachment: Attachment) -> None:
    """Refuse to remove hooks while later ones, which removal would switch off, are on.

    Raises:
        HookStateError: It names the later hook.
    """
    for module, name, _ in attachment.hooks:
        hooks = _list_hooks(module)
        names = [hook_name for hook_name, _ in hooks]
        later_hooks = hooks[names.index(name) + 1 :] if name in names else []
        for later, hook in later_hooks:
            if hasattr(hook, "new_forward"):
                raise HookStateError(
                    f"the hook {later} was put on after fis-dit, and removing ours would switch it "
                    "off; call disable_cache() (or remove it) first"
                )


def _refuse_state_of_model(model: nn.Module, adapter: FISAdapter) -> None:
    """Refuse a transformer whose hooks or sharding would make the result wrong."""
    name = type(model).__name__
    if getattr(model, MARK, None) is not None:
        raise HookStateError(f"{name} is frame-sparse already; use its handle, or remove_fis first")

    # Context parallelism gives each device a run of frames.
    parallel = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    if parallel is not None or _has_hook(model, "cp_"):
        raise NotSupportedError(
            "context parallelism splits the frames between devices, which is not served yet; run "
            "on one device or use tensor parallelism"
        )

    # Caches and layer skipping replace the forward, and must stand outside of ours.
    for block in blocks_of(model, adapter):
        for module in (block, getattr(block, adapter.attention)):
            for hook_name, hook in _list_hooks(module):
                if hasattr(hook, "new_forward"):
                    raise HookStateError(
                        f"the hook {hook_name} is on {type(module).__name__} already and would stand "
                        "inside ours; call disable_cache() or remove it, apply_fis, then enable it"
                    )


def _refuse_settings_of_other_families(
    model: nn.Module, adapter: FISAdapter, config: FISConfig
) -> None:
    name = type(model).__name__
    if config.kv == "full" and adapter.attention_input is None:
        raise ConfigError(f"kv='full' is there for Wan only, not {name}; use kv='anchor'")
    if config.drop_text_padding and not adapter.trims_text:
        raise ConfigError(f"drop_text_padding is for HunyuanVideo 1.5, not {name}; turn it off")


def _register_hooks(attachment: Attachment) -> None:
    """Hook every sparse block or its attention, and the probe that tells them their anchors."""
    config, adapter = attachment.config, attachment.adapter
    sparse_hooks = list[SparseHook]()
    for number in attachment.sparse_blocks:
        block = attachment.blocks[number]
        attention = getattr(block, adapter.attention)
        if config.sites == "block":
            hook: SparseHook = BlockHook(number, adapter.block_arguments, adapter.per_token, config)
            _register(attachment, block, hook, BLOCK_HOOK)
        else:
            names, rules = adapter.attention_arguments, adapter.attention_per_token
            hook = AttentionHook(number, names, rules, config)
            _register(attachment, attention, hook, ATTENTION_HOOK)
        if config.kv == "full":
            hook.processor = _replace_processor(attachment, attention, FullKeysProcessor)
            hook.full_input = adapter.attention_input if config.sites == "block" else None
        sparse_hooks.append(hook)

    # Cache contexts reach only the hooks that the root knows of.
    model = attachment.model
    attachment.geometry = GeometryHook(model, adapter, config, sparse_hooks)
    _register(attachment, getattr(model, adapter.probe), attachment.geometry, GEOMETRY_HOOK)
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.invalidate_child_registries_cache()


def _register(attachment: Attachment, module: nn.Module, hook: ModelHook, name: str) -> None:
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(hook, name)
    attachment.hooks.append((module, name, module.forward))


def _replace_processor(attachment: Attachment, attention: Any, kind: Any) -> Any:
    processor = kind(attention.processor)
    attachment.processors.append((attention, attention.processor))
    attention.processor = processor
    return processor


def _remove_hook(module: Any, name: str, sparse_forward: Any) -> None:
    """Take one hook off a module; ``sparse_forward`` is the forward that the hook gave it."""
    registry: Any = module._diffusers_hook
    outer = module.forward if getattr(module, "_old_forward", None) is sparse_forward else None
    registry.remove_hook(name, recurse=False)

    # accelerate has wrapped our forward since (a device map, offloading), and stays.
    if outer is not None:
        module._old_forward, module.forward = module.forward, outer

    # Leave nothing behind: the class's own forward is found again.
    if not registry.hooks:
        del module._diffusers_hook
        forward = module.__dict__.get("forward")
        if getattr(forward, "__func__", None) is type(module).forward:
            del module.__dict__["forward"]


def _list_hooks(module: nn.Module) -> list[tuple[str, Any]]:
    """List names and hooks of a module, the innermost first."""
    registry: Any = getattr(module, "_diffusers_hook", None)
    return [] if registry is None else [(n, registry.hooks[n]) for n in registry._hook_order]


def _has_hook(model: nn.Module, prefix: str) -> bool:
    return any(name.startswith(prefix) for m in model.modules() for name, _ in _list_hooks(m))
