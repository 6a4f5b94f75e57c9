"""A command line that only prints its help loads nothing heavy."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "effml_common",
        "effml_common.cli",
        "effml_common.device",
        "effml_common.errors",
        "effml_common.report",
    ],
)
def test_importing_loads_neither_torch_nor_the_parser(module: str) -> None:
    heavy = "{'torch', 'numpy', 'jsonargparse', 'rich', 'safetensors'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
