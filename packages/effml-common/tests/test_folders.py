"""Out folders, when a run may go on in one, and cache keys."""

import re
from pathlib import Path

import pytest

from effml_common import folders
from effml_common.errors import CheckpointError, InputError
from effml_common.folders import check_out_folder, check_same_settings


def test_a_given_folder_is_taken_as_it_is() -> None:
    assert folders.run_folder("x/y", "train") == Path("x/y")


def test_without_one_the_name_says_command_and_time(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    folder = folders.run_folder(None, "train-dot")
    assert re.fullmatch(r"runs/train-dot-\d{8}-\d{6}", folder.as_posix())
    assert list(tmp_path.iterdir()) == []


def test_a_new_or_unrelated_folder_is_free(tmp_path) -> None:
    check_out_folder(tmp_path / "new", ["student.safetensors"], resume=False)
    (tmp_path / "notes.txt").touch()
    check_out_folder(tmp_path, ["student.safetensors"], resume=False)


def test_an_earlier_result_is_not_overwritten_unless_resumed(tmp_path) -> None:
    (tmp_path / "student.safetensors").touch()
    with pytest.raises(
        InputError, match=r"student\.safetensors .*; choose another --out, or add --resume"
    ):
        check_out_folder(tmp_path, ["student.safetensors"], resume=False)
    check_out_folder(tmp_path, ["student.safetensors"], resume=True)


def test_a_file_is_no_out_folder(tmp_path) -> None:
    (tmp_path / "out").touch()
    for resume in (False, True):
        with pytest.raises(InputError, match="is a file; give a folder"):
            check_out_folder(tmp_path / "out", [], resume=resume)


def test_equal_settings_pass_in_whatever_form_they_were_stored(tmp_path) -> None:
    earlier = {"rate": 0.1, "widths": [1, 2], "limit": "inf"}
    check_same_settings(
        earlier, {"rate": 0.1, "widths": (1, 2), "limit": float("inf")}, place=tmp_path
    )


@pytest.mark.parametrize(
    ("earlier", "now", "said"),
    [
        ({"rate": 0.1}, {"rate": 0.2}, "rate 0.1, not 0.2"),
        ({}, {"rate": 0.2}, "rate None, not 0.2"),
        ({"rate": 0.1, "ema": 0.9}, {"rate": 0.1}, "ema 0.9, not None"),
    ],
)
def test_another_setting_is_refused_with_both_values(tmp_path, earlier, now, said) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_same_settings(earlier, now, place=tmp_path)
    assert said in str(caught.value)
    assert "; resume with the same settings, or choose another --out" in str(caught.value)
    check_same_settings(earlier, now, place=tmp_path, free=("rate", "ema"))


def test_the_cache_is_where_the_desktop_standard_says(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folders.cache_folder("scalekd") == tmp_path / "effml" / "scalekd"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert folders.cache_folder("scalekd") == tmp_path / "me" / ".cache" / "effml" / "scalekd"


def test_a_key_changes_with_settings_and_versions_only(monkeypatch) -> None:
    key = folders.cache_key({"steps": 3, "rate": 0.1}, ["rich"])
    assert re.fullmatch(r"[0-9a-f]{16}", key)
    assert folders.cache_key({"rate": 0.1, "steps": 3}, ["rich"]) == key
    assert folders.cache_key({"rate": 0.1, "steps": 4}, ["rich"]) != key
    monkeypatch.setattr(folders, "version", lambda name: "99")
    assert folders.cache_key({"steps": 3, "rate": 0.1}, ["rich"]) != key


def test_a_file_is_no_run_folder(tmp_path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"notes\.txt is a file; give a folder for --out"):
        folders.run_folder(tmp_path / "notes.txt", "train")
