"""One thread, the helpers beside this file, and a tiny pair of mmsegmentation configs."""

import ast
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

# pytest's importlib mode leaves this folder out of the path; the helpers' names are unique.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def plain_config_text() -> Iterator[None]:
    """Leave mmengine's config text as it is, if it parses.

    A run lays it out with yapf three times, which takes seconds; ``trained`` of test_train.py does, too.
    """
    if importlib.util.find_spec("mmengine") is None:
        yield
        return

    def parsed(text: str, **_style: object) -> tuple[str, bool]:
        ast.parse(text)
        return text, False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmengine.config.config.FormatCode", parsed)
        yield


@dataclass
class Pair:
    """A student's and a teacher's config, the teacher's weights, and the data they read."""

    student: Path
    teacher: Path
    weights: Path
    data: Path

    def words(self) -> list[str]:
        return [
            "--student", str(self.student), "--teacher", str(self.teacher),
            "--teacher-checkpoint", str(self.weights),
        ]  # fmt: skip


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> Pair:
    pytest.importorskip("mmseg")
    from dcd_tiny import fcn, save_weights, write_config, write_images

    folder = tmp_path_factory.mktemp("pair")
    data = write_images(folder / "data")
    student = write_config(folder / "student.py", data, fcn(2))
    teacher = write_config(folder / "teacher.py", data, fcn(4))
    weights = save_weights(
        teacher, folder / "teacher.pth", dataset_meta={"classes": ("a", "b", "c")}
    )
    return Pair(student, teacher, weights, data)
