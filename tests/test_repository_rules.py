"""What every package of the workspace keeps, whatever its method."""

import ast
import importlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from workspace import COMMON, ROOT, Member, members, root_table

each_package = pytest.mark.parametrize("member", members(), ids=lambda member: member.name)
MOST_NAMES = 10


def committed_files() -> list[Path]:
    """Files that are tracked or would be: everything git does not ignore."""
    listing = ("git", "ls-files", "--cached", "--others", "--exclude-standard")
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.splitlines() if (path := ROOT / name).is_file()]


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


@each_package
def test_a_package_has_its_papers(member: Member) -> None:
    wanted = ["README.md", "LICENSE", "CITATION.cff", f"src/{member.module}/py.typed"]
    assert [name for name in wanted if not (member.path / name).is_file()] == []
    assert (member.path / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert f"\ntitle: {member.name}\n" in (member.path / "CITATION.cff").read_text()


@each_package
def test_a_package_has_at_most_ten_public_names(member: Member) -> None:
    package = importlib.import_module(member.module)
    public = []
    for name in getattr(package, "__all__", ()):  # effml_common offers modules, no names
        value = getattr(package, name)  # names are resolved lazily: each must lead somewhere
        if not (isinstance(value, type) and issubclass(value, BaseException)):
            public.append(name)
    assert len(public) <= MOST_NAMES, public


@each_package
def test_torch_load_never_unpickles(member: Member) -> None:
    loose = [
        f"{path.name}:{call.lineno}"
        for path in member.source.rglob("*.py")
        for call in calls(ast.parse(path.read_text()))
        if ast.unparse(call.func) == "torch.load"
        and not any(
            k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords
        )
    ]
    assert loose == []


def trust_without_being_asked(tree: ast.AST) -> Iterator[int]:
    """Lines that switch trust_remote_code on: what a caller asked for may only be passed along."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                passed = ast.unparse(keyword.value).endswith("trust_remote_code")
                if (
                    keyword.arg == "trust_remote_code"
                    and not passed
                    and not is_false(keyword.value)
                ):
                    yield node.lineno
        elif isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "trust_remote_code":
            value = node.value.args[0] if isinstance(node.value, ast.Call) else node.value
            if not is_false(value):
                yield node.lineno
        elif isinstance(node, ast.arguments):
            positional = [*node.posonlyargs, *node.args]
            defaults = list(zip(positional[::-1], node.defaults[::-1], strict=False))
            for argument, default in [
                *defaults,
                *zip(node.kwonlyargs, node.kw_defaults, strict=True),
            ]:
                if argument.arg == "trust_remote_code" and default and not is_false(default):
                    yield argument.lineno


def is_false(value: ast.AST | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


@each_package
def test_no_code_from_model_repositories_runs_unless_asked(member: Member) -> None:
    trusting = [
        f"{path.name}:{line}"
        for path in member.source.rglob("*.py")
        for line in trust_without_being_asked(ast.parse(path.read_text()))
    ]
    assert trusting == []


@pytest.mark.parametrize(
    ("code", "trusts"),
    [
        ("f(trust_remote_code=True)", True),
        ("f(trust_remote_code=config.trust_remote_code)", False),
        ("def f(*, trust_remote_code=True): ...", True),
        ("def f(a, trust_remote_code=False): ...", False),
        ("trust_remote_code: bool = setting(True, 'help')", True),
        ("trust_remote_code: bool = setting(False, 'help')", False),
    ],
)
def test_trust_is_found_where_it_hides(code: str, trusts: bool) -> None:
    assert bool(list(trust_without_being_asked(ast.parse(code)))) is trusts


@each_package
def test_the_workspace_knows_the_package(member: Member) -> None:
    table = root_table()
    assert member.name in [re.split(r"\W*\[", line)[0] for line in table["project"]["dependencies"]]
    assert table["tool"]["uv"]["sources"][member.name] == {"workspace": True}
    assert member.module in table["tool"]["importlinter"]["root_packages"]
    matrix = re.search(r"package: \[(.*)\]", (ROOT / ".github/workflows/ci.yml").read_text())
    assert matrix is not None
    assert member.name in matrix[1].split(", ")


def test_the_readme_has_a_row_for_each_package() -> None:
    rows = re.findall(
        r"^\| \[`([\w-]+)`\]\(packages/\1\) \|", (ROOT / "README.md").read_text(), re.M
    )
    assert sorted(rows) == sorted(member.name for member in members() if member.name != COMMON)


def test_nothing_committed_names_this_machine_or_a_download_address() -> None:
    # In pieces, or this file would be the first to fail.
    folders = "|".join(["work", "root", "home", "Users", "opt", "tmp"])
    hosts = "|".join(["pypi[.]" + "org", "python" + "hosted", "registry[.]" + "npmjs"])
    archive = r"https?://\S+[.](?:whl|tar[.]gz|zip|deb)\b"
    forbidden = re.compile(rf"(?<![\w.~$}}-])/(?:{folders})/[\w.]|{hosts}|{archive}")
    found = []
    for path in committed_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # an image or an archive
        for number, line in enumerate(text.splitlines(), 1):
            if forbidden.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert found == []
