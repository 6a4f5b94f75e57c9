"""The ``plan`` command: the order of Dash and Dot steps for a budget."""

import json
from pathlib import Path

from effml_common.errors import InputError
from effml_common.report import Summary
from morse_diffusion.config import PlanConfig
from morse_diffusion.method.schedule import MorsePlan, make_plan


def plan(config: PlanConfig) -> Summary:
    """Make a plan for a budget in LSD, or in milliseconds with a profile.

    Raises:
        PlanError: If no plan meets the budget.
        InputError: If the profile cannot be read.
    """
    if config.budget_ms is not None:
        profile = read_profile(Path(config.profile or ""))
        chosen = MorsePlan.from_latency(config.budget_ms, profile, config.early)
    else:
        assert config.budget_lsd is not None
        assert config.n is not None
        chosen = make_plan(config.budget_lsd, config.n, config.r, early=config.early)

    values = {
        "pattern": chosen.pattern,
        "steps": chosen.n_total,
        "Dash steps": chosen.dash_steps,
        "Dot steps": chosen.dot_steps,
        "LSD": round(chosen.lsd, 4),
        "k/n": round(chosen.share, 4),
        "r": round(chosen.expansion, 4),
        "N": chosen.speed_ratio,
        "dash_indices": list(chosen.dash_indices),
    }
    return Summary(values, shown={name: str(value) for name, value in values.items()})


def read_profile(path: Path) -> dict[str, float]:
    """Read ``t_dash``, ``t_dot`` and ``t_sched`` in milliseconds from a JSON file.

    Raises:
        InputError: If it is not an object of numbers.
        OSError: If there is no such file.
    """
    try:
        profile = json.loads(path.read_text(encoding="utf-8"))
        return {name: float(value) for name, value in profile.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f"{path} is no profile ({error}); write t_dash, t_dot and t_sched as JSON numbers"
        ) from error
