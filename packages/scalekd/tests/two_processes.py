"""Gradients of two processes, forked from one that has imported timm but computed nothing.

usage: two_processes.py FOLDER; writes FOLDER/0.json and FOLDER/1.json.
"""

import json
import multiprocessing
import sys
import warnings
from pathlib import Path

import torch
from scalekd_tiny import STUDENTS, tiny_teacher
from torch import distributed

from scalekd import ScaleKDConfig, ScaleKDTask


def squared_gradients(rank: int = 0, processes: int = 1) -> dict[str, float]:
    """Sums of squares by parameter, after this process's part of a batch."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = ScaleKDConfig(stem_norm="ln")
    task = ScaleKDTask(STUDENTS["vit"](), tiny_teacher(), img_size=(32, 32), config=config)
    task.double().train()
    task.split.model.double()
    if processes > 1:
        task.prepare_distributed(None)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    y = torch.tensor([0, 1, 2, 3])
    task(x[rank::processes], y[rank::processes])["loss"].backward()
    return {n: float(p.grad.square().sum()) for n, p in task.inner().named_parameters()}


def as_one_of_two(rank: int, folder: Path) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2
    )
    sums = squared_gradients(rank, processes=2)
    (folder / f"{rank}.json").write_text(json.dumps(sums))
    distributed.destroy_process_group()


def main(folder: Path) -> int:
    """The number of processes that failed."""
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=as_one_of_two, args=(rank, folder)) for rank in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside idle threads
        for process in ranks:
            process.start()
    for process in ranks:
        process.join()
    return sum(process.exitcode != 0 for process in ranks)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
