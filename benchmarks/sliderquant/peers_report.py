"""The report of the comparison: table, paired claims and pictures of the cells there are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.sliderquant.peers_cells import (
    GRIDS,
    Cell,
    PeersConfig,
    ablation_cells,
    cell_of,
    full_cell,
    methods_of,
    refusal,
    result_of,
    seeds_of,
    sensitivity_cells,
    slider_settings,
)
from effml_common.files import atomic_write
from effml_common.logging import say
from effml_common.report import Claim, Report, Row, environment, write_report
from sliderquant.commands.inspect import make_plan
from sliderquant.config import SliderConfig

WHOLE = "all windows, halves by network"  # the method as it is, among its ablations
NAMES = {
    "full": "full precision",
    "rtn": "round-to-nearest",
    "torchao": "torchao",
    "hqq": "HQQ",
    "gptq": "GPTQ",
    "smoothquant-gptq": "SmoothQuant + GPTQ",
    "smoothquant-gptq-inside": "SmoothQuant in MLPs too + GPTQ",
    "awq": "AWQ",
    "autoround": "AutoRound",
    "autoround-extended": "AutoRound, extended",
    "slider-visits": "sliderquant, equal visits",
    "slider-seconds": "sliderquant, equal seconds",
    "slider-compensated": "sliderquant, compensated",
    "slider-defaults": "sliderquant, package's rates",
    WHOLE: f"sliderquant ({WHOLE})",
}
PEER_LIBRARIES = ("llmcompressor", "auto-round", "hqq", "torchao", "compressed-tensors")
MARKERS = "os^vD<>Ph*X"
PER_ROW = 3  # panels
WIDE = 3.0  # times the smallest perplexity: then a logarithmic axis
FAR = 1.4  # times the smallest perplexity: then an arrow at the edge, with the value


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One row: a method on a model at a setting.

    Attributes:
        family: Model.
        setting: Grid.
        label: Method, or arm of the ablation.
        runs: What was measured, by seed; without what failed.
        trouble: Why it was not run, or the error of a run that failed.
    """

    family: str
    setting: str
    label: str
    runs: dict[int, dict[str, Any]]
    trouble: str = ""

    @property
    def name(self) -> str:
        """The row's name."""
        parts = dict.fromkeys((self.family, self.setting, NAMES.get(self.label, self.label)))
        return " ".join(parts)

    def of_seed(self, seed: int) -> dict[str, Any] | None:
        """Return the run of a seed; a method without calibration has one run for all."""
        return self.runs.get(seed, self.runs.get(0))

    def values(self, text: str) -> list[float]:
        """Return the perplexities on a text, one per seed."""
        return [run["ppl"][text] for run in self.runs.values()]

    def seconds(self) -> float:
        """Return the mean CPU time of the quantization."""
        return sum(run["cpu_seconds"] for run in self.runs.values()) / len(self.runs)


def entries(config: PeersConfig) -> list[Entry]:
    """Return all rows of the comparison for which something is known."""
    # Full precision of every model, then every method at every setting.
    rows = [_entry(config, [full_cell(f)]) for f in dict.fromkeys(f for f, _ in config.pairs)]
    for family, name in config.pairs:
        for method in methods_of(config, name):
            reason = refusal(config, name, method)
            if reason is not None:
                trouble = f"not supported: {reason}"
                rows.append(
                    Entry(family=family, setting=name, label=method, runs={}, trouble=trouble)
                )
                continue

            cells = [
                cell_of(config, family, name, method, seed) for seed in seeds_of(config, method)
            ]
            rows.append(_entry(config, [cell for cell in cells if cell is not None]))
    return [entry for entry in rows if entry is not None]


def ablations(config: PeersConfig) -> list[Entry]:
    """Return the rows of the ablation for which something is known."""
    arms: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in ablation_cells(config):
        arms.setdefault((cell.family, cell.setting, cell.label), []).append(cell)
    rows = [_entry(config, cells) for cells in arms.values()]
    return [entry for entry in rows if entry is not None]


