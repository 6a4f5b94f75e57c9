"""Bad command lines."""

import pytest
from fis_dit_pipelines import call


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("generate", "nowhere"), "model_index.json"),
        (("inspect", "nowhere"), "config.json"),
        (("plan", "nowhere", "--prompts", "nothing.txt"), "nothing.txt"),
        (("bench", "--arch", "wan-a14b"), "hours a forward"),
        (("bench", "--settings", "mlp-n2"), "mlp-n2"),
        (("demo", "--clips", "1"), "clips"),
        (("generate", "nowhere", "--plan", "no-plan.json"), "no-plan.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_bad_command_line_is_one_line_and_writes_nothing(
    words, told: str, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*words) == 2
    lines = capsys.readouterr().err.splitlines()
    (error,) = [line for line in lines if not line.startswith("device: ")]
    assert error.startswith("error: ")
    assert told in error
    assert "; " in error
    assert list(tmp_path.iterdir()) == []
