"""The study on Fashion-MNIST trains what it compares, in a possible order, and tunes on other data."""

import json
from dataclasses import asdict

import pytest
import torch
from benchmarks.com_pt import fashion, fashion_data
from benchmarks.com_pt.fashion import (
    RATES,
    TUNING_SEED,
    UPDATES,
    FashionCell,
    FashionConfig,
    cells,
)
from benchmarks.com_pt.fashion_data import DEVELOPMENT_IMAGES, FashionImages


def measure_all(config: FashionConfig, accuracy) -> list[FashionCell]:
    """Walk through the cells as the study does, with made-up accuracies in place of trainings."""
    walked = []
    folder = config.records
    folder.mkdir(parents=True)
    for cell in cells(config):
        record = {**asdict(cell), "value": accuracy(cell), "seconds": 1.0}
        (folder / f"{cell.file}.json").write_text(json.dumps(record))
        walked.append(cell)
    return walked


def test_every_cell_comes_after_its_predecessor_of_the_same_role_and_seed(tmp_path) -> None:
    walked = measure_all(FashionConfig(results=str(tmp_path)), lambda cell: -abs(cell.rate - 2e-3))
    seen: dict[str, FashionCell] = {}
    for cell in walked:
        if cell.source is not None:
            before = seen[cell.source]
            assert (before.role, before.seed) == (cell.role, cell.seed)
            assert (before.member, cell.member) in {("T", "S"), ("S", "B")}
        seen[cell.file] = cell
    confirmed = [cell for cell in walked if cell.role == "confirm"]
    assert {cell.seed for cell in confirmed} == {1, 2, 3}
    assert TUNING_SEED not in {cell.seed for cell in confirmed}
    assert len(seen) == len(walked)


def test_a_chain_gets_the_paper_s_share_of_the_updates_and_short_runs_get_as_many(tmp_path) -> None:
    walked = measure_all(FashionConfig(results=str(tmp_path)), lambda cell: -abs(cell.rate - 2e-3))
    updates = {cell.name: cell.updates for cell in walked if cell.role == "confirm"}
    assert updates["S chain"] == updates["S short"] == round(0.19 * UPDATES["vit"])
    assert updates["B chain"] == updates["B short"] == round(0.12 * UPDATES["vit"])
    assert {updates[f"{member} alone"] for member in "TSB"} == {UPDATES["vit"]}
    assert {updates[f"{member} four fifths"] for member in "TSB"} == {round(0.8 * UPDATES["vit"])}
    rates = {cell.name: cell.rate for cell in walked if cell.role == "confirm"}
    assert rates["T four fifths"] == rates["T alone"]


@pytest.mark.parametrize(
    ("best", "tried"), [(2e-3, {*RATES}), (16e-3, {*RATES, 8e-3, 16e-3, 32e-3})]
)
def test_rates_are_tried_until_the_best_is_not_the_last(tmp_path, best, tried) -> None:
    walked = measure_all(FashionConfig(results=str(tmp_path)), lambda cell: -abs(cell.rate - best))
    for name in ("T alone", "S chain", "B short"):
        assert {c.rate for c in walked if c.name == name and c.role == "tune"} == tried
        assert {c.rate for c in walked if c.name == name and c.role == "confirm"} == {best}


def test_tuning_never_sees_the_test_pictures(monkeypatch) -> None:
    pictures = torch.zeros(DEVELOPMENT_IMAGES + 7, 28, 28, dtype=torch.uint8)
    opened = []

    def read(folder: str, part: str) -> torch.Tensor:
        opened.append(part)
        return pictures if len(opened) % 2 else torch.arange(len(pictures))

    monkeypatch.setattr(fashion_data, "read_images", read)
    monkeypatch.setattr(fashion_data, "read_labels", read)
    images = FashionImages("", "tune")
    assert {*opened} == {"train"}
    assert len(images) == 7
    assert not {*images.labels.tolist()} & {*images.held_out_labels.tolist()}


@pytest.mark.parametrize(
    ("missing", "best"), [("confirm-B-chain-*", 2e-3), ("tune-B-chain-*-0.008-*", 8e-3)]
)
def test_a_predecessor_whose_model_is_gone_is_trained_once_more(
    missing, best, tmp_path, monkeypatch
) -> None:
    config = FashionConfig(
        results=str(tmp_path / "results"), cells=str(tmp_path / "cells"), seeds=(1,)
    )
    measure_all(config, lambda cell: -abs(cell.rate - best))
    gone = next(config.records.glob(missing))
    gone.unlink()
    trained = []

    def train(config, cell, setup, device) -> dict:
        trained.append(cell.name)
        return {"value": 0.5}

    monkeypatch.setattr(fashion, "train", train)
    monkeypatch.setattr(fashion, "make_setup", lambda config, role: role)
    fashion.run(config, torch.device("cpu"))
    assert trained[:3] == ["T alone", "S chain", "B chain"]
