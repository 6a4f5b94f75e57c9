"""Accuracies as the rows and claims of a report."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from statistics import mean, stdev

from effml_common.report import Claim, Row
from scalekd.demo.arms import BASELINES, SCALEKD

Key = tuple[str, str, str]  # arm, kind of student, teacher
Table = Mapping[Key, Mapping[int, float]]  # -> seed -> top-1 in percent
MAIN_TEACHER = "w32"
ORDER = (*BASELINES, *SCALEKD)
# (id, better, worse): what the paper's ablation claims, arm against arm.
PART_CLAIMS = (
    ("cap", "cap", "fitnet"),
    ("dfm", "cap+dfm", "cap"),
    ("tpp", "cap+tpp", "cap"),
    ("both", "cap+dfm+tpp", "cap"),
    ("logits", "scalekd", "cap+dfm+tpp"),
)


def rows_of(table: Table) -> list[Row]:
    """Return one row per arm, student and teacher."""
    keys = sorted(table, key=lambda key: (key[1], ORDER.index(key[0]), key[2]))
    return [
        Row(arm, f"{kind}, teacher {teacher}", {"top1": values_of(table, (arm, kind, teacher))})
        for arm, kind, teacher in keys
    ]


def claims_of(table: Table) -> list[Claim]:
    """Return ScaleKD against every baseline and the best, part against part, and the controls."""
    claims: list[Claim] = []
    for kind in sorted({kind for _, kind, _ in table}):
        claims += _baseline_claims(table, kind)
        for name, better, worse in PART_CLAIMS:
            claims += _compare_arms(table, kind, f"{name}-{kind}", better, worse)
        claims += _untrained_claims(table, kind)
        claims += _size_claims(table, kind)
    return claims


def values_of(table: Table, key: Key) -> list[float]:
    """Return the accuracies of one arm, student and teacher, one for each seed."""
    return list(table[key].values())


def standard_error(values: list[float]) -> float:
    """Return the standard error of the mean; 0 for a single value."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _baseline_claims(table: Table, kind: str) -> Iterator[Claim]:
    baselines = [arm for arm in BASELINES if (arm, kind, MAIN_TEACHER) in table]
    if not baselines or ("scalekd", kind, MAIN_TEACHER) not in table:
        return
    if len(baselines) > 1:
        best = max(baselines, key=lambda arm: mean(values_of(table, (arm, kind, MAIN_TEACHER))))
        suffix = " (the best baseline)"
        yield from _compare_arms(table, kind, f"best-{kind}", "scalekd", best, suffix)
    for arm in baselines:
        yield from _compare_arms(table, kind, f"{arm}-{kind}", "scalekd", arm)


def _untrained_claims(table: Table, kind: str) -> Iterator[Claim]:
    key, alone = ("cap+dfm+tpp", kind, "untrained"), ("alone", kind, MAIN_TEACHER)
    if key in table and alone in table:
        gaps = _paired_gaps(table, key, alone)
        yield Claim(f"untrained-{kind}", f"{kind}: an untrained teacher helps", gaps)


def _size_claims(table: Table, kind: str) -> Iterator[Claim]:
    widths = [t for arm, k, t in table if arm == "scalekd" and k == kind and t.startswith("w")]
    widths.sort(key=lambda teacher: int(teacher[1:]))
    for small, large in pairwise(widths):
        gaps = _paired_gaps(table, ("scalekd", kind, large), ("scalekd", kind, small))
        text = f"{kind}: a teacher of width {large[1:]} helps more than one of {small[1:]}"
        yield Claim(f"size-{kind}-{large}", text, gaps)


def _compare_arms(
    table: Table, kind: str, name: str, better: str, worse: str, suffix: str = ""
) -> Iterator[Claim]:
    upper, lower = (better, kind, MAIN_TEACHER), (worse, kind, MAIN_TEACHER)
    if upper in table and lower in table:
        text = f"{kind}: {better} is above {worse}{suffix}"
        yield Claim(name, text, _paired_gaps(table, upper, lower))


def _paired_gaps(table: Table, upper: Key, lower: Key) -> list[float]:
    """Differences seed by seed, over the seeds that both have."""
    return [
        table[upper][seed] - table[lower][seed] for seed in table[upper] if seed in table[lower]
    ]
