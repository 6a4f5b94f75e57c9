"""Count hot paths anew into ``budgets.json``: ``python -m tests.cuda.renew [MODULE ...]``."""

import fcntl
import importlib
import sys
import time

from benchmarks.hot_paths import BUDGETS, count

from tests.cuda.budgets import budgets, write

MODULES = ("sliderquant", "com_pt", "scalekd", "af_dcd", "morse_diffusion", "fis_dit")


def main() -> None:
    """Renew the modules that are named, or all."""
    for module in sys.argv[1:] or MODULES:
        figures = {}
        for path in importlib.import_module(f"benchmarks.{module}.cuda").PATHS:
            start = time.monotonic()
            figures[path.name] = count(path)
            print(f"{module}: {path.name}: {time.monotonic() - start:.1f} s", flush=True)
        # Two of these may run at a time.
        with open(BUDGETS.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            write(budgets() | {module: figures})
        BUDGETS.with_suffix(".lock").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
