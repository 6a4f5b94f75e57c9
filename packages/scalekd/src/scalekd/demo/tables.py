"""Accuracies as rows, claims and figures."""

from collections.abc import Mapping
from itertools import pairwise
from statistics import mean, stdev

from effml_common.report import Claim, Row
from scalekd.demo.arms import BASELINES, SCALEKD

# (arm, kind of student, teacher) -> seed -> top-1 in percent.
Table = Mapping[tuple[str, str, str], Mapping[int, float]]
MAIN = "w32"
ORDER = (*BASELINES, *SCALEKD)
# (id, better, worse): what the paper's ablation claims, arm against arm.
PARTS = (
    ("cap", "cap", "fitnet"),
    ("dfm", "cap+dfm", "cap"),
    ("tpp", "cap+tpp", "cap"),
    ("both", "cap+dfm+tpp", "cap"),
    ("logits", "scalekd", "cap+dfm+tpp"),
)


def rows_of(table: Table) -> list[Row]:
    """One row per arm, student and teacher."""
    keys = sorted(table, key=lambda key: (key[1], ORDER.index(key[0]), key[2]))
    return [
        Row(arm, f"{kind}, teacher {teacher}", {"top1": values_of(table, (arm, kind, teacher))})
        for arm, kind, teacher in keys
    ]


def claims_of(table: Table) -> list[Claim]:
    """ScaleKD against every baseline and the best, part against part, and the controls."""
    claims: list[Claim] = []
    for kind in sorted({kind for _, kind, _ in table}):
        rivals = [arm for arm in BASELINES if (arm, kind, MAIN) in table]
        if rivals and ("scalekd", kind, MAIN) in table:
            best = max(rivals, key=lambda arm: mean(values_of(table, (arm, kind, MAIN))))
            if len(rivals) > 1:
                _add(claims, table, kind, f"best-{kind}", "scalekd", best, " (the best baseline)")
            for arm in rivals:
                _add(claims, table, kind, f"{arm}-{kind}", "scalekd", arm, "")
        for name, better, worse in PARTS:
            _add(claims, table, kind, f"{name}-{kind}", better, worse, "")
        _untrained(claims, table, kind)
        _sizes(claims, table, kind)
    return claims


def _untrained(claims: list[Claim], table: Table, kind: str) -> None:
    key, alone = ("cap+dfm+tpp", kind, "untrained"), ("alone", kind, MAIN)
    if key in table and alone in table:
        gaps = _gaps(table, key, alone)
        claims.append(Claim(f"untrained-{kind}", f"{kind}: an untrained teacher helps", gaps))


def _sizes(claims: list[Claim], table: Table, kind: str) -> None:
    widths = [t for a, k, t in table if a == "scalekd" and k == kind and t.startswith("w")]
    widths.sort(key=lambda teacher: int(teacher[1:]))
    for small, large in pairwise(widths):
        gaps = _gaps(table, ("scalekd", kind, large), ("scalekd", kind, small))
        text = f"{kind}: a teacher of width {large[1:]} helps more than one of {small[1:]}"
        claims.append(Claim(f"size-{kind}-{large}", text, gaps))


def _add(
    claims: list[Claim], table: Table, kind: str, name: str, better: str, worse: str, extra: str
) -> None:
    one, two = (better, kind, MAIN), (worse, kind, MAIN)
    if one in table and two in table:
        text = f"{kind}: {better} is above {worse}{extra}"
        claims.append(Claim(name, text, _gaps(table, one, two)))


def _gaps(table: Table, one: tuple[str, str, str], two: tuple[str, str, str]) -> list[float]:
    return [table[one][seed] - table[two][seed] for seed in table[one] if seed in table[two]]


def values_of(table: Table, key: tuple[str, str, str]) -> list[float]:
    """Accuracies of one arm, student and teacher, one for each seed."""
    return list(table[key].values())


def standard_error(values: list[float]) -> float:
    """Standard error of the mean; 0 for a single value."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
