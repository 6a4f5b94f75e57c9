"""The Python of the README runs as it is written."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks() -> list[str]:
    if not README.exists():
        return []
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("code", blocks(), ids=lambda code: code.splitlines()[-1][:20])
def test_an_example_of_the_readme_runs(code: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert (tmp_path / "student.pth").is_file()
