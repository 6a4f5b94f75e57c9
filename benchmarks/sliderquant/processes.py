"""CPU seconds of two processes that share one quantization, against processes that do it alone.

    uv run python -m benchmarks.sliderquant.processes

A random Llama is quantized by two processes that know nothing of each other, then by two under
``torchrun``, one thread each. There are 64 tokens for every input column of the hidden state, as with
128 samples of 2,048 tokens for a model 4,096 wide: what no process can share, the factorisation of H,
costs the more the fewer there are. Two run both times, because they share the machine's caches and slow
each other down. Counted are the CPU seconds of each within ``quantize``: loading, calibrating and
writing, not the imports. Quote the ratio, never a time.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.script import run_script
from benchmarks.sliderquant.memory import MemoryConfig, write_model
from effml_common.files import atomic_write
from effml_common.logging import say
from effml_common.parsing import require, setting

PROG = "python -m benchmarks.sliderquant.processes"
LARGEST_SHARE = 0.6  # of the CPU seconds of one process
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@dataclass(frozen=True, kw_only=True)
class ProcessesConfig:
    """CPU seconds of each of two processes that quantize together."""

    layers: int = setting(3, "decoder blocks of the model")
    hidden_size: int = setting(1024, "width, a multiple of 512")
    vocab_size: int = setting(8192, "rows of the embedding")
    nsamples: int = setting(128, "calibration samples")
    seqlen: int = setting(512, "tokens per sample")
    child: str = setting("", "used by the benchmark itself: folder to write to")
    out: str = setting("benchmarks/sliderquant/results/sliderquant-processes.json", "file to write")

    def __post_init__(self) -> None:
        for name in ("layers", "hidden_size", "nsamples", "seqlen"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}", "give 1 or more")
        require(self.hidden_size % 512 == 0, f"hidden_size is {self.hidden_size}", "give 1024")
        require(self.vocab_size >= 128, f"vocab_size is {self.vocab_size}", "give 128 or more")


def quantize_here(config: ProcessesConfig) -> None:
    """Quantize with the default method; leave this process's CPU seconds beside the result."""
    import torch

    from sliderquant import QuantizeConfig, quantize

    torch.set_num_threads(1)
    out = Path(config.child)
    source = out.with_name("model")
    begin = time.process_time()
    quantize(
        QuantizeConfig(
            model=str(source),
            calib=(str(source / "text.txt"),),
            out=str(out),
            nsamples=config.nsamples,
            seqlen=config.seqlen,
        )
    )
    seconds = time.process_time() - begin
    rank = os.environ.get("RANK", "alone")
    atomic_write(out.with_name(f"{out.name}-{rank}.json"), json.dumps(seconds))


def measure(config: ProcessesConfig) -> dict[str, Any]:
    """Quantize with two processes, each alone, then with two together."""
    with tempfile.TemporaryDirectory(prefix="sliderquant-processes-") as name:
        folder = Path(name)
        write_inputs(folder / "model", config)
        wait_for([start(config, folder / "first"), start(config, folder / "second")])
        wait_for([start(config, folder / "both", *TORCHRUN)])
        alone, shared = (
            [json.loads((folder / f"{file}.json").read_text()) for file in files]
            for files in (("first-alone", "second-alone"), ("both-0", "both-1"))
        )

    share = round(max(shared) / (sum(alone) / 2), 3)
    settings = asdict(config)
    return {
        "settings": {name: settings[name] for name in settings if name not in ("child", "out")},
        "cpu_seconds": {"alone": alone, "sharing": shared},
        "share": share,
        "holds": {f"at most {LARGEST_SHARE}": share <= LARGEST_SHARE},
    }


def write_inputs(folder: Path, config: ProcessesConfig) -> None:
    """Write a random Llama, and a text that is long enough for all samples."""
    shape = MemoryConfig(hidden_size=config.hidden_size, vocab_size=config.vocab_size)
    write_model(folder, config.layers, shape)
    letters = (chr(33 + i * i % 93) for i in range(2 * config.nsamples * config.seqlen))
    (folder / "text.txt").write_text("".join(letters))


def start(config: ProcessesConfig, out: Path, *launcher: str) -> subprocess.Popen[bytes]:
    """Start a child, or several with a launcher, that quantizes to a folder."""
    say(f"{out.name}: {' '.join(launcher) or 'one process'}")
    flags = {"child": out, "nsamples": config.nsamples, "seqlen": config.seqlen}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", PROG.split()[-1], *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait until all children have ended well; stop the others where one has not."""
    try:
        for child in children:
            if child.wait():
                raise subprocess.CalledProcessError(child.returncode, child.args)
    finally:
        for child in children:
            child.terminate()  # does nothing to a child that has ended
            child.wait()


def run(config: ProcessesConfig) -> int:
    """Measure and write; 1 if the claim does not hold. A child quantizes and leaves its seconds."""
    if config.child:
        quantize_here(config)
        return 0
    result = measure(config)
    atomic_write(Path(config.out), json.dumps(result, indent=1) + "\n")
    say(json.dumps({"share": result["share"], **result["holds"]}))
    return 0 if all(result["holds"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(run_script(ProcessesConfig, PROG, run))
