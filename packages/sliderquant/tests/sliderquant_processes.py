"""Two processes as torchrun makes them, forked from one that has computed nothing yet.

usage: sliderquant_processes.py calibrate FOLDER...   (see ``calibrate_folder``)
       sliderquant_processes.py quantize WORDS...     (of the command line)
       sliderquant_processes.py serve                 (see ``serve``)
"""

import contextlib
import io
import json
import multiprocessing
import os
import socket
import sys
import time
import warnings
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


def calibrate_folders(rank: int, folders: list[str]) -> None:
    with process_group("cpu") as device:
        assert device == torch.device("cpu")
        assert distributed.get_world_size() == 2
        for folder in map(Path, folders):
            calibrate_folder(folder, f"rank-{rank}")


def quantize(rank: int, words: list[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        code = main("sliderquant", "sliderquant", COMMANDS, ["quantize", *words])
    assert code == 0, rank


def as_one_of_two(rank: int, port: int, kind: str, words: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    {"calibrate": calibrate_folders, "quantize": quantize}[kind](rank, words)


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


def run_two(kind: str, words: list[str]) -> int:
    """Return the number of processes that failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=as_one_of_two, args=(rank, port, kind, words)) for rank in range(2)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside idle threads
        for process in processes:
            process.start()
    for process in processes:
        process.join()
    return sum(process.exitcode != 0 for process in processes)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "serve":
        sys.exit(serve())
    sys.exit(run_two(sys.argv[1], sys.argv[2:]))
