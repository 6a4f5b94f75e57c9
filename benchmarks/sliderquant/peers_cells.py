"""What the comparison consists of: its settings, and one cell per model, grid, method and seed."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from benchmarks.sliderquant.peers_methods import Grid, why_not
from effml_common.logging import say
from effml_common.parsing import require, setting
from sliderquant.commands.inspect import make_plan
from sliderquant.config import FULL_BITS, DemoModelConfig, SliderConfig
from sliderquant.demo.arms import LEARNING_RATES

GRIDS = {
    "W2": Grid(bits=2, group=None),
    "W2g64": Grid(bits=2, group=64),
    "W3": Grid(bits=3, group=None),
    "W3g128": Grid(bits=3, group=128),
    "W4": Grid(bits=4, group=None),
    "W4A4": Grid(bits=4, group=None, abits=4),
}
PAIRS = (
    *(("llama", "W2"), ("llama", "W2g64"), ("llama", "W3"), ("llama", "W3g128"), ("llama", "W4")),
    *(("llama", "W4A4"), ("llama-outliers", "W4A4")),
    *(("qwen", "W2g64"), ("qwen-outliers", "W4A4")),
)
CALIBRATED = (
    *("gptq", "smoothquant-gptq", "smoothquant-gptq-inside", "awq", "autoround"),
    *("slider-visits", "slider-seconds", "slider-compensated"),
)
PEERS = ("rtn", "torchao", "hqq", *CALIBRATED)
# What changes from sliderquant as it is, by setting; epochs are scaled to the same block visits.
ABLATION: dict[str, dict[str, dict[str, Any]]] = {
    "W2g64": {
        "block-wise": {"schedule": "block", "gamma": 1.0},
        "fixed windows of 2": {"schedule": "fixed", "gamma": 1.0},
        "fixed windows of 4": {"schedule": "fixed", "window": 4, "gamma": 1.0},
        "expanding and fixed": {"deep": 0, "gamma": 1.0},
        "fixed and contracting": {"shallow": 0, "gamma": 1.0},
        "all windows": {"gamma": 1.0},
        "all windows, halves by network": {},
        "all windows, halves by window": {"intra_order": "window"},
        "without correction": {"lr_lora": 0.0},
        "without clipping": {"lwc": False},
        "with channel scaling": {"channel_scale": "on"},
    },
    "W4A4": {
        "all windows, halves by network": {},
        "without correction": {"lr_lora": 0.0},
        "without clipping": {"lwc": False},
        "without channel scaling": {"channel_scale": "off"},
    },
}


@dataclass(frozen=True, kw_only=True)
class PeersConfig(DemoModelConfig):
    """Quantize the same models with sliderquant and with what a user would install instead."""

    layers: int = setting(12, "decoder blocks")
    hidden_size: int = setting(256, "width, a multiple of 64")
    models: tuple[Literal["llama", "llama-outliers", "qwen", "qwen-outliers"], ...] = setting(
        ("llama", "llama-outliers", "qwen", "qwen-outliers"), "models to quantize"
    )
    settings: tuple[Literal["W2", "W2g64", "W3", "W3g128", "W4", "W4A4"], ...] = setting(
        ("W2", "W2g64", "W3", "W4", "W4A4"),
        "bits of weights and activations, group size; each has its model",
    )
    methods: tuple[
        Literal[
            "rtn",
            "torchao",
            "hqq",
            "gptq",
            "smoothquant-gptq",
            "smoothquant-gptq-inside",
            "awq",
            "autoround",
            "autoround-extended",
            "slider-visits",
            "slider-seconds",
            "slider-compensated",
            "slider-defaults",
        ],
        ...,
    ] = setting(PEERS, "methods to run")
    seeds: tuple[int, ...] = setting((1, 2, 3), "of samples, batch order and initial values")
    nsamples: int = setting(64, "calibration samples of --context tokens")
    batch_size: int = setting(8, "samples per update, and per forward pass")
    iters: int = setting(200, "updates per block of AutoRound; sliderquant gets as many visits")
    lr_lora: float = setting(LEARNING_RATES["SliderQuant"][0], "sliderquant's rate, correction")
    lr_lwc: float = setting(LEARNING_RATES["SliderQuant"][1], "sliderquant's rate, clipping")
    lr_scale: float = setting(1e-3, "sliderquant's rate, channel scaling")
    text: Literal["held-out", "development"] = setting("held-out", "text to measure on")
    eval_tokens: int = setting(51_200, "tokens to measure on, per text")
    ablation: bool = setting(False, "run sliderquant with parts of it changed instead")
    sensitivity: bool = setting(False, "round one block at a time instead")
    report: bool = setting(False, "run nothing, only write the report of what is there")
    threads: int = setting(1, "CPU threads")
    cells: str = setting("runs/sliderquant-peers", "folder of the cells")
    out: str = setting("benchmarks/sliderquant/results", "folder of the results")

    def __post_init__(self) -> None:
        DemoModelConfig.__post_init__(self)
        for name in ("nsamples", "batch_size", "iters", "eval_tokens", "threads"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}", "give 1 or more")
        require(
            self.batch_size <= self.nsamples,
            f"batch_size ({self.batch_size}) is more than nsamples ({self.nsamples})",
            "lower batch_size, because a batch has every sample once",
        )
        require(len(set(self.seeds)) == len(self.seeds) > 0, "seeds must differ", "give 1 2 3")
        require(
            self.eval_tokens >= self.context,
            f"eval_tokens ({self.eval_tokens}) are fewer than one chunk of {self.context}",
            "give more",
        )

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Models and settings to compare on."""
        return [pair for pair in PAIRS if pair[0] in self.models and pair[1] in self.settings]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One quantization and its measurement.

    Attributes:
        family: Model.
        setting: Key of ``GRIDS``, or "full precision".
        method: Key of ``METHODS``, "full" or "sensitivity".
        label: Name of the row.
        seed: Of samples, batch order and initial values.
        options: Of the method; with all else they name the file.
    """

    family: str
    setting: str
    method: str
    label: str
    seed: int
    options: dict[str, Any] = field(default_factory=dict)


def path_of(config: PeersConfig, cell: Cell) -> Path:
    """Return the file of a cell, named by all that shapes its result."""
    model = {f.name: getattr(config, f.name) for f in fields(DemoModelConfig)}
    measured = {name: getattr(config, name) for name in ("nsamples", "text", "eval_tokens")}
    identity = json.dumps([model, measured, asdict(cell)], sort_keys=True)
    words = (cell.family, cell.setting, cell.label, str(cell.seed))
    name = "-".join(words).replace(",", "").replace(" ", "_")
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    return Path(config.cells) / f"{name}-{digest}.json"


def material_path(config: PeersConfig, family: str) -> Path:
    """Return the file that says where a model is and holds its text."""
    model = {f.name: getattr(config, f.name) for f in fields(DemoModelConfig)}
    digest = hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()[:8]
    return Path(config.cells) / f"{family}-{digest}.safetensors"


def result_of(config: PeersConfig, cell: Cell) -> dict[str, Any] | None:
    """Return what is kept of a cell, or ``None``."""
    path = path_of(config, cell)
    return json.loads(path.read_text()) if path.exists() else None


def slider_settings(config: PeersConfig, grid: Grid, seed: int, **changes: Any) -> dict[str, Any]:
    """Return sliderquant's settings at AutoRound's block visits.

    AutoRound passes iters x batch / samples times over every block. The epochs that cost the same are
    that, times blocks, over the block visits of the windows, in whole intra-layer stages.
    """
    settings = {
        "wbits": grid.bits,
        "group_size": grid.group,
        "sym": False,
        "abits": grid.abits,
        "act_sym": False,
        "batch_size": config.batch_size,
        "nsamples": config.nsamples,
        "seqlen": config.context,
        "seed": seed,
    }
    if changes.get("method") == "compensated":  # no windows, no epochs
        return settings | changes

    rates = {"lr_lora": config.lr_lora, "lr_lwc": config.lr_lwc, "lr_scale": config.lr_scale}
    settings |= {"method": "slider", **rates, **changes}
    calibration = SliderConfig(**settings)
    budget = config.layers * config.iters * config.batch_size / config.nsamples
    visits = make_plan(calibration, None, config.layers).block_visits
    epochs = calibration.stages * max(1, round(budget / visits / calibration.stages))
    return {**settings, "epochs": epochs}


def cell_of(config: PeersConfig, family: str, name: str, method: str, seed: int) -> Cell | None:
    """Return the cell of a method, or ``None`` where it waits for AutoRound's time."""
    # What the method is asked for; variants of a method share its function.
    grid = GRIDS[name]
    options: dict[str, Any] = {}
    function = method.partition("-")[0] if method.startswith(("autoround", "slider")) else method
    if method.startswith("smoothquant"):
        function = "smoothquant-gptq"
        options = {"batch_size": config.batch_size, "inside": method.endswith("-inside")}
    elif method in ("gptq", "awq"):
        options = {"batch_size": config.batch_size}
    elif function == "autoround":
        options = {"batch_size": config.batch_size, "iters": config.iters, "seed": seed}
        options["extended"] = method == "autoround-extended"
    elif function == "slider":
        rates = {f: getattr(SliderConfig(), f) for f in ("lr_lora", "lr_lwc", "lr_scale")}
        changes: dict[str, Any] = rates if method == "slider-defaults" else {}
        if method == "slider-compensated":
            changes = {"method": "compensated"}
        options = {"config": slider_settings(config, grid, seed, **changes)}

    # Equal time is known only when AutoRound has run.
    if method == "slider-seconds":
        timed = cell_of(config, family, name, "autoround", seed)
        assert timed is not None
        result = result_of(config, timed)
        if result is None or "error" in result:
            return None
        # CPU time: seconds on the wall would tell how busy the machine was with something else.
        options["seconds"] = result["cpu_seconds"]

    return Cell(
        family=family, setting=name, method=function, label=method, seed=seed, options=options
    )


