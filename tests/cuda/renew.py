"""Count hot paths anew into ``budgets.json``; look at its diff before you commit."""

import argparse
import fcntl
import importlib
import os
import time

from benchmarks.hot_paths import BUDGETS, MODULES, count

from tests.cuda.budgets import budgets, write


def main() -> None:
    """Renew the packages that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m tests.cuda.renew", description=__doc__)
    parser.add_argument(
        "modules",
        nargs="*",
        metavar="MODULE",
        help=f"of {', '.join(MODULES)}; all if none is named",
    )
    modules = [name.replace("-", "_") for name in parser.parse_args().modules]
    for unknown in sorted({*modules} - {*MODULES}):
        parser.error(f"no package called {unknown}; there are {', '.join(MODULES)}")

    for module in modules or MODULES:
        figures = {}
        for path in importlib.import_module(f"benchmarks.{module}.cuda").PATHS:
            start = time.monotonic()
            figures[path.name] = count(path)
            print(f"{module}: {path.name}: {time.monotonic() - start:.1f} s", flush=True)
        # Two of these may run at a time; closing the folder ends the lock.
        folder = os.open(BUDGETS.parent, os.O_RDONLY)
        fcntl.flock(folder, fcntl.LOCK_EX)
        known = budgets() | {module: figures}
        write({name: known[name] for name in MODULES if name in known})
        os.close(folder)


if __name__ == "__main__":
    main()
