"""How easy the shipped code is to read, in numbers: ``python scripts/style.py [PACKAGE]``.

A function is long when its body has more than 15 lines, docstring aside. Long functions are read by
their phases, so each of them should hold at least one blank line.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from workspace import Member, members

LONG_FUNCTION = 15  # lines of a body, from which phases must be set apart
MOST_LINES_OF_A_FUNCTION = 50
MOST_LINES_OF_A_MODULE = 400
MOST_ARGUMENTS = 8
MOST_WITHOUT_AIR = 0.15  # of a package's long functions


@dataclass(frozen=True)
class Function:
    """One function or method: where it stands, and what is counted of it."""

    place: str
    lines: int
    arguments: int
    has_air: bool


def functions_of(member: Member) -> Iterator[Function]:
    """Every function that a package ships."""
    for path in sorted(member.source.rglob("*.py")):
        lines = path.read_text().splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                place = f"{path.relative_to(member.path)}:{node.lineno} {node.name}"
                yield _measured(node, place, lines)


def _measured(
    node: ast.FunctionDef | ast.AsyncFunctionDef, place: str, lines: list[str]
) -> Function:
    # The docstring is prose, not code.
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if not body:
        return Function(place, 0, _arguments(node), has_air=True)

    # A string of several lines may hold blank lines that are no pause in the code.
    first, last = body[0].lineno, node.end_lineno or body[0].lineno
    inside_strings = {
        line
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
        for line in range(part.lineno + 1, (part.end_lineno or part.lineno) + 1)
    }
    blank = [n for n in range(first, last) if not lines[n - 1].strip() and n not in inside_strings]
    return Function(place, last - first + 1, _arguments(node), has_air=bool(blank))


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Arguments that may be given by position, ``self`` aside.

    A Triton kernel takes pointers, sizes and strides one by one: it cannot group them.
    """
    if any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list):
        return 0
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
    return len([name for name in names if name not in ("self", "cls")])


def without_air(functions: list[Function]) -> list[Function]:
    """Long functions without a blank line."""
    return [f for f in functions if f.lines > LONG_FUNCTION and not f.has_air]


def main(names: list[str]) -> int:
    """Print the figures of each package, or with a name also the places that break a limit."""
    print(f"{'package':<16}{'functions':>10}{'long':>6}{'dense':>7}{'share':>7}{'longest':>9}")
    for member in members():
        if names and member.name not in names:
            continue

        # One line of figures.
        functions = list(functions_of(member))
        long = [f for f in functions if f.lines > LONG_FUNCTION]
        dense = without_air(functions)
        share = f"{100 * len(dense) / max(1, len(long)):.0f} %"
        longest = max(f.lines for f in functions)
        print(
            f"{member.name:<16}{len(functions):>10}{len(long):>6}{len(dense):>7}{share:>7}{longest:>9}"
        )

        # What to mend.
        for function in functions if names else ():
            if function in dense:
                print(f"  no blank line: {function.place} ({function.lines} lines)")
            if function.lines > MOST_LINES_OF_A_FUNCTION:
                print(f"  too long: {function.place} ({function.lines} lines)")
            if function.arguments > MOST_ARGUMENTS:
                print(f"  too many arguments: {function.place} ({function.arguments})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
