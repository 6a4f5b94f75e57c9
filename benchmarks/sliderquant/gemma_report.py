"""The report of the study on Gemma 3 270M: JSON, a table in Markdown and a picture of what there is."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.sliderquant.gemma_cells import (
    DEVELOPMENT,
    FULL,
    FUNCTIONS,
    GRIDS,
    GemmaConfig,
    is_own,
    known_results,
    source_hash,
)
from effml_common.files import atomic_write
from effml_common.logging import say
from effml_common.report import Claim, Report, Row, environment

NAMES = {
    "rtn": "round to nearest",
    "hqq": "HQQ",
    "gptq": "GPTQ",
    "smoothquant-gptq": "SmoothQuant + GPTQ",
    "awq": "AWQ",
    "autoround": "AutoRound",
    "autoround-ext": "AutoRound, extended",
    "compensated": "sliderquant: compensated",
    "combined": "sliderquant: combined",
    "slider": "sliderquant: slider",
    FULL: FULL,
}
UNCALIBRATED = ("rtn", "hqq")  # their one run stands beside every seed
# Pairs of the package's own arms of which the first is claimed to be lower.
OWN_CLAIMS = (("compensated", "slider"), ("combined", "compensated"), ("combined", "slider"))
PEER_LIBRARIES = ("llmcompressor", "auto-round", "hqq", "compressed-tensors")
MARKERS = dict(zip(FUNCTIONS, "os^>vD<*XP", strict=True))
# Red for the package's default, black for AutoRound's second version; grey is full precision.
SHADES = ("C0", "C1", "C2", "C9", "C4", "C5", "black", "C3", "C6", "C8")
COLORS = dict(zip(FUNCTIONS, SHADES, strict=True))
TITLES = {
    "W4g128": "4 bits, groups of 128",
    "W3g128": "3 bits, groups of 128",
    "W2g64": "2 bits, groups of 64",
    "W2": "2 bits, one scale per row",
    "W4A4": "4 bits, activations too",
}
TEXT_NAMES = {"python-docs": "Python's documentation", "prose": "Debian's handbook"}  # for Gemma
EARLIER = " (earlier code)"  # behind the name of a row whose code has changed since
WIDE = 3.0  # times the smallest perplexity: then a logarithmic axis
BROKEN = 1000.0  # times full precision: beyond it an arrow, however good the others are
CROWDED = 200.0  # range of an axis from which on only powers of ten are named
FAR = 5.0  # times the smallest perplexity: then an arrow at the edge, with the value
LABEL_WIDTH = 0.055  # of a panel, for an upright value
LEGEND_ROWS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One row: an arm on a model at a setting.

    Attributes:
        model: "gemma" or "llama".
        setting: Key of ``GRIDS``, or ``FULL``.
        arm: Key of ``FUNCTIONS``, or ``FULL``.
        label: The arm, with those settings that are not the study's own.
        runs: Results by seed.
    """

    model: str
    setting: str
    arm: str
    label: str
    runs: Mapping[int, Mapping[str, Any]]

    @property
    def name(self) -> str:
        """The row's name in the table."""
        return NAMES[self.arm] + self.label.removeprefix(self.arm)

    @property
    def texts(self) -> list[str]:
        """Names of the texts that all runs were measured on, those that settings are chosen on last."""
        names = set.intersection(*(set(run["ppl"]) for run in self.runs.values()))
        return sorted(names, key=lambda name: (name.endswith(DEVELOPMENT), name))

    def values(self, text: str) -> list[float]:
        """Return the perplexities on a text, one per seed."""
        return [run["ppl"][text] for run in self.runs.values()]

    def of_seed(self, seed: int) -> Mapping[str, Any] | None:
        """Return the run of a seed; a method without calibration has one run for all."""
        return self.runs.get(0 if self.arm in UNCALIBRATED else seed)

    def cost(self, name: str) -> list[float]:
        """Return "cpu_seconds", "seconds" or "peak_mib" of every run; none for full precision."""
        return [run[name] for run in self.runs.values() if name in run]


