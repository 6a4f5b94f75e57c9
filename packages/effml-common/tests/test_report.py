"""Reports: statistics against tables, schema, self-contained pages."""

import base64
import importlib.metadata
import io
import json
import math
import random
import re
import statistics
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from effml_common.report import (
    Claim,
    Report,
    ReportBuilder,
    Row,
    Summary,
    environment,
    html_section,
    render_html,
    resolve,
    t_quantile,
    without_paths,
    write_report,
)

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d4944415478da63"
    "6460f85f0f0002870180eb47ba920000000049454e44ae426082"
)


@pytest.mark.parametrize(
    ("df", "value"),
    [
        (1, 12.7062),
        (2, 4.3027),
        (3, 3.1824),
        (4, 2.7764),
        (10, 2.2281),
        (30, 2.0423),
        (100, 1.9840),
    ],
)
def test_t_quantile_matches_the_tables(df, value) -> None:
    assert t_quantile(df) == pytest.approx(value, abs=6e-5)


def test_t_quantile_is_exact_where_it_has_a_closed_form() -> None:
    assert t_quantile(1) == pytest.approx(math.tan(0.475 * math.pi), rel=1e-12)
    assert t_quantile(2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), rel=1e-12)


def test_claim_is_resolved_by_the_paired_t_interval() -> None:
    gaps = [1.0, 1.2, 0.9]
    mean, stderr, verdict = resolve(gaps)
    assert mean == pytest.approx(statistics.mean(gaps))
    assert stderr == pytest.approx(statistics.stdev(gaps) / math.sqrt(3))
    assert verdict == "yes"
    assert resolve([-gap for gap in gaps])[2] == "no"
    # mean 1, standard error 0.577: below 4.3027 of them.
    assert resolve([0.0, 1.0, 2.0])[2] == "not resolved"
    assert resolve([5.0, 5.1])[2] == "not resolved"


def report(tmp_path) -> Report:
    return Report(
        package="sliderquant",
        version="0.1.0",
        command=["sliderquant", "demo", "--out", str(tmp_path / "x")],
        seeds=[0, 1, 2],
        seconds=1.5,
        rows=[Row("ours <b>", "W2", {"ppl": [1.0, 2.0, 4.0]}), Row("theirs", "W2", {"ppl": [3.0]})],
        claims=[Claim("c", "ours is lower", [1.0, 1.2, 0.9])],
        notes=["a note"],
    )


def test_report_json_has_the_schema_and_no_absolute_path(tmp_path) -> None:
    write_report(report(tmp_path), tmp_path)
    text = (tmp_path / "report.json").read_text()
    data = json.loads(text)
    assert str(tmp_path) not in text
    assert data["schema"] == 1
    assert set(data) - {"notes"} == {
        "schema", "package", "version", "command", "seeds", "seconds", "environment", "rows",
        "claims", "files",
    }  # fmt: skip
    assert set(data["environment"]) == {"python", "torch", "device", "cpu_count", "libraries"}
    metric = data["rows"][0]["metrics"]["ppl"]
    assert metric["values"] == [1.0, 2.0, 4.0]
    assert metric["n"] == 3
    assert metric["mean"] == pytest.approx(7 / 3)
    assert metric["stderr"] == pytest.approx(statistics.stdev([1, 2, 4]) / math.sqrt(3))
    assert data["claims"][0]["holds"] == "yes"


