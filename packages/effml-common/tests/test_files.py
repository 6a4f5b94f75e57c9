"""A file is wholly written or left as it was."""

import os
from pathlib import Path

import pytest

from effml_common.files import atomic_write


@pytest.mark.parametrize(("data", "expected"), [("grün\n", "grün\n".encode()), (b"\x00\xff", None)])
def test_the_file_holds_exactly_what_was_given(tmp_path: Path, data, expected) -> None:
    atomic_write(tmp_path / "a", data)
    assert (tmp_path / "a").read_bytes() == (expected or data)
    assert os.listdir(tmp_path) == ["a"]


def test_a_new_file_has_the_mode_of_the_umask(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    atomic_write(tmp_path / "a", "x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_keeps_the_old_file_and_leaves_no_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    atomic_write(tmp_path / "a", "old")

    def fail(*_: object) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="no space") as caught:
        atomic_write(tmp_path / "a", "new")
    assert caught.value.filename == str(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_missing_folder_is_an_error_and_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "gone" / "a", "x")
    assert not (tmp_path / "gone").exists()