def entries(config: GemmaConfig) -> list[Entry]:
    """Return all rows there are, in the order of the study; no row mixes versions of the code."""
    versions: dict[tuple[str, str, str, str], dict[str, dict[int, Any]]] = {}
    for result in known_results(Path(config.cells)):
        key = (result["model"], result["setting"], result["arm"], result["label"])
        of_code = versions.setdefault(key, {}).setdefault(result.get("source", ""), {})
        of_code[result["seed"]] = result

    # The version with the most seeds, of several the latest.
    runs = {key: max(each.values(), key=_seeds_and_date) for key, each in versions.items()}
    settings, arms = [FULL, *GRIDS], [FULL, *FUNCTIONS]
    order = sorted(runs, key=lambda k: (k[0], settings.index(k[1]), arms.index(k[2]), k[3]))
    return [
        Entry(
            model=key[0],
            setting=key[1],
            arm=key[2],
            label=key[3],
            runs=dict(sorted(runs[key].items())),
        )
        for key in order
    ]


def _seeds_and_date(runs: Mapping[int, Mapping[str, Any]]) -> tuple[int, str]:
    return len(runs), max(run["date"] for run in runs.values())


def write(config: GemmaConfig, command: Sequence[str]) -> str | None:
    """Write JSON, Markdown and pictures of the cells there are.

    Returns:
        The Markdown, or ``None`` if there are no cells.
    """
    rows = entries(config)
    if not rows:
        say("nothing to report yet")
        return None

    # Pictures first, because the report names them.
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(out, rows)
    report = Report(
        package="sliderquant",
        version=version("sliderquant"),
        command=command,
        seeds=sorted({seed for row in rows for seed in row.runs}),
        seconds=sum(seconds for row in rows for seconds in row.cost("seconds")),
        rows=[_row(entry) for entry in rows],
        claims=_claims(rows),
        notes=_notes(rows),
        files=[path.name for path in pictures],
        environment=environment(("transformers", *PEER_LIBRARIES)),
    )

    text = json.dumps(report.to_json(), indent=1, allow_nan=False)
    atomic_write(out / "sliderquant-gemma.json", text + "\n")
    markdown = markdown_table(rows)
    atomic_write(out / "sliderquant-gemma.md", markdown)
    return markdown


def _row(entry: Entry) -> Row:
    """Return a row of the report, whose setting says how the arm was run."""
    metrics = {f"ppl {text}": entry.values(text) for text in entry.texts}
    costs = {"CPU seconds": "cpu_seconds", "seconds": "seconds", "peak MiB": "peak_mib"}
    metrics |= {name: entry.cost(key) for name, key in costs.items() if entry.cost(key)}
    first = next(iter(entry.runs.values()))
    how = [first.get("library", "float32"), first.get("how", "")]
    if _is_outdated(entry):
        how.append("measured with an earlier version of the method")
    name = f"{entry.model} {entry.name}"
    if entry.setting != FULL:
        name = f"{entry.model} {entry.setting} {entry.name}"
    return Row(name, "; ".join(filter(None, how)), metrics)


def _is_outdated(entry: Entry) -> bool:
    """Whether the package's own code has changed since any of the runs."""
    return is_own(entry.arm) and any(
        run["source"] != source_hash(entry.arm) for run in entry.runs.values()
    )


def _claims(rows: Sequence[Entry]) -> list[Claim]:
    """Return "sliderquant is lower than X" for its arms as they are, on every held-out text."""
    claims = []
    for own in rows:
        if not is_own(own.arm) or own.label != own.arm:
            continue
        others = [
            row
            for row in rows
            if (row.model, row.setting) == (own.model, own.setting)
            and (not is_own(row.arm) or _are_comparable(own, row))
        ]
        for other in others:
            claims += _paired_claims(own, other)
    return claims


def _are_comparable(own: Entry, other: Entry) -> bool:
    """Whether one of the package's arms is claimed to be lower than the other; both are as they are."""
    if (own.arm, other.label) not in OWN_CLAIMS:
        return False
    return not (_is_outdated(own) or _is_outdated(other))


