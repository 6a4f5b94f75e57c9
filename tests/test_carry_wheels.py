"""The wheels for a machine without network: all that is missing there, and nothing else."""

import subprocess
import sys
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


def script(*arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run the script itself."""
    command = [sys.executable, *options, "scripts/carry_wheels.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


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
    carried = carry_wheels.collect(tmp_path, TARGET)
    assert set(carried) == {"diffusers", "zip-thing", "parser", "stubs"}
    assert set(tmp_path.glob("*.whl")) == set(carried.values())


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


def test_what_is_no_longer_carried_is_removed_and_wheels_from_elsewhere_stay(
    index: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index |= {"diffusers": (), "stale": ()}
    foreign = make_wheel(tmp_path, "foreign")
    want(monkeypatch, "diffusers", "stale")
    carry_wheels.collect(tmp_path, TARGET)
    other = make_wheel(tmp_path, "diffusers", tag="py3-none-linux_x86_64")
    want(monkeypatch, "diffusers")
    carried = carry_wheels.collect(tmp_path, TARGET)
    assert set(tmp_path.glob("*.whl")) == {foreign, *carried.values()}
    assert other not in carried.values()


def test_a_wheel_from_elsewhere_is_named_and_added_up_since_the_folder_travels(
    index: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index["diffusers"] = ()
    make_wheel(tmp_path, "foreign")
    want(monkeypatch, "diffusers")
    monkeypatch.setattr(sys, "argv", ["carry_wheels.py", "--out", str(tmp_path)])
    assert carry_wheels.main() == 0
    output = capsys.readouterr().out
    assert "foreign-1-py3-none-any.whl is not from here: it stays" in output
    assert "2 wheels, " in output


def test_a_file_that_is_not_named_as_a_wheel_is_refused(
    index: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index["diffusers"] = ()
    want(monkeypatch, "diffusers")
    (tmp_path / "junk.whl").touch()
    with pytest.raises(CarryError, match=r"junk\.whl is not named as a wheel; move it elsewhere"):
        carry_wheels.collect(tmp_path, TARGET)


@pytest.mark.parametrize(
    "tag",
    [
        "cp311-cp311-manylinux_2_17_x86_64",
        "cp312-cp312-macosx_11_0_arm64",
        "cp313-abi3-manylinux_2_17_x86_64",
        "py311-none-any",
    ],
)
def test_a_wheel_for_another_python_or_platform_is_fetched_anew(
    tag: str, index: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index["core"] = ("cp312-cp312-manylinux_2_17_x86_64",)
    monkeypatch.setattr(carry_wheels, "COMPILED", {"core"})
    want(monkeypatch, "core")
    wrong = make_wheel(tmp_path, "core", tag=tag)
    carried = carry_wheels.collect(tmp_path, TARGET)
    assert carried["core"].name == "core-1-cp312-cp312-manylinux_2_17_x86_64.whl"
    assert not wrong.exists()


@pytest.mark.parametrize("tag", ["cp39-abi3-manylinux2014_x86_64", "py2.py3-none-any"])
def test_a_wheel_that_is_there_is_not_fetched_again(
    tag: str, index: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index["core"] = ()
    monkeypatch.setattr(carry_wheels, "COMPILED", {"core"})
    monkeypatch.setattr(carry_wheels, "pip", lambda *_: pytest.fail("asked the index"))
    want(monkeypatch, "core")
    ready = make_wheel(tmp_path, "core", tag=tag)
    assert carry_wheels.collect(tmp_path, TARGET) == {"core": ready}


def test_a_wheel_that_was_built_for_another_python_is_not_carried(
    index: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index["core"] = ("cp312-cp312-manylinux_2_17_x86_64",)
    want(monkeypatch, "core")
    with pytest.raises(CarryError, match=r"core==1 has no wheel for Python 3\.11 .*\n.*another"):
        carry_wheels.collect(tmp_path, Target("3.11"))


@pytest.mark.parametrize("value", ["banana", "3", "312", "3.12.1", "3.x", ""])
def test_a_python_that_is_no_version_gets_one_line(value: str, tmp_path: Path) -> None:
    done = script("--python", value, "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    _, error = done.stderr.splitlines()  # below the usage
    assert error == f"carry_wheels.py: error: --python {value}: name it as in 3.12"
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_a_file_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = script("--out", str(tmp_path / "file"))
    assert done.returncode == 2
    assert done.stderr.endswith("file (File exists): name a folder\n")
    assert "Traceback" not in done.stderr


def test_the_help_names_what_is_left_out_and_why() -> None:
    done = script("--help")
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    for name, reason in carry_wheels.LEFT_OUT.items():
        assert [name, reason] in lines


def test_a_python_without_packaging_is_told_which_one_to_use() -> None:
    done = script("--help", options=("-S",))  # without site-packages
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "no module packaging; use uv run python scripts/carry_wheels.py" in line


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
