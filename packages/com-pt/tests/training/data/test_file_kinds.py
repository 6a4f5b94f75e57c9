"""Files of captions that are of another kind or encoding than their names say."""

import gzip
import tarfile
from pathlib import Path
from typing import Any

import pytest
from com_pt_tiny import clip_data

from com_pt.training.data.captions import CaptionData
from effml_common.errors import InputError


def pairs_of(folder: Path, **more: Any) -> CaptionData:
    return CaptionData.open(clip_data(folder, **more), "train", captions=None)


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_a_compressed_tar_is_told_from_a_damaged_one(tmp_path, mode) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, f"w:{mode}") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(InputError, match=r"x\.tar is no plain tar but compressed with .*; unpack"):
        pairs_of(tmp_path, train=str(path))


NO_TEXT = [
    (b"PAR1\x15\x04\xff", "a Parquet file; give its folder if it is a data set, or save it as CSV"),
    (b"PK\x03\x04\xff", r"a zip archive or a spreadsheet \(xlsx\); save it as text in UTF-8"),
    (b"\xd0\xcf\x11\xe0", r"a spreadsheet of the old kind \(xls\); save it as text in UTF-8"),
    (gzip.compress(b"path,one", mtime=0), "compressed with gzip; unpack it"),
    (b"a.png".ljust(257, b"\0") + b"ustar", r"a tar; name it \.tar if it is a shard, or unpack it"),
    (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS and not the file itse"),
]


@pytest.mark.parametrize(("content", "message"), NO_TEXT)
def test_what_is_no_table_is_called_what_it_is(tmp_path, content, message) -> None:
    (tmp_path / "c.csv").write_bytes(content)
    with pytest.raises(InputError, match=rf"c\.csv is no text but {message}"):
        pairs_of(tmp_path, train=str(tmp_path / "c.csv"))


@pytest.mark.parametrize(
    ("encoding", "name"),
    [("utf-32", "UTF-32"), ("utf-32-be", "UTF-32"), ("utf-16", "UTF-16"), ("utf-16-be", "UTF-16")],
)
def test_wide_encodings_are_told_apart(tmp_path, encoding, name) -> None:
    (tmp_path / "c.csv").write_bytes(f"\ufeff{'path,one'}\n".encode(encoding))
    with pytest.raises(
        InputError, match=rf"row 1: the text is {name}, not UTF-8; save .* -f {name} -t UTF-8"
    ):
        pairs_of(tmp_path, train=str(tmp_path / "c.csv"))


def test_utf_16_without_a_mark_is_found_out(tmp_path) -> None:
    (tmp_path / "c.csv").write_bytes("path,one\n0.png,red\n".encode("utf-16-le"))
    with pytest.raises(InputError, match=r"c\.csv, row 1: the text has zero bytes, as UTF-16 has"):
        pairs_of(tmp_path, train=str(tmp_path / "c.csv"))


@pytest.mark.parametrize("separator", [",", "\t"])
def test_rows_that_end_with_a_lone_carriage_return_are_refused(pictures, separator) -> None:
    (pictures / "c.csv").write_bytes(f"path{separator}one\r0.png{separator}red\r".encode())
    with pytest.raises(InputError, match=r"c\.csv: rows end with a lone carriage return, .*: tr "):
        pairs_of(pictures, train=str(pictures / "c.csv"))


def test_a_table_of_a_spreadsheet_in_windows_1252_is_refused_with_its_row(pictures) -> None:
    rows = ["path,one", "0.png,red", "1.png,a café", "2.png,blue"]
    (pictures / "c.csv").write_bytes("\r\n".join(rows).encode("cp1252"))
    message = (
        r"c\.csv, row 3: the text is not UTF-8 \(byte 0xE9\); save it as UTF-8, or convert it: "
        r"iconv -f WINDOWS-1252 -t UTF-8 c\.csv"
    )
    with pytest.raises(InputError, match=message):
        pairs_of(pictures, train=str(pictures / "c.csv"))
    (pictures / "c.csv").write_bytes("\r\n".join(rows).encode("utf-16"))
    with pytest.raises(InputError, match="row 1: the text is UTF-16, not UTF-8"):
        pairs_of(pictures, train=str(pictures / "c.csv"))


def test_a_byte_order_mark_is_harmless(pictures) -> None:
    rows = "path,one\r\n0.png,a café\r\n1.png,blue\r\n"
    (pictures / "c.csv").write_bytes(rows.encode("utf-8-sig"))
    assert [*pairs_of(pictures, train=str(pictures / "c.csv")).texts] == [["a café"], ["blue"]]
