"""Out folders and cache keys."""

import re
from pathlib import Path

from effml_common import folders


def test_a_given_folder_is_taken_as_it_is() -> None:
    assert folders.run_folder("x/y", "train") == Path("x/y")


def test_without_one_the_name_says_command_and_time(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    folder = folders.run_folder(None, "train-dot")
    assert re.fullmatch(r"runs/train-dot-\d{8}-\d{6}", folder.as_posix())
    assert list(tmp_path.iterdir()) == []


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
