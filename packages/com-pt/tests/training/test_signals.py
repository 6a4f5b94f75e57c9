"""Two processes stop together, whichever of them a signal reaches, and resume to the same bits."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from com_pt_tiny import clip_chain
from safetensors.torch import load_file

from com_pt.training.chain import parse_chain
from com_pt.training.run import run_chain
from com_pt.training.trainer import StageTrainer
from effml_common.errors import Interrupted

HERE = Path(__file__).parent
TESTS = HERE.parent
UPDATES = 24  # two stages of twelve
STEP_SECONDS = 0.1  # the signal comes somewhere within an update, or right after it

# Exit codes are written by the process itself: torchrun ends what is left by a signal of its own.
COMMAND = """
import os, sys; sys.path[:0] = [{tests!r}, {here!r}]
import conftest
from pathlib import Path
from test_signals import signal_in_update
from com_pt.cli import COMMANDS
from effml_common.cli import main
rank = os.environ["RANK"]
if {update} and rank == {victim!r}:
    signal_in_update({update}, 0.0)
words = ["train", {chain!r}, "--out", {out!r}, "--device", "cpu", "--resume", "auto"]
code = main("com-pt", "com-pt", COMMANDS, words)
Path({out!r} + ".code-" + rank).write_text(str(code))
"""
MANY = """
import sys; sys.path[:0] = [{tests!r}, {here!r}]
import conftest
from test_signals import many_moments
many_moments({chain!r}, {out!r}, 20)
"""


def signal_in_update(update: int, delay: float) -> None:
    """Let this process receive SIGTERM ``delay`` seconds after the start of an update of its run."""
    step, seen = StageTrainer._step, []

    def signalled(self, *args):
        seen.append(1)
        if len(seen) == update:
            kill = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGTERM))
            kill.daemon = True
            kill.start()
            if delay == 0:
                kill.join()
        return step(self, *args)

    StageTrainer._step = signalled


def launch(script: Path, processes: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {
        f"{member} {name}": value
        for member in ("W32", "W64")
        for name, value in load_file(next((out / member).glob("*.safetensors"))).items()
    }


def assert_same(out: Path, whole: Path) -> None:
    one, other = weights(out), weights(whole)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def write_chain(folder: Path) -> Path:
    import yaml

    chain = folder / "chain.yaml"
    chain.write_text(yaml.safe_dump(clip_chain(folder, 32, 64, save_every=5)))
    return chain


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_signal_to_the_second_process_ends_both_with_143_after_one_checkpoint(
    pictures, tmp_path
) -> None:
    chain, out, script = write_chain(pictures), tmp_path / "out", tmp_path / "child.py"
    script.write_text(
        COMMAND.format(
            tests=str(TESTS), here=str(HERE), chain=str(chain), out=str(out), update=18, victim="1"
        )
    )
    done = launch(script)
    codes = [Path(f"{out}.code-{rank}").read_text() for rank in (0, 1)]
    assert codes == ["143", "143"], done.stderr[-3000:]
    checkpoints = out / "run" / "stage-2-W64" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-5", "step-6"]


def many_moments(document: dict[str, Any], out: str, count: int) -> None:
    """Interrupt one of two processes at random moments; what each process saved is written down."""
    rank, chain, cpu = int(os.environ["RANK"]), parse_chain(document), torch.device("cpu")
    run_chain(chain, f"{out}/whole", device=cpu)
    draw, original, save = random.Random(5), StageTrainer._step, StageTrainer._save
    for trial in range(count):
        victim, update = draw.randrange(2), draw.randrange(1, UPDATES)
        delay, saved, signum = draw.uniform(0, STEP_SECONDS), [], 0

        def record(self, root, step, saved=saved):
            saved.append([self.stage.name, step])
            save(self, root, step)

        StageTrainer._step, StageTrainer._save = original, record
        if rank == victim:
            signal_in_update(update, delay)
        try:
            run_chain(chain, f"{out}/{trial}", device=cpu)
        except Interrupted as stopped:
            signum = stopped.signum
        StageTrainer._step = original
        run_chain(chain, f"{out}/{trial}", device=cpu, resume=True)
        line = json.dumps({"signum": signum, "saved": saved})
        Path(f"{out}/{trial}.rank-{rank}").write_text(line)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_of_twenty_random_moments_are_survived(pictures, tmp_path) -> None:
    script = tmp_path / "child.py"
    document = clip_chain(pictures, 32, 64, save_every=5)
    script.write_text(
        MANY.format(tests=str(TESTS), here=str(HERE), chain=document, out=str(tmp_path))
    )
    done = launch(script)
    assert done.returncode == 0, done.stderr[-3000:]
    records = [
        [json.loads((tmp_path / f"{trial}.rank-{rank}").read_text()) for rank in (0, 1)]
        for trial in range(20)
    ]
    assert [first for first, second in records if first != second] == []
    assert {first["signum"] for first, _ in records} == {signal.SIGTERM}
    for trial in range(20):
        assert_same(tmp_path / str(trial), tmp_path / "whole")


def test_a_signal_between_two_updates_is_obeyed_after_a_checkpoint(pictures, tmp_path) -> None:
    chain = parse_chain(clip_chain(pictures, 32, 64, save_every=5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageTrainer, "_step", StageTrainer._step)  # put back at the end
        signal_in_update(15, 0.0)
        with pytest.raises(Interrupted):
            run_chain(chain, tmp_path / "broken")
    assert (tmp_path / "broken/run/stage-2-W64/checkpoints/step-3").exists()
    run_chain(chain, tmp_path / "broken", resume=True)
    run_chain(chain, tmp_path / "whole")
    assert_same(tmp_path / "broken", tmp_path / "whole")