def _entry(config: PeersConfig, cells: Sequence[Cell]) -> Entry | None:
    results = {cell.seed: result_of(config, cell) for cell in cells}
    known = {seed: result for seed, result in results.items() if result is not None}
    if not known:
        return None
    errors = [result["error"] for result in known.values() if "error" in result]
    return Entry(
        family=cells[0].family,
        setting=cells[0].setting,
        label=cells[0].label,
        runs={seed: result for seed, result in known.items() if "error" not in result},
        trouble=f"failed: {errors[0]}" if errors else "",
    )


def write(config: PeersConfig, command: Sequence[str]) -> Report | None:
    """Write the report of the cells there are; ``None`` if there are none.

    Returns:
        The report that is written to ``--out`` as JSON, and with its pictures to ``--cells``.
    """
    # What the cells hold so far.
    peers, arms, damages = entries(config), ablations(config), _damages(config)
    if not any(entry.runs for entry in (*peers, *arms)) and not damages:
        say("nothing to report yet")
        return None

    # Pictures, rows and claims.
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    figures = _figures(out, peers, arms, damages)
    runs = [run for entry in (*peers, *arms) for run in entry.runs.values()]
    report = Report(
        package="sliderquant",
        version=version("sliderquant"),
        command=command,
        seeds=config.seeds,
        seconds=sum(run.get("seconds", 0.0) for run in runs),
        rows=[*map(_row, (*peers, *arms)), *_damage_rows(damages)],
        claims=[*_claims(config, peers), *_ablation_claims(config, arms)],
        notes=_notes(config),
        files=[path.name for path in figures],
        environment=environment(("transformers", *PEER_LIBRARIES)),
    )

    # The page with its pictures stays with the cells; the JSON goes to the results.
    staging = Path(config.cells) / "report"
    staging.mkdir(parents=True, exist_ok=True)
    write_report(report, staging, figures=figures)
    document = (staging / "report.json").read_text(encoding="utf-8")
    atomic_write(out / "sliderquant-peers.json", document)
    return report


def _row(entry: Entry) -> Row:
    runs = list(entry.runs.values())
    if not runs:
        return Row(entry.name, entry.trouble, {})
    metrics = {f"ppl {text}": entry.values(text) for text in runs[0]["ppl"]}
    if "seconds" in runs[0]:
        metrics["seconds"] = [run["seconds"] for run in runs]
        metrics["CPU seconds"] = [run["cpu_seconds"] for run in runs]
        metrics["peak MiB"] = [run["peak_mib"] for run in runs]
        metrics["added MiB"] = [run["added_mib"] for run in runs]
    parts = (runs[0].get("library", ""), runs[0].get("how", "float32"), entry.trouble)
    return Row(entry.name, "; ".join(part for part in parts if part), metrics)


def _claims(config: PeersConfig, peers: Sequence[Entry]) -> list[Claim]:
    """Return "sliderquant is lower than X" for both its ways, and at equal seconds for AutoRound."""
    claims = []
    for family, name in config.pairs:
        here = {e.label: e for e in peers if (e.family, e.setting) == (family, name) and e.runs}
        for label, entry in here.items():
            own_labels = []
            if not label.startswith("slider"):
                own_labels = ["slider-visits", "slider-compensated"]
            if label.startswith("autoround"):
                own_labels.append("slider-seconds")
            elif label == "slider-visits":
                own_labels.append("slider-compensated")
            for own in own_labels:
                if own in here:
                    claims += _paired_claims(config, here[own], entry)
    return claims


def _ablation_claims(config: PeersConfig, arms: Sequence[Entry]) -> list[Claim]:
    complete = {(arm.family, arm.setting): arm for arm in arms if arm.label == WHOLE and arm.runs}
    claims = []
    for arm in arms:
        own = complete.get((arm.family, arm.setting))
        if own is not None and arm.label != WHOLE and arm.runs:
            claims += _paired_claims(config, own, arm)
    return claims


