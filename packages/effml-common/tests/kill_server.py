"""Kills savers with SIGKILL, forked from one process that has imported torch already.

usage: kill_server.py FOLDER KILLS; prints counts of what was found afterwards as JSON.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from effml_common import checkpoint


def content(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(256, 256, generator=generator) for name in ("a", "b")}


def save_forever(root: Path) -> None:
    step = 0
    while True:
        step += 1
        checkpoint.save(root, step, content(step), {"step": step, "note": [1.5, "x"]}, keep=1)


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    draw = random.Random(0)
    counts = dict.fromkeys(("good", "unloadable", "missing", "wrong", "staging", "staging left"), 0)
    for trial in range(kills):
        root = folder / str(trial)
        child = os.fork()
        if child == 0:
            save_forever(root)
        while not list(root.glob("step-*")):
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        counts["staging"] += bool(list(root.glob(".tmp-*")))
        found = checkpoint.latest(root)
        if found is None:
            counts["missing"] += 1
            continue
        if found.step != max(int(path.name[5:]) for path in root.glob("step-*")):
            counts["unloadable"] += 1
            continue
        expected = content(found.step)
        same = all(torch.equal(found.tensors[name], expected[name]) for name in expected)
        fine = same and found.state == {"step": found.step, "note": [1.5, "x"]}
        counts["good" if fine else "wrong"] += 1
        checkpoint.save(root, found.step + 1000, expected, {})
        counts["staging left"] += bool(list(root.glob(".tmp-*")))
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
