"""What the study on Gemma 3 270M consists of: its settings, its arms, and one cell for each run."""

import ast
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from benchmarks.sliderquant.gemma_data import CHUNKS, GGUF_SHA256, TEXT_VERSION
from benchmarks.sliderquant.peers_methods import LIBRARIES, Grid
from effml_common.errors import ConfigError
from effml_common.parsing import require
from effml_common.parsing import setting as flag
from sliderquant import kernels, method
from sliderquant.config import FULL_BITS, DemoModelConfig, SliderConfig

STUDY_VERSION = 1  # raise it when a change of this study's own code changes a result
GRIDS = {
    "W4g128": Grid(bits=4, group=128),
    "W3g128": Grid(bits=3, group=128),
    "W2g64": Grid(bits=2, group=64),
    "W2": Grid(bits=2, group=None),
    "W4A4": Grid(bits=4, group=None, abits=4),
}
FULL = "full precision"
DEVELOPMENT = ("-dev", "development")  # ends of the names of texts that settings are chosen on
# Arms by their function in ``peers_methods.METHODS``; those of "slider" are the package's own.
FUNCTIONS = {
    **{name: name for name in ("rtn", "hqq", "gptq", "smoothquant-gptq", "awq", "autoround")},
    "autoround-ext": "autoround",
    "compensated": "slider",
    "combined": "slider",
    "slider": "slider",
}
# Modules of ``method`` and ``kernels`` that the study, and one of the package's own arms, do not compute
# with.
FOREIGN_MODULES = {
    "compensated": ("metrics", "packed_gemv", "window_passes", "window_training", "windows"),
    "combined": ("metrics", "packed_gemv"),
    "slider": (
        *("metrics", "packed_gemv"),
        *("block_rounding", "column_rounding", "error_compensation", "moments"),
    ),
}
WEIGHTS_ONLY = ("hqq", "awq", "slider")  # arms that are not compared with rounded activations
ACTIVATIONS_TOO = ("smoothquant-gptq",)  # arms that are compared with rounded activations alone
SEEDS = (0, 1, 2)
# Settings at which an arm runs with all calibration seeds; everywhere else it runs with the first.
SEVERAL_SEEDS = {
    "gptq": ("W3g128", "W2g64", "W2"),
    "compensated": ("W3g128", "W2g64", "W2"),
    "combined": ("W2g64", "W2"),
    "autoround": ("W2g64",),
    "slider": ("W2g64",),
}

# AutoRound's own "light" recipe; with another number of iterations it chooses the rate itself.
LIGHT_ITERS, LIGHT_RATE = 50, 5e-3
# The fewest epochs of windows from nearest rounding, one for each intra-layer stage, take as long as
# AutoRound. The default rates are for many more updates; these were chosen on development text.
FEW_UPDATES = {"epochs": 2, "lr_lora": 2e-3, "lr_lwc": 5e-2}
# The Llama that the comparison of peers is about (see ``peers_models``), as wide as groups of 128 need,
# and trained as long: behind the demo's 800 updates 2 bits cost it 2 %, which tells no method apart.
LLAMA = DemoModelConfig(layers=12, hidden_size=256, train_batch=4, train_lr=2e-3, train_steps=4000)
# CPU seconds of a cell, loading and measuring included, that are expected before one has run.
FIRST_GUESS = {
    FULL: 240,
    "rtn": 250,
    "hqq": 300,
    "gptq": 800,
    "smoothquant-gptq": 600,
    "awq": 2500,
    "autoround": 2400,
    "autoround-ext": 3000,
    "compensated": 600,
    "combined": 1400,
    "slider": 2800,
}


