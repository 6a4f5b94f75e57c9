"""``com-pt grow``: make a larger model that starts from a finished smaller one."""

import json

from com_pt.adapters.files import build_like, compare_outputs, load_any, save_any
from com_pt.adapters.grow import grow
from com_pt.config import GrowConfig
from effml_common.device import resolve_device
from effml_common.errors import ConfigError
from effml_common.files import atomic_write
from effml_common.folders import run_folder
from effml_common.report import Summary


def grow_model(config: GrowConfig) -> Summary:
    """Grow a model and save it.

    Raises:
        InputError: If a model cannot be loaded, or the two cannot be connected.
    """
    # Refuse what cannot be written or computed before anything is read.
    device = resolve_device(config.device)
    out = run_folder(config.out, "grow")
    if out.exists():
        raise ConfigError(f"{out} is there already; choose another --out")

    # Read the small model, and create the large one with fresh weights.
    small = load_any(config.small, config.small_model)
    large, spec = build_like(small, config.large, config.seed)
    small.model.to(device)
    large.to(device)

    # Grow, and see how far the outputs have moved; other image sizes have other inputs.
    report = grow(
        small.model,
        large,
        config.mode,
        config.depth,
        resize_pos=config.resize_pos,
        strict=config.strict,
        seed=config.seed,
        allow_missing=config.allow_missing,
    )
    changes = {} if config.resize_pos else compare_outputs(small, large)

    # Write the model as its library loads it, and the record of its growth beside it.
    save_any(large, small, spec, out)
    (out / "run").mkdir()
    atomic_write(out / "run" / "growth.json", json.dumps(report.to_json(), indent=1) + "\n")
    return Summary(
        {
            "grown": str(out),
            "mode": f"{report.mode}, depth {report.depth}",
            "inherited": round(report.inherited, 4),
            "copied parameters": len(report.copied),
            "fresh parameters": report.fresh,
            "left out of the small model": report.skipped,
            "layers": report.layers,
            "outputs on random inputs": changes,
        },
        note="inherited: share of the large model's numbers that come from the small one",
    )
