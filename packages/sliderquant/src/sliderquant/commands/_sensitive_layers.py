"""What stands out in a report of ``sensitivity``, and the bits that ``quantize`` gives it for that."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effml_common.errors import InputError
from sliderquant.config import SensitivityConfig
from sliderquant.method.layout import WEIGHT_SUFFIX

OUTSTANDING = 2.0  # times the median: worth more bits
RANKED_BY = "ranked by "  # stands before the metric in the setting of a row


def outstanding(values: Mapping[str, float]) -> list[str]:
    """Return the names of what suffers more than ``OUTSTANDING`` times the median, most first.

    Args:
        values: Damage by the name of a block ("block 3") or a layer ("block 3 mlp.down_proj").
    """
    positive = {name: max(value, 0.0) for name, value in values.items()}
    median = sorted(positive.values())[len(positive) // 2]
    ranked = sorted(positive, key=lambda name: -positive[name])
    return [name for name in ranked if positive[name] > OUTSTANDING * median > 0]


def bits_for(names: Sequence[str], bits: int) -> tuple[str, ...]:
    """Return the entries of ``bits_for`` that give what stands out so many bits.

    >>> bits_for(["block 3", "block 0 mlp.down_proj"], 8)
    ('layers.3.*=8', 'layers.0.mlp.down_proj=8')
    """
    entries = []
    for name in names:
        _, block, *layer = name.split(" ")
        entries.append(f"layers.{block}.{layer[0] if layer else '*'}={bits}")
    return tuple(entries)


def row_setting(config: SensitivityConfig) -> str:
    """Return grid, mode and metric as the rows of a report say them; ``read_outstanding`` reads it."""
    groups = f"g{config.group_size}" if config.group_size else "per row"
    grid = "sym" if config.sym else "asym"
    words = f"W{config.wbits} {groups} {grid}, round-to-nearest, {config.mode}"
    return f"{words}, {RANKED_BY}{config.metric}"


def read_outstanding(place: str, blocks: Sequence[Sequence[str]]) -> list[str]:
    """Return what stands out in a report, by the metric that it was made with.

    Args:
        place: The file ``report.json``, or the folder of the run.
        blocks: Names of the linear weights of each block of the model to be quantized.

    Raises:
        InputError: If it is no report of ``sensitivity``, of another model, or of prefixes.
    """
    # The rows, with the metric of the ranking.
    path = _report_file(place)
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
        rows = document["rows"]
        metric = rows[0]["setting"].split(RANKED_BY)[1]
        values = {row["name"]: float(row["metrics"][metric]["mean"]) for row in rows}
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path") from None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise InputError(
            f"{path} is no report of this version's sensitivity command; run sensitivity again"
        ) from None

    # Blocks, or layers, each rounded alone.
    if any(name.startswith("blocks ") for name in values):
        raise InputError(
            f"{path} has mode prefix, which does not tell blocks apart; run sensitivity in mode single"
        )
    by_block = [f"block {block}" for block in range(len(blocks))]
    by_layer = [
        f"block {block} {name.removesuffix(WEIGHT_SUFFIX)}"
        for block, names in enumerate(blocks)
        for name in names
    ]
    if sorted(values) not in (sorted(by_block), sorted(by_layer)):
        reported = len({name.split(" ")[1] for name in values if " " in name})
        raise InputError(
            f"{path} is of another model: it has {len(values)} rows for {reported} blocks, this model "
            f"{len(blocks)} blocks with {len(by_layer)} layers; run sensitivity on this one"
        )
    return outstanding(values)


def _report_file(place: str) -> Path:
    """Return the report in a folder of a run, or the file itself."""
    path = Path(place)
    inside = (path / "run" / "report.json", path / "report.json")
    return next((file for file in inside if file.is_file()), inside[0]) if path.is_dir() else path
