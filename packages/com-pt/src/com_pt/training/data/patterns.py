"""Names of several files in one text: brace ranges as in WebDataset, and glob patterns."""

import glob
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from effml_common.errors import InputError

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
MOST_FILES = 1_000_000  # of a range; a larger one is a slip
REMOTE = re.compile(r"(pipe:|[a-z0-9]+://)")


def is_pattern(source: str | Path | Sequence[str]) -> bool:
    """Return whether a source, or one of a list of them, stands for several files.

    Example:
        >>> is_pattern("shards/{000..331}.tar"), is_pattern("captions.csv")
        (True, False)
    """
    names = [source] if isinstance(source, str | Path) else source
    return any(re.search(r"[{*?\[]", str(name)) and not Path(name).exists() for name in names)


def expand_paths(source: str | Path | Sequence[str], setting: str) -> list[Path]:
    """Return the files that a source, or a list of sources, stands for.

    Args:
        source: Paths; ``{00000..00331}`` and ``{a,b}`` stand for several, ``*``, ``?``, ``[]`` and
            ``**``, which is any depth of folders, for what is there.
        setting: Where they are given, for the message.

    Raises:
        InputError: If a file is not there or not local, or nothing matches a pattern.
    """
    paths: list[Path] = []
    for name in [source] if isinstance(source, str | Path) else source:
        if REMOTE.match(str(name)):
            raise InputError(f"{name} is no local file; copy the files to a local disk first")
        if not is_pattern(name):
            paths.append(Path(name))
            continue

        # Braces first; a pattern within them is looked up afterwards.
        expanded = [*expand_braces(str(name))]
        matched = [
            found
            for one in expanded
            for found in (
                sorted(glob.glob(one, recursive=True)) if re.search(r"[*?\[]", one) else [one]
            )
        ]
        if not matched:
            raise InputError(f"no file matches {name}; check {setting}")
        paths += map(Path, matched)

    missing = next((path for path in paths if not path.exists()), None)
    if missing is not None:
        raise InputError(f"{missing} is not there; check {setting}")
    return paths


def expand_braces(name: str) -> Iterator[str]:
    """Yield the names that braces stand for, numbers with as many digits as the range gives.

    Raises:
        InputError: If a range is empty, or larger than a million.

    Example:
        >>> [*expand_braces("{a,b}-{08..10}.tar")]
        ['a-08.tar', 'a-09.tar', 'a-10.tar', 'b-08.tar', 'b-09.tar', 'b-10.tar']
    """
    braces = BRACES.search(name)
    if braces is None:
        yield name
        return
    bounds = RANGE.fullmatch(braces[1])
    if bounds is None:
        words = braces[1].split(",")
    else:
        first, last = int(bounds[1]), int(bounds[2])
        if not first <= last < first + MOST_FILES:
            raise InputError(
                f"{{{braces[1]}}} in {name} stands for {max(last - first + 1, 0)} files; correct it"
            )
        words = [str(number).zfill(len(bounds[1])) for number in range(first, last + 1)]
    for word in words:
        for rest in expand_braces(name[braces.end() :]):
            yield name[: braces.start()] + word + rest