def test_page_is_self_contained_and_escaped(tmp_path) -> None:
    figure = tmp_path / "curve.png"
    figure.write_bytes(PNG)
    write_report(report(tmp_path), tmp_path, figures=[figure])
    page = (tmp_path / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "http://" not in page
    assert "https://" not in page
    assert "ours &lt;b&gt;" in page
    assert str(tmp_path) not in page


def test_a_page_can_hold_several_reports(tmp_path) -> None:
    page = render_html("all <b>", 2 * [html_section(report(tmp_path).to_json())])
    assert page.count("<section>") == page.count("ours is lower") == 2
    assert "<h1>all &lt;b&gt;</h1>" in page


def test_the_page_prints_in_a_terminal_too(tmp_path) -> None:
    console = Console(width=120, file=io.StringIO())
    console.print(report(tmp_path))
    text = console.file.getvalue()
    assert "2.333 ± 0.88" in text
    assert "ours <b>" in text
    assert "yes: ours is lower (gap 1.033 ± 0.088)" in text
    assert "a note" in text


@pytest.mark.parametrize("width", [80, 120])
def test_a_narrow_terminal_gets_whole_numbers_and_the_names_of_what_is_left_out(width) -> None:
    metrics = {f"IoU {k}": [70.5 + k, 72.5 + k] for k in range(14)}
    wide = Report(
        package="p", version="1", command=["p"], seeds=[1, 2], seconds=1.0, environment={},
        rows=[Row("an arm of a long name", "a setting of many words", metrics)], claims=[],
    )  # fmt: skip
    console = Console(width=width, file=io.StringIO())
    console.print(wide)
    text = console.file.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    shown = [k for k in range(14) if f"{71.5 + k} ± 1" in text]
    assert 0 < len(shown) < 14
    assert f"{14 - len(shown)} more columns in report.html: IoU {len(shown)}, " in text


@pytest.mark.parametrize("values", [[math.nan, 1.0], [math.inf, 1.0, 2.0], [1e200, -1e200, 3.0]])
def test_non_finite_and_huge_numbers_do_not_break_a_report(tmp_path, values) -> None:
    bad = replace(
        report(tmp_path), rows=[Row("a", "", {"x": values})], claims=[Claim("c", "t", values)]
    )
    write_report(bad, tmp_path)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    text = (tmp_path / "report.json").read_text()
    data = json.loads(text, parse_constant=refuse)
    assert data["claims"][0]["holds"] == "not resolved"


def test_equal_gaps_are_resolved_and_zero_gaps_are_not() -> None:
    assert resolve([0.5, 0.5, 0.5]) == (0.5, 0.0, "yes")
    assert resolve([0.0, 0.0, 0.0])[2] == "not resolved"
    assert resolve([1.0]) == (1.0, None, "not resolved")
    assert resolve([])[2] == "not resolved"


@pytest.mark.parametrize("n", [3, 4, 5, 8, 31])
def test_the_verdict_turns_exactly_at_the_t_quantile(n) -> None:
    noise = [random.Random(seed).gauss() for seed in range(n)]
    centre = statistics.mean(noise)
    edge = t_quantile(n - 1) * statistics.stdev(noise) / math.sqrt(n)
    for share, verdict in [(1.001, "yes"), (0.999, "not resolved"), (-1.001, "no")]:
        assert resolve([value - centre + share * edge for value in noise])[2] == verdict


@pytest.mark.parametrize("df", [1, 2, 3, 5, 6, 17])
def test_t_quantile_bounds_95_percent_of_the_density(df) -> None:
    t = t_quantile(df)
    scale = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
    width = t / 10_000  # the midpoint rule over half of the symmetric density
    middles = [(k + 0.5) * width for k in range(10_000)]
    half = sum(width * scale * (1 + x * x / df) ** (-(df + 1) / 2) for x in middles)
    assert 2 * half == pytest.approx(0.95, abs=1e-6)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("/usr/local/bin/tool", "tool"),
        ("{cwd}/runs/demo", "runs/demo"),
        ("{cwd}", "."),
        ("--out={cwd}/runs/demo", "--out=runs/demo"),
        ("--out=/data/my model", "--out=my model"),
        ("/data/my model/x y.txt", "x y.txt"),
        ("['/data/a.txt', '/data/b.txt']", "['a.txt', 'b.txt']"),
        ('File "/srv/lib/x.py", line 3', 'File "x.py", line 3'),
        ("error:/srv/x failed", "error:x failed"),
        ("runs/demo", "runs/demo"),
        ("../models/tiny", "../models/tiny"),
        ("tokens/s and w/o", "tokens/s and w/o"),
        ("1 / 3", "1 / 3"),
        ("mailto see doc://a/b", "mailto see doc://a/b"),
    ],
)
def test_absolute_paths_become_relative_or_bare_names(tmp_path, monkeypatch, word, expected):
    monkeypatch.chdir(tmp_path)
    word = word.format(cwd=tmp_path)
    told = replace(
        report(tmp_path), command=[word], notes=[f"see {word}"], files=[word], seconds=0.0
    )
    data = told.to_json()
    assert data["command"] == data["files"] == [expected]
    if " " not in expected or "/" not in word or word == expected:
        assert data["notes"] == [f"see {expected}"]
    shown = html_section(told.to_json()) + without_paths(f"Traceback: {word}")
    assert str(tmp_path) not in shown
    assert "/data" not in shown
    assert "/srv" not in shown


def test_figures_are_embedded_byte_for_byte(tmp_path) -> None:
    (tmp_path / "a <curve>.png").write_bytes(PNG)
    section = html_section(report(tmp_path).to_json(), [tmp_path / "a <curve>.png"])
    (embedded,) = re.findall(r'src="data:image/png;base64,([^"]+)"', section)
    assert base64.b64decode(embedded) == PNG
    assert "<curve>" not in section


def test_other_ranks_write_no_report(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    write_report(report(tmp_path), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_environment_names_installed_libraries_only() -> None:
    made = environment(["rich", "no-such-library"], device="cpu")
    assert made["libraries"] == {"rich": importlib.metadata.version("rich")}
    assert made["torch"] == importlib.metadata.version("torch")
    assert made["python"] == ".".join(map(str, sys.version_info[:3]))


def test_a_builder_fills_in_what_is_the_same_for_every_run(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", "demo"])
    figure = tmp_path / "curve.png"
    figure.write_bytes(PNG)

    builder = ReportBuilder("effml-common", libraries=["rich"])
    built = builder.write(
        tmp_path / "out" / "run",
        [Row("a", "b", {"loss": [1.0]})],
        seeds=[7],
        device="cuda:0 (card)",
        notes=["a note"],
        figures=[figure],
    )

    data = json.loads((tmp_path / "out" / "run" / "report.json").read_text())
    assert data["package"] == "effml-common"
    assert data["version"] == importlib.metadata.version("effml-common")
    assert (data["command"], data["seeds"], data["files"]) == (["tool", "demo"], [7], ["curve.png"])
    assert data["environment"]["device"] == "cuda:0 (card)"
    assert data["environment"]["libraries"] == {"rich": importlib.metadata.version("rich")}
    assert 0 <= data["seconds"] < 60
    assert built.to_json() == data
    assert "data:image/png" in (tmp_path / "out" / "run" / "report.html").read_text()
    assert capsys.readouterr().err.endswith("report.html\n")


def test_a_report_names_other_files_than_its_figures_if_told() -> None:
    builder = ReportBuilder("effml-common")
    assert builder.build([], files=["student.safetensors"]).files == ["student.safetensors"]


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
