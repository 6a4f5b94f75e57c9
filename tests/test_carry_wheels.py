"""The wheels for a machine without network: all that is missing there, and nothing else."""

from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

import carry_wheels
from carry_wheels import CarryError, Target
from workspace import ROOT

TARGET = Target("3.12")


def make_wheel(folder: Path, name: str, *needs: str, tag: str = "py3-none-any") -> Path:
    """A wheel of version 1 that holds nothing but what it requires."""
    path = folder / f"{name.replace('-', '_')}-1-{tag}.whl"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1"]
    lines += [f"Requires-Dist: {need}" for need in needs]
    with ZipFile(path, "w") as archive:
        archive.writestr(f"{name}-1.dist-info/METADATA", "\n".join(lines))
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, ...]]:
    """An index that holds version 1 of each name in it; the machine has torch 2.11 and numpy."""
    held: dict[str, tuple[str, ...]] = {}
    monkeypatch.setattr(carry_wheels, "there", lambda: {"torch": "2.11.0", "numpy": ""})
    monkeypatch.setattr(carry_wheels, "pinned", lambda target: dict.fromkeys(held, "1"))

    def pip(*arguments: object) -> str | None:
        name = str(arguments[-1]).partition("==")[0]
        tag = held[name][0] if held[name] else ""
        if tag == "sources" and arguments[0] == "download":
            return "no matching distribution"
        compiled = tag.startswith("cp312")
        needs = held[name][1:] if compiled or tag == "sources" else held[name]
        make_wheel(tmp_path, name, *needs, tag=tag if compiled else "py3-none-any")
        return None

    monkeypatch.setattr(carry_wheels, "pip", pip)
    return held


def want(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(carry_wheels, "wanted", lambda: [Requirement(line) for line in lines])


def test_what_is_missing_there_comes_with_all_that_it_requires(
    index: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index |= {
        "diffusers": ("torch>=2", "Zip_Thing", "dev-tool; extra == 'dev'"),
        "zip-thing": ("old-python-only; python_version < '3.12'", "opencv-python"),
        "parser": ("stubs; extra == 'signatures'", "numpy"),
        "stubs": (),
    }
    want(monkeypatch, "torch", "diffusers", "parser[signatures]", "elsewhere; os_name == 'nt'")
    make_wheel(tmp_path, "stale")
    carried = carry_wheels.collect(tmp_path, TARGET)
    assert set(carried) == {"diffusers", "zip-thing", "parser", "stubs"}
    assert set(tmp_path.glob("*.whl")) == set(carried.values())  # the stale one is gone


def test_pure_sources_are_built_into_a_wheel(
    index: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index["lite"] = ("sources",)
    want(monkeypatch, "lite")
    assert carry_wheels.collect(tmp_path, TARGET)["lite"].name == "lite-1-py3-none-any.whl"


def test_a_compiled_wheel_is_carried_only_if_named(
    index: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index["core"] = ("cp312-cp312-manylinux_2_17_x86_64",)
    want(monkeypatch, "core")
    with pytest.raises(CarryError, match="is compiled; leave core out"):
        carry_wheels.collect(tmp_path, TARGET)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(carry_wheels, "COMPILED", {"core"})
    assert set(carry_wheels.collect(tmp_path, TARGET)) == {"core"}


def test_a_package_without_a_pin_is_refused(
    index: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want(monkeypatch, "new-thing")
    with pytest.raises(CarryError, match=r"new-thing, which the workspace requires, has no pin"):
        carry_wheels.collect(tmp_path, TARGET)


def test_versions_there_that_are_too_old_are_named(
    index: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index["newer"] = ("torch>=2.12", "numpy>=9")  # numpy's version there is not known
    want(monkeypatch, "newer", "torch>=2.11")
    carried = carry_wheels.collect(tmp_path, TARGET)
    found = list(carry_wheels.conflicts(carried, TARGET))
    assert found == ["newer requires torch>=2.12; 2.11.0 is there"]


def test_all_that_travels_is_added_up_and_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = make_wheel(tmp_path, "thing")
    sizes = carry_wheels.travelling([wheel])
    assert sizes[str(ROOT / "pyproject.toml")] == (ROOT / "pyproject.toml").stat().st_size
    assert sizes[str(wheel)] == wheel.stat().st_size
    assert not [name for name in sizes if "/.venv/" in name or "/.carry/" in name]
    assert carry_wheels.check_size([wheel]).startswith("1 wheels, 0.0 MiB; all that travels:")

    monkeypatch.setattr(carry_wheels, "MOST_TRAVELLING", 2**20)
    with pytest.raises(CarryError, match=r"what travels is \d+\.\d MiB, 1 at most") as refused:
        carry_wheels.check_size([wheel])
    assert len(str(refused.value).splitlines()) == 11  # and the ten largest


def test_each_requirement_of_the_workspace_is_there_pinned_or_left_out() -> None:
    known = {*carry_wheels.there(), *carry_wheels.pinned(TARGET), *carry_wheels.LEFT_OUT}
    names = {each.name.lower() for each in carry_wheels.wanted()}
    assert {"diffusers", "jsonargparse", "beartype", "mmengine"} <= names
    assert names - known == set()
