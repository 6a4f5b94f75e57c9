"""``com-pt cost``: what a run has spent, beside its plan."""

import json
from pathlib import Path
from typing import Any

from com_pt.config import CostConfig
from com_pt.training.chain import parse_chain
from com_pt.training.plan import plan_chain
from com_pt.training.run_folder import LEDGER, SETTINGS
from effml_common.errors import InputError
from effml_common.report import Summary


def cost(config: CostConfig) -> Summary:
    """Show what a run spent, stage by stage, beside the plan.

    Raises:
        InputError: If the folder holds no run.
    """
    # Read the settings of the run and its ledger, a line for each finished stage.
    run = Path(config.run) / "run"
    try:
        settings = json.loads((run / SETTINGS).read_text(encoding="utf-8"))
        ledger = (run / LEDGER).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(
            f"{config.run} holds no finished stage; give the --out of train"
        ) from error

    # Compare each finished stage with the plan for as many samples as it has seen.
    settings.pop("digest")
    planned = plan_chain(parse_chain(settings))
    stages: dict[str, Any] = {}
    for entry, stage in zip(map(json.loads, ledger), planned.stages, strict=False):
        stages[stage.name] = {
            "updates": entry["steps"],
            "GMAC": entry["macs"] / 1e9,
            "planned GMAC": entry["samples"] * stage.per_sample / 1e9,
            "seconds": round(entry["seconds"], 1),
            "GMAC a second": entry["macs"] / 1e9 / max(entry["seconds"], 1e-9),
        }
    whole_run = {
        name: sum(stage[name] for stage in stages.values()) for name in ("GMAC", "seconds")
    }
    return Summary(
        {**stages, "whole run": whole_run},
        note="GMAC a second falls where a frozen predecessor or small layers wait",
    )
