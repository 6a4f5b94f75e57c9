"""The thin floor under the effml packages: run logs and reports, command lines, checkpoints."""

from typing import TYPE_CHECKING

from effml_common.exports import lazy_exports

if TYPE_CHECKING:
    from effml_common.cli import Command as Command
    from effml_common.finite import check_finite as check_finite
    from effml_common.interrupt import StopSignal as StopSignal
    from effml_common.logging import RunLog as RunLog
    from effml_common.logging import say as say
    from effml_common.logging import warn as warn
    from effml_common.parsing import parse as parse
    from effml_common.report import Claim as Claim
    from effml_common.report import Report as Report
    from effml_common.report import Row as Row

lazy_exports(
    __name__,
    {
        "Claim": "report",
        "Command": "cli",
        "Report": "report",
        "Row": "report",
        "RunLog": "logging",
        "StopSignal": "interrupt",
        "check_finite": "finite",
        "parse": "parsing",
        "say": "logging",
        "warn": "logging",
    },
)
