"""What tests run in processes of their own.

usage: torchrun --nproc-per-node 2 sliderquant_processes.py calibrate FOLDER...
       torchrun --nproc-per-node 2 sliderquant_processes.py round FOLDER...
       sliderquant_processes.py serve
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import distributed
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from effml_common.cli import main
from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.processes import process_group
from sliderquant.adapters.simulation import fresh_learnables
from sliderquant.cli import COMMANDS
from sliderquant.config import SliderConfig
from sliderquant.method import block_rounding
from sliderquant.method.calibration import calibrate
from sliderquant.method.moments import collect_moments
from sliderquant.method.ridge import Curvature

WINDOWS = [[0, 1], [1, 2]]
# As in ``conftest``: float32 on any processor.
torch.cpu.get_capabilities = dict  # pyright: ignore[reportAttributeAccessIssue]


def calibrate_folder(folder: Path, name: str) -> None:
    """Calibrate the model in ``folder/model`` on ``folder/tokens.pt``.

    Parameters and every learning rate are saved as ``folder/<name>``.
    """
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto").eval()
    if model.dtype is torch.float64 and model.config._experts_implementation is not None:
        model.config._experts_implementation = "eager"
    rates = []

    class Recorder(torch.optim.AdamW):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    config = SliderConfig(
        method="slider",
        wbits=3,
        group_size=8,
        epochs=4,
        nsamples=4,
        seqlen=12,
        batch_size=3,
        lr_lora=1e-3,
    )
    decoder = TransformersDecoder(model)
    learnables = [
        of_block.to(model.dtype) for of_block in fresh_learnables(decoder, config, model.dtype)
    ]
    original, torch.optim.AdamW = torch.optim.AdamW, Recorder
    try:
        tokens = torch.load(folder / "tokens.pt", weights_only=True)
        calibrate(decoder, tokens, WINDOWS, learnables, config)
    finally:
        torch.optim.AdamW = original
    state = {
        f"{block}.{key}": value
        for block, of_block in enumerate(learnables)
        for key, value in of_block.state_dict().items()
    }
    torch.save({"rates": rates, "state": state}, folder / name)


def round_folder(folder: Path, name: str) -> None:
    """Round the model in ``folder/model`` in closed form, for ``folder/tokens.pt``.

    Saved as ``folder/<name>``: moments of the first layer group, codes and scales of all weights,
    strengths, FLOPs, and how many columns of regressions this process solved.
    """
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64).eval()
    if model.config._experts_implementation is not None:  # the default takes no float64
        model.config._experts_implementation = "eager"
    tokens = torch.load(folder / "tokens.pt", weights_only=True)
    config = SliderConfig(wbits=3, group_size=16, nsamples=len(tokens), seqlen=tokens.shape[1])
    decoder = TransformersDecoder(model)
    learnables = fresh_learnables(decoder, config, torch.float32)
    moments, strengths, solved = [], [], []
    solve = Curvature.solve

    def count_columns(curvature, right):
        solved.append(right.shape[1])
        return solve(curvature, right)

    def keep_moments(*words, **more):
        result = collect_moments(*words, **more)
        moments.append({"second": result.second.clone(), "cross": result.cross.clone()})
        return result

    with (
        mock.patch.object(Curvature, "solve", count_columns),
        mock.patch.object(block_rounding, "collect_moments", keep_moments),
        FlopCounterMode(display=False) as flops,
    ):
        calibrate(
            decoder,
            tokens,
            [],
            learnables,
            config,
            on_rounded=lambda block, shares: strengths.extend(shares.values()),
        )
    rounded = [linear.closed_form for of_block in learnables for linear in of_block.linears]
    result = {
        "moments": moments[0],
        "codes": [weight.codes for weight in rounded],
        "scales": [weight.scale for weight in rounded],
        "strengths": strengths,
        "flops": flops.get_total_flops(),
        "solved": sum(solved),
    }
    torch.save(result, folder / name)


def for_folders(work: Callable[[Path, str], None], folders: list[str]) -> None:
    with process_group("cpu") as device:
        assert device == torch.device("cpu")
        assert distributed.get_world_size() == 2
        for folder in map(Path, folders):
            work(folder, f"rank-{distributed.get_rank()}")


def start(words: list[str], err: str) -> int:
    """Run a command line in a forked process; returns its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(err, "w") as stream, contextlib.redirect_stderr(stream):
            code = main("sliderquant", "sliderquant", COMMANDS, words)
    finally:
        os._exit(code)


def wait_for(child: int, path: str) -> None:
    """Wait until a path exists or the process has ended by itself."""
    ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while not os.path.exists(path) and os.waitid(os.P_PID, child, ended) is None:
        time.sleep(0.002)


def wait(child: int) -> int:
    """Return the exit code of a process."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def serve() -> None:
    """Answer each line, a function's name and its arguments in JSON, with what it returns."""
    functions = {"start": start, "wait_for": wait_for, "wait": wait}
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the commands print is no answer
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(functions[name](*arguments)), file=answers, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, *words = sys.argv[1:]
    if command == "serve":
        serve()
    else:
        for_folders({"calibrate": calibrate_folder, "round": round_folder}[command], words)