@dataclass(frozen=True, kw_only=True)
class GemmaConfig:
    """Quantize Gemma 3 270M with sliderquant and with what a user would install instead."""

    model: Literal["gemma", "llama"] = flag("gemma", "gemma, or the 12-block Llama as a check")
    setting: tuple[Literal["W4g128", "W3g128", "W2g64", "W2", "W4A4"], ...] = flag(
        tuple(GRIDS), "bits of weights and activations, group size"
    )
    only: tuple[
        Literal[
            "full precision",
            "rtn",
            "hqq",
            "gptq",
            "smoothquant-gptq",
            "awq",
            "autoround",
            "autoround-ext",
            "compensated",
            "combined",
            "slider",
        ],
        ...,
    ] = flag((FULL, *FUNCTIONS), "arms to run")
    seeds: tuple[int, ...] = flag(SEEDS, "calibration seeds, of those that an arm runs with")
    nsamples: int = flag(64, "calibration samples, of 512 tokens (Llama: 128)")
    iters: int = flag(LIGHT_ITERS, "AutoRound's updates of a block")
    batch_size: int = flag(4, "samples per update, and per forward pass of the peers")
    own: tuple[str, ...] = flag((), "settings of sliderquant to change, such as lr_lora=1e-3")
    development: Literal["own", "all"] = flag(
        "own", "arms that are also measured on the text that settings are chosen on"
    )
    plan: bool = flag(False, "run nothing, print the cells and their expected CPU seconds")
    report: bool = flag(False, "run nothing, write the report of what is there")
    threads: int = flag(1, "CPU threads")
    cells: str = flag("benchmarks/sliderquant/results/gemma", "folder of the cells")
    logs: str = flag("runs/sliderquant-gemma", "folder of what libraries print")
    out: str = flag("benchmarks/sliderquant/results", "folder of the report")

    def __post_init__(self) -> None:
        for name in ("nsamples", "iters", "batch_size", "threads"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}", "give 1 or more")
        require(len(set(self.seeds)) == len(self.seeds) > 0, "seeds must differ", "give 0 1 2")
        for word in self.own:
            require("=" in word, f"own is {word!r}", "give name=value")
        require(not (self.plan and self.report), "plan and report exclude each other", "give one")

    @property
    def seqlen(self) -> int:
        """Tokens of a sample and of a chunk."""
        return 512 if self.model == "gemma" else LLAMA.context


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One quantization and its measurement.

    Attributes:
        model: "gemma" or "llama".
        setting: Key of ``GRIDS``, or ``FULL``.
        arm: Key of ``FUNCTIONS``, or ``FULL``.
        label: The arm, with those settings that are not the study's own.
        seed: Of calibration samples, batch order and initial values.
        options: Of the method.
    """

    model: str
    setting: str
    arm: str
    label: str
    seed: int
    options: dict[str, Any]


def design(config: GemmaConfig) -> list[Cell]:
    """Return all cells that the flags ask for: full precision, then a seed after the other."""
    cells = [full_cell(config.model)] if FULL in config.only else []
    for seed in config.seeds:
        for setting in config.setting:
            for arm in FUNCTIONS:
                if arm in config.only and seed in seeds_of(setting, arm):
                    cells.append(cell_of(config, setting, arm, seed))
    return cells


def seeds_of(setting: str, arm: str) -> tuple[int, ...]:
    """Return the calibration seeds that an arm runs with; none where it is not compared."""
    grid = GRIDS[setting]
    rounds_activations = grid.abits < FULL_BITS
    if arm in (WEIGHTS_ONLY if rounds_activations else ACTIVATIONS_TOO):
        return ()
    if arm == "autoround-ext" and (grid.bits > 2 or rounds_activations):
        return ()
    return SEEDS if setting in SEVERAL_SEEDS.get(arm, ()) else SEEDS[:1]


def full_cell(model: str) -> Cell:
    """Return the cell that measures a model as it is."""
    return Cell(model=model, setting=FULL, arm=FULL, label=FULL, seed=0, options={})


def cell_of(config: GemmaConfig, setting: str, arm: str, seed: int) -> Cell:
    """Return the cell of an arm."""
    # What changes from the study's settings is in the label, so that no row mixes both.
    options: dict[str, Any] = {}
    label = arm
    if arm in ("gptq", "awq"):
        options = {"batch_size": config.batch_size}
    elif arm == "smoothquant-gptq":
        options = {"batch_size": config.batch_size, "inside": True}
    elif arm.startswith("autoround"):
        options = {"batch_size": config.batch_size, "iters": config.iters, "seed": seed}
        options |= {"extended": arm.endswith("-ext")}
        if config.iters == LIGHT_ITERS:
            options["lr"] = LIGHT_RATE
        else:
            label += f" {config.iters} iterations"
    elif FUNCTIONS[arm] == "slider":
        options = {"config": own_settings(config, GRIDS[setting], arm, seed)}
        label = " ".join([arm, *config.own])
    return Cell(
        model=config.model, setting=setting, arm=arm, label=label, seed=seed, options=options
    )


def own_settings(config: GemmaConfig, grid: Grid, arm: str, seed: int) -> dict[str, Any]:
    """Return all settings of sliderquant: its defaults, the study's grid, and what ``--own`` says.

    Raises:
        ConfigError: If ``--own`` names no setting, or a value that makes no sense.
    """
    settings: dict[str, Any] = {
        "method": arm,
        "wbits": grid.bits,
        "group_size": grid.group,
        "sym": False,
        "abits": grid.abits,
        "act_sym": False,
        "nsamples": config.nsamples,
        "seqlen": config.seqlen,
        "seed": seed,
    }
    if arm == "slider":
        settings |= {"batch_size": config.batch_size, **FEW_UPDATES}
    for word in config.own:
        name, _, text = word.partition("=")
        try:
            settings[name] = json.loads(text)
        except ValueError:
            settings[name] = text
    try:
        return asdict(SliderConfig(**settings))
    except TypeError as error:
        raise ConfigError(
            f"own is {' '.join(config.own)} ({error}); see sliderquant's settings"
        ) from None


def path_of(config: GemmaConfig, cell: Cell) -> Path:
    """Return the file of a cell, named by all that shapes its result."""
    identity = {"study": STUDY_VERSION, "cell": asdict(cell), "nsamples": config.nsamples}
    if cell.model == "gemma":
        identity |= {"model": GGUF_SHA256, "text": [TEXT_VERSION, CHUNKS]}
    else:
        identity |= {"model": asdict(LLAMA)}
    if cell.arm != FULL:
        identity |= {"library": library_of(cell), "grid": asdict(GRIDS[cell.setting])}
    if is_own(cell.arm):
        identity |= {"source": source_hash(cell.arm)}

    # The name is read by people; the digest tells what its words leave out.
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]
    words = f"{cell.model}-{cell.setting}-{cell.label}-{cell.seed}"
    return Path(config.cells) / f"{re.sub(r'[^A-Za-z0-9.=-]+', '_', words)}-{digest}.json"


def texts_of(config: GemmaConfig, cell: Cell) -> list[str]:
    """Return the texts to measure a cell on: those for choosing settings where there is a choice."""
    names = list(CHUNKS) if cell.model == "gemma" else ["code", "prose", "development"]
    chosen = config.development == "all" or cell.arm == FULL or is_own(cell.arm)
    return [name for name in names if chosen or not name.endswith(DEVELOPMENT)]


def is_own(arm: str) -> bool:
    """Whether an arm is sliderquant's own, which changes with the source of its method."""
    return FUNCTIONS.get(arm) == "slider"