def full_cell(family: str) -> Cell:
    """Return the cell that measures a model as it is."""
    return Cell(
        family=family, setting="full precision", method="full", label="full precision", seed=0
    )


def sensitivity_cells(config: PeersConfig) -> list[Cell]:
    """Return the cells that round one block at a time, at every setting of weights alone."""
    return [
        Cell(family=family, setting=name, method="sensitivity", label="sensitivity", seed=0)
        for family, name in config.pairs
        if GRIDS[name].abits == FULL_BITS and not refusal(config, name, "sensitivity")
    ]


def ablation_cells(config: PeersConfig) -> list[Cell]:
    """Return the cells of sliderquant with parts of it changed, on the models it is tuned on."""
    return [
        Cell(
            family=family,
            setting=name,
            method="slider",
            label=arm,
            seed=seed,
            options={"config": slider_settings(config, GRIDS[name], seed, **changes)},
        )
        for seed in config.seeds
        for family, name in config.pairs
        if not family.startswith("qwen")
        for arm, changes in ABLATION.get(name, {}).items()
    ]


def seeds_of(config: PeersConfig, method: str) -> tuple[int, ...]:
    """Return the seeds a method runs with: one that uses no calibration data runs once."""
    return config.seeds if method not in ("rtn", "torchao", "hqq") else (0,)


