"""Tables of named values."""

import io
import json

from rich.console import Console

from effml_common.summary import Summary


def printed(summary: Summary) -> str:
    console = Console(width=100, file=io.StringIO())
    console.print(summary)
    return console.file.getvalue()


def test_values_are_a_table_with_title_and_note() -> None:
    text = printed(
        Summary(
            {"model": "vit [tiny]", "share": 0.123456, "sizes": [1, 2.5], "by part": {"mlp": 3}},
            title="a plan",
            note="counted, not measured",
        )
    )
    for part in ("a plan", "vit [tiny]", "0.1235", "1, 2.5", "mlp 3", "counted, not measured"):
        assert part in text


def test_a_cell_can_show_another_text_than_the_value() -> None:
    summary = Summary({"weights": 12_345_678, "depth": 3}, shown={"weights": "12.35M"})
    assert "12.35M" in printed(summary)
    assert "12345678" not in printed(summary)
    assert summary.to_json() == {"weights": 12_345_678, "depth": 3}


def test_json_is_strict_whatever_the_numbers() -> None:
    values = Summary({"gap": float("nan"), "shape": (2, 3)}).to_json()
    assert json.loads(json.dumps(values, allow_nan=False)) == {"gap": "nan", "shape": [2, 3]}


def test_a_long_value_does_not_fill_the_terminal() -> None:
    assert printed(Summary({"x": "a" * 5000})).count("a") <= 300