def _paired_claims(own: Entry, other: Entry) -> list[Claim]:
    """Return a claim per held-out text, on the seeds that both have."""
    pairs = [(own.of_seed(seed), other.of_seed(seed)) for seed in own.runs]
    known = [(ours, theirs) for ours, theirs in pairs if ours and theirs]
    if not known:
        return []
    name = own.name + (EARLIER if _is_outdated(own) else "")
    return [
        Claim(
            f"{own.model}-{own.setting}-{own.label}-{other.label}-{text}".replace(" ", "_"),
            f"{own.model} {own.setting}: {name} is lower than {other.name} on {text}",
            [theirs["ppl"][text] - ours["ppl"][text] for ours, theirs in known],
        )
        for text in own.texts
        if not text.endswith(DEVELOPMENT)
    ]


def _notes(rows: Sequence[Entry]) -> list[str]:
    notes = [
        "full precision is Gemma 3 270M as the package index has it, dequantized from 4 to 8 bits a "
        "weight: compare methods with each other, not with figures published for Gemma",
        "every method gets the same 64 samples of 512 tokens (Llama: 128); a seed varies samples, batch "
        "order and initial values; embedding and head, one tensor in Gemma, and norms are not rounded",
        "weights are rounded on asymmetric grids, activations asymmetrically per token",
        "every chunk and sample begins with BOS; the texts are pages of Python's documentation that "
        "were not calibrated on, and of the Debian handbook",
        "CPU seconds are user and system time of the quantization alone, by one thread",
        "HQQ keeps real-valued zero points; AWQ runs with the pinning of memory for a GPU left out",
        "AutoRound has 50 iterations at a rate of 0.005, as in its light recipe, in float32, with the "
        "64 samples of all, in batches of --batch-size; the recipe has 128 of 2,048 in batches of 8",
        "SmoothQuant has a strength of 0.8, behind the norms of attention and MLP, and inside the MLP",
        "sliderquant: slider has two epochs, one for each intra-layer stage, in batches of 4; behind "
        "compensated rounding windows have one, in batches of one",
    ]
    machines = {run["machine"]["processor"] for row in rows for run in row.runs.values()}
    return [*notes, f"measured on {', '.join(sorted(machines))}"]


def markdown_table(rows: Sequence[Entry]) -> str:
    """Return a table of perplexities and costs for each model, mean and standard error over seeds."""
    parts = []
    for model in dict.fromkeys(row.model for row in rows):
        here = [row for row in rows if row.model == model]
        texts = list(dict.fromkeys(text for row in here for text in row.texts))
        header = ["setting", "method", *texts, "CPU seconds", "peak MiB", "seeds"]
        lines = [header, ["---"] * len(header)]
        for row in here:
            numbers = [_number(row.values(t) if t in row.texts else []) for t in texts]
            costs = [_number(row.cost(name)) for name in ("cpu_seconds", "peak_mib")]
            name = row.name + (EARLIER if _is_outdated(row) else "")
            lines.append([row.setting, name, *numbers, *costs, str(len(row.runs))])
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"## {model}\n\n{table}\n")
    return "\n".join(parts)


