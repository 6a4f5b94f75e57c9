"""One thread, the helpers beside this file, and a tiny pair of mmsegmentation configs."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

# pytest's importlib mode leaves this folder out of the path; the helpers' names are unique.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


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
