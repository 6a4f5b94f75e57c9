"""af-dcd's distilling step and its parts on a fake device: where they are, what they cost."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from benchmarks.af_dcd.cuda import PATHS
from benchmarks.hot_paths import FakeKit, HotPath, Step, count

from af_dcd import omni_contrastive_loss
from tests.cuda.budgets import assert_within_budget, each
from tests.cuda.counter import Counter

MMSEG = {"accuracy.py:accuracy", "cross_entropy_loss.py:cross_entropy"}
CHECK = {"stopping.py:check_finite", "stopping.py:<dictcomp>"}  # the latter before Python 3.12


@pytest.mark.parametrize("path", each(PATHS, slow=["one step", "the contrast alone"]))
def test_a_path_costs_what_was_committed_and_copies_nothing(path: HotPath) -> None:
    cost = assert_within_budget("af_dcd", path)
    assert not cost["copies"]
    if "step" not in path.name:
        assert not cost["waits"]
    elif path.name.startswith(
        "one step"
    ):  # of ours one for the labels, the terms and the gradients
        waits = {line: n for line, n in cost["waits"].items() if line not in MMSEG}
        assert waits.pop("segmentors.py:_check_labels") == 1
        assert set(waits) <= {"segmentors.py:parse_losses", *CHECK}
    if "autocast" in path.name:
        assert cost["flops"]["bfloat16"] > 0.999 * sum(cost["flops"].values())


@pytest.mark.parametrize(
    "path", [path for path in PATHS if path.fake == "cpu"], ids=lambda path: path.name
)
def test_a_path_stays_on_its_device(path: HotPath) -> None:
    cost = count(replace(path, fake="gpu:0"), tiny=True)
    assert not cost["copies"]


@pytest.mark.parametrize("negatives", ["cross_group", "all"])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("impl", ["chunked", "naive"])
def test_every_form_of_the_contrast_runs_on_a_card_without_a_wait(impl, p, negatives) -> None:
    settings: dict[str, Any] = {"impl": impl, "p": p, "negatives": negatives}

    def build(kit: FakeKit, tiny: bool) -> Step:
        student, teacher = kit.randn(2, 32, 16, 16), kit.randn(2, 32, 16, 16)
        return lambda: omni_contrastive_loss(student, teacher, groups=4, pool=2, **settings)

    cost = count(HotPath("contrast", build, fake="cuda:0"))
    assert not cost["copies"]
    assert not cost["waits"]


def test_images_for_a_teacher_of_another_preprocessor_are_converted_on_the_device() -> None:

    from af_dcd.adapters.mmseg.teacher import Teacher

    class Model(torch.nn.Module):
        def __init__(self, mean: float) -> None:
            super().__init__()
            self._enable_normalize, self.channel_conversion = True, False
            self.register_buffer("mean", torch.full((3, 1, 1), mean))
            self.register_buffer("std", torch.full((3, 1, 1), 2.0))

    with Counter("cuda:0", {"teacher.py:_normalisation": 1.0}) as counter:
        teacher = Teacher.__new__(Teacher)
        teacher._same_normalisation = False
        teacher.model, student = torch.nn.Module(), torch.nn.Module()
        for model, mean in ((teacher.model, 1.0), (student, 3.0)):
            model.data_preprocessor = counter.module(lambda mean=mean: Model(mean))
        images = torch.empty(2, 3, 8, 8, device="cuda:0")
        with counter.counting() as cost:
            teacher._convert_images(images, student)
    assert not cost.waits
    assert not cost.copies
