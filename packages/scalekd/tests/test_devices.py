"""--device of every command that computes, and loading processes beside a card, without a card."""

import random
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from scalekd_runs import WORDS, make_photos, scalekd
from scalekd_tiny import CLASSES, STUDENTS, tiny_teacher
from torch import nn

from effml_common.checkpoint import rng_state, set_rng_state
from scalekd import ScaleKDTask
from scalekd.demo.arms import BASELINES, SCALEKD, make_task
from scalekd.demo.models import build_demo_student, build_demo_teacher
from scalekd.training.data import CheckedImages, repeatable

META = torch.device("meta")


def commands(folder) -> dict[str, list[object]]:
    photos = ["--data-dir", folder / "photos"]
    return {
        "train": [*photos, *WORDS, "--out", folder / "run"],
        "cache": [*photos, *WORDS, "--views", "1", "--out", folder / "cache"],
        "eval": [folder / "run", *photos],
        "demo": ["--out", folder / "demo"],
    }


@pytest.mark.parametrize("command", ["train", "cache", "eval", "demo"])
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "device cuda is not there (torch finds no cuda device); use cpu"),
        ("tpu", "device 'tpu' is unknown; use auto"),
    ],
)
def test_every_command_refuses_a_device_that_is_not_there(
    command, device, message, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    make_photos(tmp_path / "photos", per_class=4)
    assert scalekd(command, *commands(tmp_path)[command], "--device", device) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert not any((tmp_path / name).exists() for name in ("run", "cache", "demo"))


@pytest.mark.parametrize("command", ["train", "cache"])
def test_the_device_is_named(command, tmp_path, capsys) -> None:
    make_photos(tmp_path / "photos", per_class=4)
    words = [word for word in commands(tmp_path)[command] if word != "--quiet"]
    assert scalekd(command, *words, "--device", "cpu") == 0
    assert "device: cpu\n" in capsys.readouterr().err


def test_one_mps_device_is_not_split_between_processes(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["train", *commands(tmp_path)["train"], "--device", "mps"]
    assert scalekd(*words) == 2
    assert "device mps trains in one process, not 2; start without torchrun" in (
        capsys.readouterr().err
    )


class Noisy:
    """Images whose augmentation is one random number."""

    def __init__(self) -> None:
        self.transform = lambda image: torch.rand(()) + 0.0 * image.width

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int):
        image = Image.new("RGB", (8, 8))
        return (image if self.transform is None else self.transform(image)), 0


# Python 3.12 warns of every fork beside threads.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_repeatable_crops_load_in_processes_that_may_not_touch_cuda(monkeypatch) -> None:
    # A process forked from one that uses a card: torch sees the card, and refuses to touch it.
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    images = CheckedImages(Noisy(), 1, skip_bad=False, views=2, seed=3)
    alone = [float(image) for image, *_ in (images[i] for i in range(len(images)))]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    for name in ("_lazy_init", "get_rng_state_all", "set_rng_state", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    loader = torch.utils.data.DataLoader(
        images,  # pyright: ignore[reportArgumentType]
        batch_size=3,
        num_workers=2,
        multiprocessing_context="fork",
    )
    loaded = torch.cat([batch for batch, *_ in loader])
    assert loaded.tolist() == alone


def test_repeatable_numbers_leave_the_generators_outside_as_they_were(monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a card was touched")

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(1))  # noqa: NPY002

    state = rng_state()
    outside = draw()
    set_rng_state(state)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for name in ("get_rng_state_all", "set_rng_state", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    with repeatable(3, 1):
        inside = draw()
    assert draw() == outside
    with repeatable(3, 1):
        assert draw() == inside


def test_tensors_of_the_loss_follow_the_device() -> None:
    task = ScaleKDTask(
        STUDENTS["resnet"](),
        tiny_teacher(),
        criterion=nn.CrossEntropyLoss(weight=torch.ones(CLASSES)),
        img_size=(32, 32),
        device=META,
    )
    result = task(torch.zeros(4, 3, 32, 32, device=META), torch.zeros(4, device=META).long())
    assert {value.device for value in result.values()} == {META}


@pytest.mark.parametrize("arm", [*BASELINES, *SCALEKD])
def test_every_arm_of_the_demo_is_on_the_device_of_its_teacher(arm: str, monkeypatch) -> None:
    # timm compares pixel normalisations, which have no values here.
    monkeypatch.setattr(torch, "equal", lambda *_: True)
    teacher = build_demo_teacher(16, 12).to(META).eval()
    task = make_task(arm, build_demo_student("cnn", 12, 0), teacher).train()
    places = {value.device for value in chain(task.parameters(), task.buffers())}
    assert places == {META}
    labels = torch.zeros(4, 12, device=META) if arm == "mixup" else torch.zeros(4, device=META)
    images = torch.zeros(4, 3, 16, 16, device=META)
    result = task(images, labels if arm == "mixup" else labels.long())
    assert result["loss"].device == META
