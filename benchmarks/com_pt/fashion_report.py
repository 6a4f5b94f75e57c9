"""Tables, claims and the figure of the study on Fashion-MNIST, from the records of its cells."""

import json
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.com_pt.fashion import (
    BATCH,
    LATE,
    TASKS,
    UPDATES,
    WAYS,
    WEIGHT_DECAY,
    Family,
    FashionConfig,
)
from effml_common.files import atomic_write
from effml_common.report import Claim, Report, Row, environment

MAY_LOSE = 0.005  # of the accuracy alone: what the paper calls lossless
SATURATED = 0.002  # what a saturated member gains in the last fifth of its updates, at most
MEMBERS = ("T", "S", "B")
# Of the figure: colour, words of the legend, and where a mark's name stands, in points from it.
STYLES = {
    "alone": ("black", "each alone", (10, -12)),
    "chain": ("C0", "chain", (-9, 6)),
    "short": ("C1", "alone, with the chain's updates", (9, 6)),
}
MODELS = {"top-1": "of timm's ViT", "zero-shot top-1": "of open_clip's CLIP"}
Record = Mapping[str, Any]


def write_results(config: FashionConfig) -> None:
    """Write ``fashion-<family>.json`` and ``.png`` beside the folders of the cells."""
    folder = config.records
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    confirmed = [r for r in records if r["role"] == "confirm" and r["seed"] in config.seeds]
    if not confirmed:
        return print("no confirming cells yet")

    # Tables, claims and how the rates were found.
    _, metric = TASKS[config.family]
    report = Report(
        package="com-pt",
        version=version("com-pt"),
        command=sys.argv,
        seeds=sorted({r["seed"] for r in confirmed}),
        seconds=sum(r["seconds"] or 0.0 for r in records),
        rows=[*member_rows(confirmed, metric), *family_rows(confirmed)],
        claims=claims_of(confirmed),
        notes=notes_of(records, metric, config.family),
        environment=environment(("open-clip-torch", "timm", "accelerate")),
    )
    out = folder.parent.parent / f"{folder.parent.name}-{config.family}"
    document = report.to_json()
    atomic_write(out.with_suffix(".json"), json.dumps(document, indent=1) + "\n")
    draw(confirmed, metric, out.with_suffix(".png"))

    # What a reader looks for first.
    for row in document["rows"]:
        print(row["name"], {name: words(**values) for name, values in row["metrics"].items()})
    for claim in document["claims"]:
        print(claim["holds"], claim["text"], claim["value"], claim["stderr"])
    return None


def words(mean: float, stderr: float | None, **_: Any) -> str:
    """Return a mean with its standard error, which one seed does not have."""
    return f"{mean:.4g}" if stderr is None else f"{mean:.4g} +- {stderr:.2g}"


def by_seed(records: Sequence[Record], member: str, way: str) -> dict[int, Record]:
    """Return the cells of a member and a way by seed."""
    return {r["seed"]: r for r in records if (r["member"], r["way"]) == (member, way)}


def member_rows(records: Sequence[Record], metric: str) -> list[Row]:
    """Return a row for each member and way: accuracy, cost, and what the last updates gained."""
    rows = []
    for member in MEMBERS:
        for way in WAYS:
            group = [*by_seed(records, member, way).values()]
            if not group:
                continue
            metrics = {
                metric: [r["value"] for r in group],
                "gain of the last fifth": [r["value"] - r["late"] for r in group],
                "TMAC": [r["macs"] / 1e12 for r in group],
            }
            if timed := [r["seconds"] for r in group if r["seconds"] is not None]:
                metrics["seconds"] = timed
            if group[0]["source"] is not None:
                metrics["at the start"] = [r["start"] for r in group]
            setting = f"{group[0]['updates']} updates, rate {group[0]['rate']:g}"
            rows.append(Row(f"{member} {way}", setting, metrics))
    return rows


def family_rows(records: Sequence[Record]) -> list[Row]:
    """Return what the whole family costs in each way, and how much cheaper than alone."""
    rows = []
    alone = [by_seed(records, member, "alone") for member in MEMBERS]
    for way in ("alone", "chain"):
        cells = [alone[0], *(by_seed(records, member, way) for member in MEMBERS[1:])]
        seeds = [s for s in cells[0] if all(s in cell for cell in (*cells, *alone))]
        if not seeds:
            continue

        # Ratios are taken within a seed, so that both sides ran on the same machine.
        metrics: dict[str, list[float]] = {}
        for key, name in (("macs", "MACs"), ("seconds", "seconds")):
            known = [s for s in seeds if all(c[s][key] is not None for c in (*cells, *alone))]
            values = [sum(cell[s][key] for cell in cells) for s in known]
            before = [sum(cell[s][key] for cell in alone) for s in known]
            if known:
                metrics[f"{name} of the family"] = [float(value) for value in values]
                metrics[f"times cheaper in {name}"] = [
                    b / v for b, v in zip(before, values, strict=True)
                ]
        rows.append(Row(f"T, S, B {way}", "the family", metrics))
    return rows


