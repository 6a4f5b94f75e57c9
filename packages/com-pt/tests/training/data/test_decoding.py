"""Pictures of every kind, and what Pillow alone would make of them."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from com_pt.training.data.decoding import decode_picture, decoding, read_names
from effml_common.errors import InputError

RED = (200, 30, 40)


def encoded(picture: Image.Image, kind: str, **more: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **more)
    return file.getvalue()


def pixels_of(content: bytes) -> np.ndarray:
    picture = decode_picture(content, "x")
    assert picture.mode == "RGB"
    return np.asarray(picture)


def test_pictures_of_other_colour_models_become_rgb() -> None:
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    assert pixels_of(encoded(cmyk, "JPEG"))[0, 0].tolist() == pytest.approx([255, 0, 0], abs=3)
    grey = Image.new("L", (4, 4), 77)
    assert pixels_of(encoded(grey, "PNG"))[1, 2].tolist() == [77, 77, 77]
    bilevel = Image.new("1", (4, 4), 1)
    assert pixels_of(encoded(bilevel, "PNG"))[1, 2].tolist() == [255, 255, 255]


def test_sixteen_bits_keep_their_upper_eight() -> None:
    values = np.array([[0, 255, 256, 30000, 65535]], dtype=np.uint16)
    content = encoded(Image.fromarray(values), "PNG")
    assert pixels_of(content)[0, :, 1].tolist() == (values[0] >> 8).tolist()


def test_transparent_palettes_are_read_without_a_warning() -> None:
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, *RED])
    content = encoded(picture, "PNG", transparency=b"\x00\x80")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels_of(content)[0, 0].tolist() == [*RED]


def test_an_animated_picture_is_its_first_frame_and_none_is_rotated() -> None:
    frames = [Image.new("RGB", (4, 2), RED), Image.new("RGB", (4, 2), (0, 0, 255))]
    content = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert pixels_of(content)[0, 0].tolist() == [*RED]
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees for display; open_clip reads such files as they lie
    assert pixels_of(encoded(frames[0], "JPEG", exif=exif)).shape == (2, 4, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x: no picture of a known kind"),
        (b"<html>not found</html>", "x: no picture of a known kind"),
        (encoded(Image.new("RGB", (64, 64), RED), "PNG")[:90], "x: .*; replace the picture"),
        (encoded(Image.new("RGB", (64, 64), RED), "JPEG")[:400], "x: .*; replace the picture"),
    ],
)
def test_a_damaged_picture_is_one_line(content, message) -> None:
    with pytest.raises(InputError, match=message):
        decode_picture(content, "x")


def test_a_picture_larger_than_the_bound_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match=r"x: Image size \(900 pixels\) exceeds limit.*; replace"):
        decode_picture(encoded(Image.new("RGB", (30, 30)), "PNG"), "x")


def test_memory_that_runs_out_and_interruptions_are_no_faults_of_the_data() -> None:
    for kind in (MemoryError, KeyboardInterrupt):
        with pytest.raises(kind), decoding("x", "do something"):
            raise kind


def test_names_come_from_lists_lines_and_json(tmp_path) -> None:
    (tmp_path / "n.txt").write_text("\ufeffcat\r\n\ndog \n", encoding="utf-8")
    (tmp_path / "n.json").write_text('["cat", "dog"]')
    (tmp_path / "mac.txt").write_bytes(b"cat\rdog\r\r")
    for names in (["cat", "dog"], *(tmp_path / name for name in ("n.txt", "mac.txt", "n.json"))):
        assert read_names(names) == ["cat", "dog"]
    (tmp_path / "n.json").write_text('{"0": "cat"}')
    with pytest.raises(InputError, match=r"n\.json: no list of names; give a JSON list"):
        read_names(str(tmp_path / "n.json"))
    (tmp_path / "n.pt").write_bytes(b"\x80\x04\x95\xff")
    with pytest.raises(InputError, match=r"n\.pt is no text but a pickle; save it as text in UTF"):
        read_names(tmp_path / "n.pt")
    with pytest.raises(InputError, match=r"gone\.txt: No such file or directory; check the file"):
        read_names(str(tmp_path / "gone.txt"))