def _paired_claims(config: PeersConfig, own: Entry, other: Entry) -> list[Claim]:
    """Return a claim per text, on the seeds that both have."""
    pairs = [(own.of_seed(seed), other.of_seed(seed)) for seed in config.seeds]
    known = [(ours, theirs) for ours, theirs in pairs if ours and theirs]
    if not known:
        return []
    claim = f"{NAMES.get(own.label, own.label)} is lower than {NAMES.get(other.label, other.label)}"
    return [
        Claim(
            f"{own.family}-{own.setting}-{own.label}-{other.label}-{text}".replace(" ", "_"),
            f"{own.family} {own.setting}: {claim} on {text}",
            [theirs["ppl"][text] - ours["ppl"][text] for ours, theirs in known],
        )
        for text in known[0][0]["ppl"]
    ]


def _notes(config: PeersConfig) -> list[str]:
    # What equal visits mean for sliderquant.
    grid = GRIDS["W2g64"]
    settings = SliderConfig(**slider_settings(config, grid, 0))
    visits = make_plan(settings, None, config.layers).block_visits
    passes = config.iters * config.batch_size / config.nsamples

    return [
        f"every method gets the same {config.nsamples} samples of {config.context} tokens of the "
        "training text; a seed varies samples, batch order and initial values; embeddings and head "
        "stay in full precision; weights are asymmetric, activations asymmetric per token",
        f"equal visits: AutoRound passes iters x batch / samples = {config.iters} x "
        f"{config.batch_size} / {config.nsamples} = {passes:g} times over each of {config.layers} "
        f"blocks; sliderquant's epochs are that x {config.layers} / {visits} block visits, in whole "
        f"intra-layer stages: {settings.epochs}",
        "equal seconds: as many epochs as fit into the CPU seconds of the AutoRound run of the same "
        "seed, by one timed run of the fewest epochs; its own seconds are measured again",
        "sliderquant, compensated, has no rates; its damping is that of GPTQ",
        f"sliderquant's rates {config.lr_lora:g} (correction) and {config.lr_lwc:g} (clipping) were "
        "chosen on development text for the demo's model; the peers' rates are their own defaults",
        "peak MiB is that of the process, added MiB what the quantization added to libraries and model",
        "HQQ keeps real-valued zero points; AWQ runs with the pinning of memory for a GPU left out",
        "the models are small and trained for minutes: read the order, not the distance",
    ]


def _damages(config: PeersConfig) -> dict[str, list[dict[str, float]]]:
    """Return what rounding each block alone does, by model and setting."""
    damages = {}
    for cell in sensitivity_cells(config):
        result = result_of(config, cell)
        if result is not None and "damage" in result:
            damages[f"{cell.family} {cell.setting}"] = result["damage"]
    return damages


def _damage_rows(damages: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Row]:
    return [
        Row(
            f"{name} {each['name']}",
            "rounded to nearest, the others not",
            {"ppl rise": [each["ppl"]], "KL": [each["kl"]]},
        )
        for name, blocks in damages.items()
        for each in blocks
    ]