def library_of(cell: Cell) -> str:
    """Return the distribution that quantizes, with its version."""
    distribution = LIBRARIES[FUNCTIONS[cell.arm]][0]
    return f"{distribution} {version(distribution)}"


def source_hash(arm: str) -> str:
    """Return a hash of an arm's code, which comments, documentation and layout do not change."""
    sha = hashlib.sha256()
    folders = [Path(package.__path__[0]) for package in (method, kernels)]
    for path in sorted(path for folder in folders for path in folder.glob("*.py")):
        if path.stem in FOREIGN_MODULES[arm]:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            documented = isinstance(
                node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            )
            if documented and ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
        sha.update(f"{path.name}\n{ast.dump(tree)}\n".encode())
    return sha.hexdigest()[:16]


def result_of(config: GemmaConfig, cell: Cell) -> dict[str, Any] | None:
    """Return the result of a cell, or ``None`` if it has not run, has failed or lacks a text."""
    result = read_result(path_of(config, cell))
    if result is None or not set(texts_of(config, cell)) <= set(result["ppl"]):
        return None
    return result


def read_result(path: Path) -> dict[str, Any] | None:
    """Return what a cell left behind, or ``None`` if it has not run or has failed."""
    if not path.exists():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    return None if "error" in result else result


def known_results(folder: Path) -> list[dict[str, Any]]:
    """Return the results in a folder; of one model, setting, label, seed and code the latest alone."""
    latest: dict[tuple[str, ...], dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        result = read_result(path)
        if result is not None:
            names = ("model", "setting", "label", "seed", "source")
            key = tuple(str(result.get(name)) for name in names)
            if key not in latest or latest[key]["date"] < result["date"]:
                latest[key] = result
    return list(latest.values())


def expected_seconds(cell: Cell, known: Iterable[dict[str, Any]]) -> float:
    """Return a cell's CPU seconds as far as those that have run tell, or a first guess."""
    same_arm = [r for r in known if (r["model"], r["label"]) == (cell.model, cell.label)]
    nearest = [r for r in same_arm if r["setting"] == cell.setting] or same_arm
    if nearest:
        return sum(result["cell_cpu_seconds"] for result in nearest) / len(nearest)
    return FIRST_GUESS[cell.arm] * (1.0 if cell.model == "gemma" else 0.3)
