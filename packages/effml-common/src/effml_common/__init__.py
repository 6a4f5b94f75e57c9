"""The thin floor under the effml packages: run logs and reports, command lines, checkpoints."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effml_common.cli import Command, parse
    from effml_common.finite import check_finite
    from effml_common.interrupt import StopSignal
    from effml_common.logging import RunLog, say, warn
    from effml_common.report import Claim, Report, Row

# Resolved on first use: a command line that only prints its help must not import torch.
_HOMES = {"Claim": "report", "Command": "cli", "Report": "report", "Row": "report"}
_HOMES |= {"RunLog": "logging", "StopSignal": "interrupt", "check_finite": "finite"}
_HOMES |= {"parse": "cli", "say": "logging", "warn": "logging"}
__all__ = ["Claim", "Command", "Report", "Row", "RunLog", "StopSignal"]
__all__ += ["check_finite", "parse", "say", "warn"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
