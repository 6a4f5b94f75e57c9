"""How much memory the contrast takes at its peak, measured in a process of its own.

python -m af_dcd.commands._peak_memory '<JSON of ContrastCase>'
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from af_dcd.method.contrast import omni_contrastive_loss
from effml_common.errors import InputError


@dataclass(frozen=True)
class ContrastCase:
    """One form of the contrast on one pair of maps.

    Attributes:
        shape: Of both maps, [b, c, h, w].
        settings: Arguments of ``omni_contrastive_loss``, ``impl`` among them.
        device: Where it computes, as torch spells it.
    """

    shape: tuple[int, int, int, int]
    settings: dict[str, Any]
    device: str


def measure_peak_bytes(case: ContrastCase) -> float:
    """Measure the bytes above the inputs that one forward and backward takes, in a new process.

    On a CPU from /proc, so on Linux only.

    Raises:
        InputError: If the process fails, as it does where memory runs out.
    """
    command = [sys.executable, "-m", __name__, json.dumps(asdict(case))]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        why = process.stderr.strip().splitlines()[-1:] or ["killed for its memory"]
        form = case.settings["impl"]
        raise InputError(f"the {form} form could not be measured: {why[0]}; use a smaller map")
    return float(process.stdout.split()[-1])


def measure_here(case: ContrastCase) -> float:
    """Measure the case in this process, which must not have computed anything before."""
    # Libraries load at first use; a small run before must not count. Its patches are whole ones.
    torch.set_num_threads(1)
    device, settings = torch.device(case.device), case.settings
    side = 4 * settings["pool"]
    small = torch.randn(1, settings["groups"], side, side).requires_grad_()
    omni_contrastive_loss(small, small, **{**settings, "patch": 4}).backward()

    # The inputs and the gradient of the student's map are there before.
    generated = torch.randn(case.shape, device=device).requires_grad_()
    teacher = torch.randn(case.shape, device=device)
    generated.grad = torch.zeros_like(generated)
    return extra_bytes(
        lambda: omni_contrastive_loss(generated, teacher, **settings).backward(), device
    )


def extra_bytes(run: Callable[[], Any], device: torch.device) -> float:
    """Count the bytes that a run takes at its peak above what was taken before, on a device."""
    if device.type == "cpu":
        before = _process_bytes("VmRSS")
        run()
        return max(1.0, _process_bytes("VmHWM") - before)

    # Every card has counters of its own; unless it is named, those of the current card answer.
    counters = torch.get_device_module(device)
    counters.reset_peak_memory_stats(device)
    before = counters.memory_allocated(device)
    run()
    return float(counters.max_memory_allocated(device) - before)


def _process_bytes(name: str) -> float:
    # Not getrusage, whose maximum a child takes over from the process that started it.
    text = Path("/proc/self/status").read_text()
    return 1024.0 * int(re.findall(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)[0])


if __name__ == "__main__":
    sys.stdout.write(f"{measure_here(ContrastCase(**json.loads(sys.argv[1])))}\n")
