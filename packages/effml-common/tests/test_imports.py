"""A command line that only prints its help loads nothing heavy."""

import subprocess
import sys

import pytest

import effml_common


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


def test_every_public_name_resolves_and_there_are_at_most_ten() -> None:
    assert len(effml_common.__all__) <= 10
    for name in effml_common.__all__:
        assert getattr(effml_common, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        effml_common.no_such_name  # noqa: B018
