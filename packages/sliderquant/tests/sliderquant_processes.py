"""What tests run in processes of their own.

usage: torchrun --nproc-per-node 2 sliderquant_processes.py calibrate FOLDER...
       sliderquant_processes.py serve
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import distributed
from transformers import AutoModelForCausalLM

from effml_common.cli import main
from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.processes import process_group
from sliderquant.adapters.simulation import fresh_learnables
from sliderquant.cli import COMMANDS
from sliderquant.config import SliderConfig
from sliderquant.method.calibration import calibrate

WINDOWS = [[0, 1], [1, 2]]


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


def calibrate_folders(folders: list[str]) -> None:
    with process_group("cpu") as device:
        assert device == torch.device("cpu")
        assert distributed.get_world_size() == 2
        for folder in map(Path, folders):
            calibrate_folder(folder, f"rank-{distributed.get_rank()}")


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
    serve() if sys.argv[1] == "serve" else calibrate_folders(sys.argv[2:])