def _number(values: Sequence[float]) -> str:
    """Return mean and, for several values, standard error; empty for none."""
    if not values:
        return ""
    mean, error = _mean_and_error(values)
    digits = 4 if mean < 1e4 else 3
    text = f"{mean:.{digits}g}" if mean < 1e4 else f"{mean:.{digits}e}"
    return text + (f" ± {error:.2g}" if len(values) > 1 else "")


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard error, 0 for one value."""
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return mean, 0.0
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)


def _pictures(out: Path, rows: Sequence[Entry]) -> list[Path]:
    """Draw perplexity against CPU seconds, a file for each model."""
    if find_spec("matplotlib") is None:
        say("no pictures: install sliderquant[plot]")
        return []
    pictures = []
    for model in dict.fromkeys(row.model for row in rows):
        here = [row for row in rows if row.model == model]
        if any(row.setting != FULL for row in here):
            suffix = "" if model == "gemma" else f"-{model}"
            pictures.append(_picture(out / f"sliderquant-gemma{suffix}.png", here))
    return pictures


def _picture(path: Path, rows: Sequence[Entry]) -> Path:
    """Draw one panel per setting and held-out text."""
    from matplotlib.figure import Figure

    texts = [text for text in rows[0].texts if not text.endswith(DEVELOPMENT)]
    settings = [name for name in GRIDS if any(row.setting == name for row in rows)]
    full = [row for row in rows if row.setting == FULL]
    drawn = [row for row in rows if row.setting != FULL and row.label == row.arm]
    costs = [seconds for row in drawn for seconds in row.cost("cpu_seconds")]
    size = (3.2 * len(settings) + 0.4, 3.2 * len(texts) + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(texts), len(settings), squeeze=False)

    # Panels show what is near the best; what is far off is an arrow at the upper edge.
    handles: dict[str, Any] = {}
    for line, text in enumerate(texts):
        for column, setting in enumerate(settings):
            panel = panels[line][column]
            here = [row for row in drawn if row.setting == setting]
            levels = full[0].values(text) if full else []
            for level in levels:
                handles[FULL] = panel.axhline(level, color="grey", linestyle="--")
            panel.set_xscale("log")
            panel.set_xlim(0.5 * min(costs), 6.0 * max(costs))  # room for values side by side
            _draw_panel(panel, here, text, levels, handles)
            panel.set_title(TITLES[setting] if line == 0 else "")
            panel.set_xlabel("CPU seconds" if line == len(texts) - 1 else "")
            words = TEXT_NAMES.get(text, text) if rows[0].model == "gemma" else text
            panel.set_ylabel(f"perplexity, {words}" if column == 0 else "")

    names = [name for name in (FULL, *FUNCTIONS) if name in handles]
    figure.legend(
        [handles[name] for name in names],
        [NAMES[name] for name in names],
        loc="outside lower center",
        ncols=-(-len(names) // LEGEND_ROWS),
        title="hollow: earlier code" if any(map(_is_outdated, drawn)) else None,
    )
    figure.savefig(path, dpi=110)
    return path


def _draw_panel(
    panel: Any,
    rows: Sequence[Entry],
    text: str,
    levels: Sequence[float],
    handles: dict[str, Any],
) -> None:
    """Draw the arms of one setting on one text, with standard errors over seeds."""
    from matplotlib.ticker import LogLocator, NullLocator

    points = {row.arm: _mean_and_error(row.values(text)) for row in rows}
    edge = min(
        FAR * min(mean for mean, _ in points.values()), BROKEN * min(levels, default=math.inf)
    )
    arrows: dict[str, tuple[float, str]] = {}
    for row in rows:
        mean, error = points[row.arm]
        seconds = sum(row.cost("cpu_seconds")) / len(row.runs)
        style = {
            "color": COLORS[row.arm],
            "marker": MARKERS[row.arm],
            "markersize": 8,
            "linestyle": "none",
        }
        style |= {"fillstyle": "none"} if _is_outdated(row) else {}
        if mean <= edge:
            handles[row.arm] = panel.errorbar(seconds, mean, yerr=error, capsize=3, **style)
        else:
            handles.setdefault(row.arm, panel.plot(seconds, edge, **style)[0])
            arrows[row.arm] = seconds, f"↑ {mean:.1g}" if mean >= 1e5 else f"↑ {mean:,.0f}"
    _write_beyond_edge(panel, arrows, edge)

    # Full precision is in the picture; perplexities at few bits differ by orders of magnitude.
    shown = [*levels, *(min(mean, edge) for mean, _ in points.values())]
    if max(shown) > WIDE * min(shown):
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(
            LogLocator(subs=(1, 2, 5) if max(shown) < CROWDED * min(shown) else (1,))
        )
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value < 1e5 else "")
        panel.yaxis.set_minor_locator(NullLocator())
    panel.margins(y=0.12)
    panel.grid(visible=True, alpha=0.25)


def _write_beyond_edge(panel: Any, arrows: Mapping[str, tuple[float, str]], edge: float) -> None:
    """Write upright below each arrow what it stands for; side by side for methods that take as long."""
    left, right = panel.get_xlim()
    step, free_from = (right / left) ** LABEL_WIDTH, left
    for arm, (seconds, words) in sorted(arrows.items(), key=lambda item: item[1]):
        place = max(seconds, free_from)
        free_from = place * step
        panel.annotate(
            words, (place, edge), xytext=(0, -8), textcoords="offset points", fontsize=9,
            rotation=90, ha="center", va="top", color=COLORS[arm],
        )  # fmt: skip
