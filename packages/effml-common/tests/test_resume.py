"""When a run may go on in a folder."""

import pytest

from effml_common.errors import CheckpointError, InputError
from effml_common.resume import check_out_folder, check_same_settings


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