def _figures(
    out: Path,
    peers: Sequence[Entry],
    arms: Sequence[Entry],
    damages: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[Path]:
    """Draw what there is to draw."""
    if find_spec("matplotlib") is None:
        say("no pictures: install sliderquant[plot]")
        return []
    groups, changed = _by_setting(peers), _by_setting(arms)
    full = {e.family: e for e in peers if e.label == "full precision" and e.runs}
    pictures = []
    if groups:
        pictures.append(_methods_picture(out / "sliderquant-peers.png", groups, full))
        pictures.append(_cost_picture(out / "sliderquant-peers-cost.png", groups))
    if changed:
        pictures.append(_methods_picture(out / "sliderquant-peers-ablation.png", changed, {}))
    if damages:
        pictures.append(_damage_picture(out / "sliderquant-peers-sensitivity.png", damages))
    return pictures


def _by_setting(rows: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Return the rows of every model and setting that have runs."""
    groups: dict[str, list[Entry]] = {}
    for entry in rows:
        if entry.runs and entry.label != "full precision":
            groups.setdefault(f"{entry.family} {entry.setting}", []).append(entry)
    return groups


def _methods_picture(
    path: Path, groups: Mapping[str, Sequence[Entry]], full: Mapping[str, Entry]
) -> Path:
    """Perplexity by method, one panel per text and setting; bars are standard errors."""
    from matplotlib.figure import Figure

    texts = list(next(iter(next(iter(groups.values()))[0].runs.values()))["ppl"])
    columns, stripes = min(PER_ROW, len(groups)), -(-len(groups) // PER_ROW)
    height = len(texts) * stripes
    figure = Figure(figsize=(5 * columns, 3.2 * height), layout="constrained")
    panels = figure.subplots(height, columns, squeeze=False)
    for column in range((len(groups) - 1) % PER_ROW + 1, columns):
        for row in range(len(texts)):  # the last stripe may be short
            panels[height - 1 - row][column].remove()
    for place, (name, group) in enumerate(groups.items()):
        stripe, column = divmod(place, PER_ROW)
        for row, text in enumerate(texts):
            panel = panels[stripe * len(texts) + row][column]
            means, errors = zip(*(_mean_and_error(e.values(text)) for e in group), strict=True)
            edge = FAR * min(means)
            for line, (mean, error) in enumerate(zip(means, errors, strict=True)):
                if mean <= edge:
                    panel.errorbar(mean, line, xerr=error, fmt="oC0", capsize=3)
                else:
                    panel.plot(edge, line, ">C0")
                    panel.annotate(
                        f"{mean:.0f}   ", (edge, line), ha="right", va="center", fontsize="small"
                    )
            if group[0].family in full:
                panel.axvline(full[group[0].family].values(text)[0], color="grey", linestyle="--")
            panel.set_yticks(range(len(group)), [NAMES.get(e.label, e.label) for e in group])
            panel.invert_yaxis()
            panel.set(title=name, xlabel=f"perplexity, {text}")
    figure.savefig(path, dpi=120)
    return path


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    squares = sum((value - mean) ** 2 for value in values)
    return mean, (squares / max(1, len(values) - 1) / len(values)) ** 0.5


def _cost_picture(path: Path, groups: Mapping[str, Sequence[Entry]]) -> Path:
    """Perplexity against the CPU time of the quantization, one panel per setting."""
    from matplotlib.figure import Figure

    columns, height = min(PER_ROW, len(groups)), -(-len(groups) // PER_ROW)
    figure = Figure(figsize=(3.5 * columns + 3, 3.4 * height), layout="constrained")
    panels = figure.subplots(height, columns, squeeze=False).ravel()
    for unused in panels[len(groups) :]:
        unused.remove()
    marks = {}  # one per method, for the legend
    # Fewer groups than panels where the last row is short.
    for panel, (name, group) in zip(panels, groups.items(), strict=False):
        text = next(iter(next(iter(group[0].runs.values()))["ppl"]))
        for entry in group:
            place = list(NAMES).index(entry.label)
            (marks[entry.label],) = panel.plot(
                entry.seconds(),
                _mean_and_error(entry.values(text))[0],
                MARKERS[place % len(MARKERS)],
                color=f"C{place}",
            )
        highest = max(_mean_and_error(entry.values(text))[0] for entry in group)
        lowest = min(_mean_and_error(entry.values(text))[0] for entry in group)
        if highest > WIDE * lowest:
            panel.set_yscale("log")
        panel.set(xscale="log", title=name, xlabel="CPU seconds", ylabel=f"perplexity, {text}")
    figure.legend(marks.values(), [NAMES[label] for label in marks], loc="outside right upper")
    figure.savefig(path, dpi=120)
    return path


def _damage_picture(path: Path, damages: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """Rise of the perplexity by the block that is rounded."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(damages), 3.2), layout="constrained")
    panels = figure.subplots(1, len(damages), squeeze=False)[0]
    for panel, (name, found) in zip(panels, damages.items(), strict=True):
        panel.bar(range(len(found)), [each["ppl"] for each in found])
        panel.set(title=name, xlabel="block rounded, the others not", ylabel="perplexity, rise")
    figure.savefig(path, dpi=120)
    return path
