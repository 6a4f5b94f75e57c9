"""No update is made with bad numbers; signals stop a loop after its step."""

import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from effml_common.errors import Interrupted, NonFiniteError
from effml_common.stopping import StepMonitor, StopSignal, check_finite

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_a_bad_loss_is_named_with_its_step_term_and_last_good_checkpoint(bad, kind) -> None:
    with pytest.raises(NonFiniteError) as caught:
        check_finite(kind(bad), 1.0, step=7, term="kd", last_good=Path("run/step-5"))
    message = str(caught.value)
    assert "kd" in message
    assert "step 7" in message
    assert "run/step-5" in message
    assert str(bad) in message
    assert "gradient" not in message
    assert "; " in message


def test_a_bad_gradient_norm_is_named() -> None:
    with pytest.raises(NonFiniteError, match="gradient norm is nan at step 0"):
        check_finite(torch.tensor(1.0, requires_grad=True), torch.tensor(math.nan), step=0, term="")


def test_finite_numbers_pass() -> None:
    check_finite(torch.tensor(-3.4e38), 0, step=1, term="loss")
    check_finite(1, step=1, term="loss")


RANK_PROGRAM = """
import sys, torch
from torch import distributed
from effml_common.errors import NonFiniteError
from effml_common.stopping import check_finite
rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
check_finite(1.0, 2.0, step=1, term="ce")
try:
    check_finite(float("nan") if rank == 1 else 1.0, step=2, term="ce")
except NonFiniteError as error:
    print(error)
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_all_ranks_stop_together_when_one_sees_a_bad_number(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_PROGRAM, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    assert "on another rank" in said[0]
    assert "step 2" in said[0]
    assert "ce is nan at step 2" in said[1]


@pytest.mark.parametrize("signum", SIGNALS)
def test_the_first_signal_lets_the_step_finish(signum: int, capfd) -> None:
    steps = []

    def loop() -> None:
        with StopSignal() as stop:
            for step in range(5):
                if step == 2:
                    os.kill(os.getpid(), signum)
                steps.append((step, stop.requested))
                stop.check()

    with pytest.raises(Interrupted) as caught:
        loop()
    assert steps == [(0, False), (1, False), (2, True)]
    assert caught.value.signum == signum
    assert "--resume auto" in str(caught.value)
    assert capfd.readouterr().err.count("stopping after this step") == 1


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_second_signal_of_the_same_kind_stops_at_once(signum: int) -> None:
    with StopSignal():
        os.kill(os.getpid(), signum)
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signum)


def test_the_previous_handlers_are_back_afterwards() -> None:
    before = [signal.getsignal(signum) for signum in SIGNALS]
    with StopSignal():
        assert [signal.getsignal(signum) for signum in SIGNALS] != before
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


def test_outside_the_main_thread_it_does_nothing() -> None:
    before, seen = [signal.getsignal(signum) for signum in SIGNALS], []

    def work() -> None:
        with StopSignal() as stop:
            stop.check()
            seen.append(not stop.requested)
            seen.append([signal.getsignal(signum) for signum in SIGNALS] == before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True, True]


def test_no_ordinary_except_clause_swallows_an_interruption() -> None:
    assert not issubclass(Interrupted, Exception)
    assert issubclass(Interrupted, KeyboardInterrupt)


def test_a_monitor_keeps_the_first_bad_step_however_late_it_is_read(tmp_path: Path) -> None:
    monitor = StepMonitor(torch.device("cpu"), last_good=tmp_path)
    verdicts = []
    for step, (ce, kd) in enumerate([(1.0, 2.0), (1.0, math.inf), (math.nan, 1.0), (1.0, 1.0)], 1):
        values = {"loss term ce": torch.tensor(ce), "loss term kd": torch.tensor(kd)}
        verdicts.append(float(monitor.judge(step, values)))
        if step == 1:
            assert monitor.read().values == {"loss term ce": 1.0, "loss term kd": 2.0}
    # From the bad step on every later one is bad as well, so that nothing is built on it.
    assert verdicts == [0.0, 1.0, 1.0, 1.0]
    with pytest.raises(NonFiniteError, match=rf"loss term kd is inf at step 2 .*{tmp_path}"):
        monitor.read()


AGREEMENT = """
import math, os, signal, sys, torch
from torch import distributed
from effml_common.errors import Interrupted, NonFiniteError
from effml_common.stopping import StepMonitor, StopSignal, check_finite
rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
reductions, reduce = [], distributed.all_reduce
distributed.all_reduce = lambda *args, **kw: (reductions.append(1), reduce(*args, **kw))

def judge(monitor, step, value):
    monitor.judge(step, {"loss": torch.tensor(value)})
    return monitor.read().values["loss"]

for way in ("monitor", "check_finite", "agree"):
    with StopSignal() as stop:
        monitor = StepMonitor(torch.device("cpu"), stop)
        for step in (1, 2, 3, 4):
            if step == 3 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                assert not stop.requested  # the other rank does not know yet
            if way == "monitor":
                assert judge(monitor, step, rank + 1.0) == 1.5
            elif way == "check_finite":
                check_finite(1.0, step=step, term="ce", stop=stop)
            else:
                stop.agree()
            try:
                stop.check()
            except Interrupted as stopped:
                print(way, step, stopped.signum, len(reductions))
                break
try:
    judge(StepMonitor(torch.device("cpu")), 7, math.nan if rank == 1 else 1.0)
except NonFiniteError as error:
    print(error)
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_agree_on_a_signal_and_on_values_in_one_reduction_a_step(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", AGREEMENT, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=300)[0].splitlines() for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    for lines in said:
        assert lines[:3] == ["monitor 3 15 3", "check_finite 3 15 6", "agree 3 15 9"]
        assert lines[3].startswith("loss is nan at step 7 (no checkpoint yet); lower")