def methods_of(config: PeersConfig, name: str) -> list[str]:
    """Return the methods to compare at a setting; SmoothQuant is made for rounded activations."""
    rounded = GRIDS[name].abits < FULL_BITS
    wanted = [
        method for method in config.methods if rounded or not method.startswith("smoothquant")
    ]
    # sliderquant at equal time comes after the method whose time it needs.
    return sorted(wanted, key=lambda method: method.startswith("slider"))


def refusal(config: PeersConfig, name: str, method: str) -> str | None:
    """Return why a method cannot run at a setting, or ``None``."""
    grid = GRIDS[name]
    if grid.group and (config.hidden_size % grid.group or 3 * config.hidden_size % grid.group):
        return f"groups of {grid.group} do not divide rows of {config.hidden_size}"
    return why_not(method, grid)


def peer_cells(config: PeersConfig) -> Iterator[Cell]:
    """Yield the cells of the comparison; lazily, because equal time is known after AutoRound."""
    for seed in (0, *config.seeds):
        for family, name in config.pairs:
            for method in methods_of(config, name):
                if seed in seeds_of(config, method) and not refusal(config, name, method):
                    cell = cell_of(config, family, name, method, seed)
                    if cell is not None:
                        yield cell
                    else:
                        say(f"{family} {name} {method}: needs the time of autoround, left out")


def count_of(config: PeersConfig) -> int:
    """Return how many cells the flags ask for, the full-precision ones aside."""
    if config.ablation:
        return len(ablation_cells(config))
    if config.sensitivity:
        return len(sensitivity_cells(config))
    return sum(
        len(seeds_of(config, method))
        for _, name in config.pairs
        for method in methods_of(config, name)
        if not refusal(config, name, method)
    )
