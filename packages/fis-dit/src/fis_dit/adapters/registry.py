"""The table of transformer classes that fis-dit knows; ``register_adapter`` adds one of your own."""

from torch import nn

from fis_dit.adapters.families.cogvideox import COGVIDEOX
from fis_dit.adapters.families.hunyuan_video import HUNYUAN_VIDEO_15
from fis_dit.adapters.families.ltx_video import LTX_VIDEO
from fis_dit.adapters.families.mochi import MOCHI
from fis_dit.adapters.families.wan import WAN
from fis_dit.adapters.layout import FISAdapter
from fis_dit.errors import UnsupportedModelError

_ADAPTERS: dict[str, FISAdapter] = {
    "WanTransformer3DModel": WAN,
    "WanVACETransformer3DModel": WAN,
    "HunyuanVideo15Transformer3DModel": HUNYUAN_VIDEO_15,
    "CogVideoXTransformer3DModel": COGVIDEOX,
    "LTXVideoTransformer3DModel": LTX_VIDEO,
    "MochiTransformer3DModel": MOCHI,
}


def register_adapter(transformer: type[nn.Module] | str, adapter: FISAdapter) -> None:
    """Teach fis-dit a transformer class.

    A subclass is not covered by the adapter of its parent: causal and autoregressive models share blocks
    with the ordinary ones, and would come out wrong.

    Args:
        transformer: The class, or its name.
        adapter: How it is laid out.

    >>> register_adapter("WanLikeTransformer", find_adapter("WanTransformer3DModel"))
    >>> find_adapter("WanLikeTransformer").blocks
    'blocks'
    """
    name = transformer if isinstance(transformer, str) else transformer.__name__
    _ADAPTERS[name] = adapter


def find_adapter(transformer: nn.Module | str) -> FISAdapter:
    """Look up the adapter of a transformer, or of the name of its class.

    Raises:
        UnsupportedModelError: A TypeError that lists the classes with an adapter.
    """
    name = transformer if isinstance(transformer, str) else type(transformer).__name__
    if name not in _ADAPTERS:
        raise UnsupportedModelError(
            f"{name} is not supported; use one of {', '.join(sorted(_ADAPTERS))}, or describe yours "
            "with fis_dit.register_adapter"
        )
    return _ADAPTERS[name]