def claims_of(records: Sequence[Record]) -> list[Claim]:
    """Return the questions of the study, as gaps over paired seeds."""
    claims = []

    def add(key: str, text: str, better: Any, worse: Any, shift: float = 0.0) -> None:
        gaps = [better[s]["value"] - worse[s]["value"] + shift for s in better if s in worse]
        if gaps:
            claims.append(Claim(key, text, gaps))

    for member in MEMBERS[1:]:
        chain, alone, short = (by_seed(records, member, w) for w in ("chain", "alone", "short"))
        text = f"{member} of the chain is within {100 * MAY_LOSE:g} points of {member} alone"
        add(f"{member}-within", text, chain, alone, MAY_LOSE)
        text = f"{member} of the chain is better than {member} with as many updates from scratch"
        add(f"{member}-short", text, chain, short)

    # Members alone must be saturated, or the comparison favours the chain. Within a training the last
    # fifth also gains what the small rates at the end of every cosine gain.
    limit = f"under {100 * SATURATED:g} points"
    for member in MEMBERS:
        alone, shorter = (by_seed(records, member, way) for way in ("alone", "four fifths"))
        late = {seed: {"value": r["late"]} for seed, r in alone.items()}
        text = f"{member} alone: the last fifth of the updates gains {limit}"
        add(f"{member}-last-fifth", text, late, alone, SATURATED)
        text = f"{member} alone is saturated: a cosine a quarter longer gains {limit}"
        add(f"{member}-saturated", text, shorter, alone, SATURATED)
    return claims


def notes_of(records: Sequence[Record], metric: str, family: Family) -> list[str]:
    """Say what all cells share, and list the trials of the rates."""
    notes = [
        f"members alone get {UPDATES[family]} updates of {BATCH} pictures, S and B of a chain 0.19 and "
        f"0.12 of them; AdamW, weight decay {WEIGHT_DECAY:g}, a cosine of its own for every training",
        f"pictures are not augmented; {metric} on the 10,000 test pictures",
        f"the gain of the last fifth is from {100 * LATE:g} % of the updates to the end; 'four fifths' "
        "is a training with as many updates and a cosine of its own",
        "seconds on a CPU are the processor time of the one thread that trains, on a machine that "
        "other jobs used too; a training that was interrupted is not timed",
    ]
    tuned: dict[str, list[str]] = {}
    for record in records:
        if record["role"] == "tune":
            trial = f"{record['rate']:g} {100 * record['value']:.2f} %"
            tuned.setdefault(record["name"], []).append(trial)
    notes += [f"rates tried for {name}: {', '.join(trials)}" for name, trials in tuned.items()]
    return notes


def draw(records: Sequence[Record], metric: str, path: Path) -> None:
    """Draw accuracy against the compute of everything that a member was grown from."""
    if find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for way, (color, label, offset) in STYLES.items():
        points = []
        for member in MEMBERS:
            # A chain begins at T alone, whose mark is drawn once.
            begins = member == "T" and way == "chain"
            group = [*by_seed(records, member, "alone" if begins else way).values()]
            if not group:
                continue
            values = [100 * r["value"] for r in group]
            mean = sum(values) / len(values)
            points.append((total_macs(records, member, way) / 1e12, mean))
            if begins:
                continue
            error = [[mean - min(values)], [max(values) - mean]]
            axes.errorbar(*points[-1], yerr=error, fmt="o", color=color, capsize=3)
            axes.annotate(
                member,
                points[-1],
                xytext=offset,
                textcoords="offset points",
                color=color,
                ha="center",
            )
        if len(points) > 1:
            macs, means = zip(*points, strict=True)
            axes.plot(macs, means, color=color, alpha=0.5, label=label)

    # Few ticks, in plain numbers.
    axes.legend(frameon=False, loc="lower right")
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50) if low < tick < high]
    axes.set_xticks(ticks, [f"{tick}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("training in trillions of multiply-accumulates, all predecessors included")
    axes.set_ylabel(f"{metric}, %")
    seeds = len({r["seed"] for r in records})
    of_seeds = "one seed" if seeds == 1 else f"mean and range of {seeds} seeds"
    axes.set_title(f"Fashion-MNIST, T, S and B {MODELS[metric]}: {of_seeds}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def total_macs(records: Sequence[Record], member: str, way: str) -> float:
    """Return the MACs of a member and of all that it was grown from, of one seed."""
    names = MEMBERS[: MEMBERS.index(member) + 1] if way == "chain" else (member,)
    parts = [by_seed(records, n, "alone" if n == "T" else way) for n in names]
    return sum(next(iter(part.values()))["macs"] for part in parts)
