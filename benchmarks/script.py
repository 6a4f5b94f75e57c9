"""What every script of this folder does around its work."""

import sys
from collections.abc import Callable
from typing import Any

from effml_common.errors import InputError
from effml_common.logging import warn
from effml_common.parsing import parse


def run_script(config_type: type, prog: str, work: Callable[[Any], object]) -> int:
    """Parse the flags and do the work; return the exit code, 2 with one line on bad input.

    Args:
        config_type: Settings.
        prog: How the script is called.
        work: Gets the settings; an integer that it returns is the exit code.
    """
    try:
        result = work(parse(config_type, sys.argv[1:], prog=prog))
    except InputError as error:
        warn(str(error))
        return 2
    return result if isinstance(result, int) else 0
