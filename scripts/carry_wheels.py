"""Collect the wheels that a bare CUDA machine without network lacks, into a git-ignored folder.

    python scripts/carry_wheels.py                              for Python 3.12, into .carry/wheels
    python scripts/carry_wheels.py --python 3.11 --out FOLDER   for another Python

The machine has torch, transformers and the other libraries that this file names under THERE.
Everything else that the packages of this workspace and their tests require is resolved from the
wheels' own metadata, at the versions that the root pyproject pins, and downloaded; pure sources are
built here. What travels, the tree and every wheel in the folder, is added up and refused if it is
too much. benchmarks/cuda.sh installs all wheels of the folder. A later run removes what an earlier
one put there and is no longer carried; wheels from elsewhere stay.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

from workspace import ROOT, members, pins, root_table

try:
    from packaging.markers import default_environment
    from packaging.requirements import Requirement
    from packaging.tags import Tag, cpython_tags
    from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(
        f"error: this Python has no module {error.name}; use uv run python scripts/carry_wheels.py",
        file=sys.stderr,
    )
    sys.exit(2)

WHEELS = ROOT / ".carry" / "wheels"
RECORD = "carried.txt"  # in the folder: the names whose wheels this script put there
MEBIBYTE = 2**20
MOST_WHEELS, MOST_TRAVELLING = 25 * MEBIBYTE, 60 * MEBIBYTE

# What the machine has. Where its version matters it stands behind the name.
THERE = """
absl-py accelerate==1.15.0 aiofiles aiohappyeyeballs aiohttp aiosignal annotated-doc anyio attrs
botorch build certifi charset-normalizer chex click cloudpickle cmake colorama contourpy coverage
cuda-bindings cuda-core cuda-pathfinder cuda-toolkit cupy-cuda13x cycler cython diffrax e3nn
einops equinox etils execnet filelock flatbuffers flax fonttools formulaic frozenlist fsspec
gpytorch grpcio h11 h5py hf-xet httpcore httpx huggingface-hub==1.33.0 humanize hypothesis idna
imageio iniconfig interface-meta jax jax-cuda13-pjrt jax-cuda13-plugin jaxlib jaxtyping==0.3.11
jinja2 joblib kiwisolver lazy-loader lightning lightning-utilities linear-operator lineax llvmlite
lxml markdown markdown-it-py markupsafe matplotlib mdurl meson ml-dtypes mpi4py mpmath msgpack
multidict multipledispatch mypy-extensions nanobind narwhals networkx ninja numba numba-cuda
numpy==2.5.2 numpyro nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc nvidia-cuda-runtime
nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse
nvidia-cusparselt-cu13 nvidia-ml-py nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13
nvidia-nvtx onnx onnx-ir onnxruntime onnxscript opencv-python-headless optax opt-einsum
opt-einsum-fx optimistix orbax-checkpoint packaging pandas pathspec patsy peft pillow pip pluggy
portalocker prometheus-client propcache protobuf psutil pyarrow pybind11 py-cpuinfo pygments
pyparsing pyproject-hooks pyre-extensions pytest pytest-benchmark pytest-cov pytest-mock
pytest-timeout pytest-xdist python-dateutil pytorch-lightning pyyaml regex requests rich sacrebleu
safetensors==0.8.0 scikit-build-core scikit-image scikit-learn scipy seaborn sentencepiece==0.2.2
sentence-transformers setuptools shellingham simplejson six sortedcontainers statsmodels sympy
tabulate tensorboard tensorboard-data-server tensorstore threadpoolctl tifffile tiktoken==0.14.0
timm tokenizers==0.23.2 toolz torch==2.11.0 torchaudio torchdiffeq torch-geometric
torchmetrics==1.9.0 torchvision==0.26.0 tqdm transformers==5.17.0 treescope triton==3.6.0 typer
typing-extensions typing-inspect urllib3 uvloop wadler-lindig werkzeug wheel wrapt xarray xxhash
yarl zipp
"""

# Required by someone, and not carried.
LEFT_OUT = {
    "imageio-ffmpeg": "29 MB; writes MP4 files, which no test on a card does",
    "lm-eval": "9 MB and 25 more packages; benchmark tasks, which need a network anyway",
    "opencv-python": "70 MB; opencv-python-headless is there and holds the same module",
}
# Compiled packages that may be carried; anything else must be pure Python.
COMPILED = {"pydantic-core"}
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


class CarryError(Exception):
    """Something cannot be carried; the message says what and what to do."""


@dataclass(frozen=True)
class Target:
    """The machine that the wheels are for."""

    python: str  # "3.12"

    def applies(self, requirement: Requirement, extra: str = "") -> bool:
        """Whether a requirement's marker holds there, for one of the extras asked for."""
        environment = {
            **default_environment(),
            "extra": extra,
            "implementation_name": "cpython",
            "os_name": "posix",
            "platform_machine": "x86_64",
            "platform_python_implementation": "CPython",
            "platform_system": "Linux",
            "python_full_version": f"{self.python}.3",
            "python_version": self.python,
            "sys_platform": "linux",
        }
        return requirement.marker is None or requirement.marker.evaluate(environment)

    def is_pure(self, tags: frozenset[Tag]) -> bool:
        """Whether a wheel with these tags holds Python alone and suits the machine's Python."""
        interpreters = {"py3", f"py{self.python.replace('.', '')}"}
        return any(
            (tag.abi, tag.platform) == ("none", "any") and tag.interpreter in interpreters
            for tag in tags
        )

    def suits(self, tags: frozenset[Tag]) -> bool:
        """Whether the machine's Python can load a wheel with these tags."""
        major, minor = map(int, self.python.split("."))
        platforms = [*PLATFORMS, "linux_x86_64"]  # the last one is what a build here has
        compiled = cpython_tags((major, minor), [f"cp{major}{minor}"], platforms)
        return self.is_pure(tags) or not tags.isdisjoint(compiled)


