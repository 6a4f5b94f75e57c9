"""One thread, one seed, the helpers beside this file, and a folder of captioned pictures."""

import sys
from pathlib import Path

import pytest
import torch

# pytest's importlib mode leaves this folder out of the path; the helpers' names are unique.
sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with 48 coloured pictures and captions.tsv of two captions each."""
    from PIL import Image

    lines = ["path\tone\ttwo"]
    for i in range(48):
        colour = list(COLOURS)[i % 3]
        shade = tuple(min(255, c + i // 3) for c in COLOURS[colour])
        Image.new("RGB", (18, 10), shade).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png\ta {colour} square\ta picture of a {colour} square")
    (tmp_path / "captions.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path
