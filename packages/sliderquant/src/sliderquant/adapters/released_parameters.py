"""The authors' ``slider_parameters.pth``, turned into learnables of the method slider.

Their code (deep-optimization/SliderQuant) saves a dictionary from block numbers to named tensors; names,
shapes and what differs from this package stand in docs/formats.md. Two things are theirs and not ours:
alpha of queries and keys has an entry for each channel, also where the rotary embedding turns two of
them together, and it scales the projections even where a norm follows (Qwen3). It is read as it is,
because the other parameters were trained beside it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effml_common.errors import InputError
from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.families import untied_query_key_site
from sliderquant.adapters.simulation import fresh_learnables
from sliderquant.config import SliderConfig
from sliderquant.method.layout import WEIGHT_SUFFIX
from sliderquant.method.learnables import BlockLearnables

# Families that the released code reads, and its names of the channel scales, by our names of the sites.
RELEASED_FAMILIES = ("llama", "qwen2", "qwen3")
QUERY_KEY = "q <-> k"
SCALES = {
    "norm -> qkv": "qkv_smooth_scale",
    "norm -> mlp": "fc1_smooth_scale",
    "v -> o": "out_smooth_scale",
    "up -> down": "fc2_smooth_scale",
    QUERY_KEY: "qkt_smooth_scale",
}
SHIFTS = ("qkv_smooth_shift", "fc1_smooth_shift", "out_smooth_shift", "fc2_smooth_shift")
CORRECTIONS = ("lora_A.0", "lora_B.0")
BOUNDS = ("weight_quantizer.upbound_factor", "weight_quantizer.lowbound_factor")

ReleasedBlocks = Mapping[int, Mapping[str, Tensor]]


def released_learnables(
    path: str | Path, decoder: TransformersDecoder, config: SliderConfig, dtype: torch.dtype
) -> list[BlockLearnables]:
    """Return the learnables of every block, with the parameters of a file of the released code.

    Args:
        path: ``slider_parameters.pth``.
        decoder: The model for which it was made, rotated already if that was.
        config: Bits, group size, rank and which parameters there are; asymmetric.
        dtype: Type of the stored scales.

    Raises:
        InputError: If the file holds anything but tensors, or one that does not fit the settings.
    """
    family = decoder.model.config.model_type
    if family not in RELEASED_FAMILIES:
        raise InputError(
            f"{path}: the released code does not read {family}; give a model of "
            f"{', '.join(RELEASED_FAMILIES)}"
        )
    blocks = read_released(path)
    if sorted(blocks) != list(range(decoder.depth)):
        raise InputError(
            f"{path} holds blocks {_span(blocks)} and the model has {decoder.depth}; give the model for "
            "which it was made"
        )

    # A run without use_lora saves no correction; B is zero then, as it is here at first.
    corrected = any("lora_" in name for tensors in blocks.values() for name in tensors)
    learnables = fresh_learnables(decoder, config, dtype)
    for block, learned in enumerate(learnables):
        _untie_queries_and_keys_(learned, decoder, block)
        places = _places(learned, corrected)
        _fill_(places, blocks[block], f"{path}, block {block}", decoder.device)
    return learnables


def read_released(path: str | Path) -> ReleasedBlocks:
    """Read a file of the released code; no code in it is run.

    Raises:
        InputError: If it cannot be read, or is no dictionary of named finite tensors for each block.
    """
    try:
        # weights_only refuses everything but tensors and plain containers.
        blocks = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror or error}); check the path"
        ) from None
    except Exception as error:  # a damaged pickle or archive may raise anything
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(
            f"{path} is no file of tensors alone ({reason}); give slider_parameters.pth as the released "
            "code saves it"
        ) from None

    # Block number -> name -> tensor.
    if not isinstance(blocks, Mapping) or not all(isinstance(key, int) for key in blocks):
        raise InputError(
            f"{path} is no dictionary of block numbers; give slider_parameters.pth as the released code "
            "saves it"
        )
    for block, tensors in blocks.items():
        if not isinstance(tensors, Mapping):
            raise InputError(f"{path}, block {block}: no named tensors; restore the file")
        for name, value in tensors.items():
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise InputError(f"{path}, block {block}: {name!r} is no tensor; restore the file")
            if not torch.isfinite(value).all():
                raise InputError(
                    f"{path}, block {block}: {name!r} holds NaN or infinity; use an intact file"
                )
    return blocks


def _span(blocks: Mapping[int, Any]) -> str:
    """Return which blocks a file holds, in a few words."""
    return f"{min(blocks)} to {max(blocks)}, {len(blocks)} in all" if blocks else "none"


def _untie_queries_and_keys_(
    learned: BlockLearnables, decoder: TransformersDecoder, block: int
) -> None:
    """Give the place between queries and keys a factor for each channel, as in the released code."""
    names = [site.name for site in learned.sites]
    if QUERY_KEY not in names:
        return
    place = names.index(QUERY_KEY)
    site = untied_query_key_site(decoder.model.config, decoder.shapes(block))
    learned.sites = (*learned.sites[:place], site, *learned.sites[place + 1 :])
    learned.factors[place] = nn.Parameter(torch.ones(site.size, device=decoder.device))


def _places(learned: BlockLearnables, corrected: bool) -> dict[str, Tensor]:
    """Return where each tensor of the file goes, by its name, in the shape that it must have."""
    places: dict[str, Tensor] = {}
    for name, linear in zip(learned.names, learned.linears, strict=True):
        layer = name.removesuffix(WEIGHT_SUFFIX)
        if corrected:
            for kind, value in zip(CORRECTIONS, (linear.lora_a, linear.lora_b), strict=True):
                places[f"{layer}.{kind}"] = value.data
        if learned.clipping:
            # One row for each group, those of an output row behind each other.
            for kind, value in zip(BOUNDS, (linear.upper, linear.lower), strict=True):
                places[f"{layer}.{kind}"] = value.data.view(-1, 1)

    for site, factor in zip(learned.sites, learned.factors, strict=True):
        scale = SCALES[site.name]
        places[scale] = factor.data
        shift = scale.replace("scale", "shift")
        if shift in SHIFTS:  # never trained; where it would be put is of no importance
            places[shift] = torch.zeros_like(factor.data)
    return places


def _fill_(
    places: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str, device: torch.device
) -> None:
    """Copy the tensors of a block to their places.

    Raises:
        InputError: Naming a tensor that is missing, has no place, or another shape than its place.
    """
    for name in sorted(places.keys() - tensors.keys())[:1]:
        raise InputError(f"{where}: {name!r} is missing; {_remedy(name, True)}")
    for name in sorted(tensors.keys() - places.keys())[:1]:
        raise InputError(f"{where}: {name!r} has no place here; {_remedy(name, False)}")
    for name, place in places.items():
        value = tensors[name]
        if value.shape != place.shape:
            raise InputError(
                f"{where}: {name!r} has shape {list(value.shape)}, model and settings ask for "
                f"{list(place.shape)}; {_remedy_for_shape(name, value.shape)}"
            )
        if name in SHIFTS and value.any():
            raise InputError(
                f"{where}: {name!r} is not zero; shifts cannot be stored, calibrate again without them"
            )
        place.copy_(value.to(device, torch.float32))


def _remedy(name: str, is_missing: bool) -> str:
    """Return what to do about a name that is on one side only."""
    if "bound_factor" in name:
        return "add --no-lwc" if is_missing else "leave --no-lwc out"
    if "_smooth_" in name:
        return f"add --channel-scale {'off' if is_missing else 'on'}"
    return "restore the file" if is_missing else "docs/formats.md lists the names that are read"


def _remedy_for_shape(name: str, shape: Sequence[int]) -> str:
    """Return what to do about a tensor of another shape."""
    if name.endswith(CORRECTIONS[0]):
        return f"add --lora-rank {shape[0]}, or give the model for which it was made"
    if name.endswith(BOUNDS):
        return "give the --group-size for which it was made, none for one scale per row"
    if name in ("out_smooth_scale", "out_smooth_shift", SCALES[QUERY_KEY]):
        return "files made with gqa_scales mean are not read; give the model for which it was made"
    return "give the model and the settings for which it was made"