def there() -> dict[str, str]:
    """Name -> version of what the machine has; the version is empty where it is not known."""
    parts = (entry.partition("==") for entry in THERE.split())
    return {name: version for name, _, version in parts}


def pinned(target: Target) -> dict[str, str]:
    """Name -> exact version, of the root's pins that apply on the machine."""
    requirements = (Requirement(line) for line in pins())
    return {
        canonicalize_name(each.name): str(each.specifier).removeprefix("==")
        for each in requirements
        if target.applies(each)
    }


def wanted() -> list[Requirement]:
    """What the packages of the workspace, their extras and their tests require."""
    lines: list[str] = []
    for member in members():
        project = tomllib.loads((member.path / "pyproject.toml").read_text())["project"]
        chosen = Requirement(f"{member.name}{member.extras}").extras
        lines += project["dependencies"]
        lines += (line for extra in chosen for line in project["optional-dependencies"][extra])
    lines += root_table()["dependency-groups"]["test"]
    ours = {member.name for member in members()}
    requirements = [Requirement(line) for line in lines]
    return [each for each in requirements if canonicalize_name(each.name) not in ours]


def requirements_of(wheel: Path) -> list[Requirement]:
    """The Requires-Dist lines of a wheel."""
    with ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    return [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]


def pip(*arguments: object) -> str | None:
    """Run pip with its own configured index; None if it worked, else what it printed."""
    command = ["uv", "tool", "run", "pip", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr if done.returncode else None


def parse(wheel: Path) -> tuple[str, str, frozenset[Tag]]:
    """Name, version and tags of a wheel, which its file name has.

    Raises:
        CarryError: If the file is not named as a wheel; pip would then refuse all that are beside it.
    """
    try:
        name, version, _, tags = parse_wheel_filename(wheel.name)
    except InvalidWheelFilename as error:
        raise CarryError(f"{wheel} is not named as a wheel; move it elsewhere") from error
    return name, str(version), tags


def find_wheel(folder: Path, name: str, version: str, target: Target) -> Path | None:
    """The wheel of one exact version in a folder, if it is one for the machine's Python."""
    for path in folder.glob("*.whl"):
        found, number, tags = parse(path)
        if (found, number) == (name, version) and target.suits(tags):
            return path
    return None


def fetch(name: str, version: str, folder: Path, target: Target) -> Path:
    """Put one exact version into the folder: a ready wheel, or one built here from pure sources.

    Raises:
        CarryError: If there is neither, or the wheel is compiled and not allowed to be.
    """
    exact = f"{name}=={version}"
    wheel = find_wheel(folder, name, version, target)
    if wheel is None:
        compiled = [part for each in PLATFORMS for part in ("--platform", each)]
        pure = ["--platform", "any", "--abi", "none"]
        problem = pip(
            *("download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder),
            *("--python-version", target.python, "--implementation"),
            *(["cp", *compiled] if name in COMPILED else ["py", *pure]),
            exact,
        )
        problem = problem and build(exact, folder)
        wheel = find_wheel(folder, name, version, target)
        if problem or wheel is None:
            raise CarryError(
                f"{exact} has no wheel for Python {target.python} and does not build here; see below\n"
                + (problem or "what was built here is compiled for another Python or platform")
            )
    if not target.is_pure(parse(wheel)[2]) and name not in COMPILED:
        wheel.unlink()
        raise CarryError(f"{wheel.name} is compiled; leave {name} out or add it to COMPILED")
    return wheel


def build(exact: str, folder: Path) -> str | None:
    """Build a wheel from sources; None if it worked, else what pip printed."""
    with tempfile.TemporaryDirectory() as scratch:
        constraint = Path(scratch) / "build.txt"
        constraint.write_text("setuptools<82\n")  # older setup files import pkg_resources
        return pip(
            *("wheel", "--quiet", "--no-deps", "--no-binary", exact.partition("==")[0]),
            *("--build-constraint", constraint, "--wheel-dir", folder, exact),
        )


def collect(folder: Path, target: Target) -> dict[str, Path]:
    """Fetch what is missing there, with all that it requires; return name -> wheel."""
    have, versions = there(), pinned(target)
    carried: dict[str, Path] = {}
    queue = [(each, "the workspace") for each in wanted() if target.applies(each)]
    seen: set[tuple[str, str]] = set()
    while queue:
        requirement, whose = queue.pop()
        name = canonicalize_name(requirement.name)
        if name in have or name in LEFT_OUT:
            continue
        if name not in versions:
            raise CarryError(f"{name}, which {whose} requires, has no pin; run scripts/pins.py")
        if name not in carried:
            carried[name] = fetch(name, versions[name], folder, target)
            print(f"{name} {versions[name]}", flush=True)

        # An extra of a package that is carried already may still bring requirements of its own.
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            needs = requirements_of(carried[name])
            queue += ((each, name) for each in needs if target.applies(each, extra))
    remove_stale(folder, carried)
    return carried


def remove_stale(folder: Path, carried: dict[str, Path]) -> None:
    """Remove wheels that an earlier run put there, and other ones of what is carried now.

    Two versions of one package cannot be installed together. Any other wheel is somebody else's.
    """
    record = folder / RECORD
    earlier = record.read_text().split() if record.exists() else []
    for path in set(folder.glob("*.whl")) - set(carried.values()):
        if parse(path)[0] in {*earlier, *carried}:
            path.unlink()
    record.write_text("".join(f"{name}\n" for name in sorted(carried)))


def conflicts(carried: dict[str, Path], target: Target) -> Iterator[str]:
    """Requirements that the versions there, as far as they are known, do not meet."""
    have = {name: version for name, version in there().items() if version}
    sources = {"the workspace": wanted()}
    sources |= {name: requirements_of(wheel) for name, wheel in carried.items()}
    for whose, requirements in sources.items():
        for each in requirements:
            version = have.get(canonicalize_name(each.name))
            if version and target.applies(each) and not each.specifier.contains(version, True):
                yield f"{whose} requires {each.name}{each.specifier}; {version} is there"


def travelling(wheels: list[Path]) -> dict[str, int]:
    """Bytes of each file that travels: what git does not ignore, and the wheels."""
    listing = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True)
    names = {name for name in done.stdout.split("\0") if name}
    paths = [path for name in names if (path := ROOT / name).is_file()]
    return {str(path): path.stat().st_size for path in (*paths, *wheels)}


def check_size(wheels: list[Path]) -> str:
    """Say how much travels.

    Raises:
        CarryError: If the wheels, or all that travels, are too much.
    """
    sizes = travelling(wheels)
    carried, total = sum(sizes[str(wheel)] for wheel in wheels), sum(sizes.values())
    parts = ((carried, MOST_WHEELS, "the wheels are"), (total, MOST_TRAVELLING, "what travels is"))
    for size, most, what in parts:
        if size > most:
            largest = sorted(sizes, key=lambda name: -sizes[name])[:10]
            lines = (f"{sizes[name] / MEBIBYTE:6.1f} MiB  {name}" for name in largest)
            raise CarryError(
                f"{what} {size / MEBIBYTE:.1f} MiB, {most // MEBIBYTE} at most; "
                "ignore or leave out the largest below\n" + "\n".join(lines)
            )
    return (
        f"{len(wheels)} wheels, {carried / MEBIBYTE:.1f} MiB; "
        f"all that travels: {len(sizes)} files, {total / MEBIBYTE:.1f} MiB"
    )


def main() -> int:
    reasons = (f"  {name:<17}{reason}" for name, reason in LEFT_OUT.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="\n".join(("left out, though required by something:", *reasons)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--python", default="3.12", help="Python of the machine (default 3.12)")
    parser.add_argument("--out", type=Path, default=WHEELS, help="default .carry/wheels")
    flags = parser.parse_args()
    if not re.fullmatch(r"\d\.\d{1,2}", flags.python):
        parser.error(f"--python {flags.python}: name it as in 3.12")
    target = Target(flags.python)
    try:
        flags.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {flags.out} ({error.strerror}): name a folder")
    try:
        carried = collect(flags.out, target)
        # The folder travels, and is installed, as a whole.
        wheels = sorted(flags.out.glob("*.whl"))
        for path in set(wheels) - set(carried.values()):
            print(f"{path.name} is not from here: it stays, and is installed with the others")
        print(check_size(wheels))
    except CarryError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    found = list(conflicts(carried, target))
    for line in found:
        print(f"conflict: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
