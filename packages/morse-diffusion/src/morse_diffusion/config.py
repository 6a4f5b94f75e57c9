"""Every setting of morse-diffusion: its default, its unit and its check, once."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from effml_common.device import DEVICE_HELP
from effml_common.parsing import require, setting

# Settings of train-dot that may differ when a run is resumed: they change where it computes, what it
# says and when it saves, but not the Dot that comes out. The data may have been moved.
FREE_WHEN_RESUMED = ("data", "out", "device", "checkpointing", "save_every", "log_every", "resume")
BASELINES = ("ddim", "dpmpp", "unipc", "extrapolate", "deepcache")


LEAST_SAMPLES = 32  # images of a cell of the demo


def require_counts(config: Any, *names: str) -> None:
    """Refuse a setting that is a count and below 1."""
    for name in names:
        value = getattr(config, name)
        require(value >= 1, f"{name} is {value}", "give 1 or more")


def require_gap(gap_max: float) -> None:
    """Refuse a largest jump of a training pair that is no share of T."""
    require(0 < gap_max <= 1, f"gap_max is {gap_max}", "give a share of T above 0 and up to 1")


def require_budgets(budgets: tuple[int, ...]) -> None:
    """Refuse budgets that leave no room for two Dash steps."""
    require(
        bool(budgets) and min(budgets) >= 2,
        f"budgets are {list(budgets)}",
        "give 2 LSD or more for each, such as 5 10 20",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DashConfig:
    """The small denoiser that the demo trains once."""

    data: Literal["digits", "shapes"] = setting(
        "digits", "digits up-sampled to 32x32, or drawn RGB shapes"
    )
    widths: tuple[int, ...] = setting((32, 64, 64), "channels of the demo denoiser's levels")
    dash_steps: int = setting(1500, "updates of the demo denoiser's training")
    dash_batch: int = setting(32, "images per update of the demo denoiser")
    dash_lr: float = setting(1.5e-3, "peak learning rate of the demo denoiser")
    dash_seed: int = setting(0, "seed of the demo denoiser")

    def __post_init__(self) -> None:
        require(
            len(self.widths) >= 2 and all(w > 0 and w % 8 == 0 for w in self.widths),
            f"widths are {list(self.widths)}",
            "give two or more positive multiples of 8, such as 32 64 64",
        )
        require_counts(self, "dash_steps", "dash_batch")


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoDotConfig(DashConfig):
    """The demo's Dash and the Dot that is trained for it."""

    m: int = setting(2, "extra halvings of the Dot")
    channels: tuple[int, ...] = setting((8, 16), "channels of the Dot's extra levels")
    rank: int = setting(16, "rank of the Dot's residuals on the shared weights")
    dot_steps: int = setting(1500, "updates of the Dot's training")
    dot_batch: int = setting(32, "images per update of the Dot")
    dot_lr: float = setting(3e-3, "peak learning rate of the Dot")
    min_snr: bool = setting(True, "weigh errors near t = 0 down while the Dot is trained")
    gap_max: float = setting(0.4, "largest jump of a training pair, as a share of T")
    rollout: float = setting(0.0, "last share of the updates whose pairs start from Dot steps")

    def __post_init__(self) -> None:
        DashConfig.__post_init__(self)
        require_counts(self, "m", "rank", "dot_steps", "dot_batch")
        require(
            len(self.channels) == self.m,
            f"channels are {list(self.channels)}, but m is {self.m}",
            f"give {self.m} widths, one for each level",
        )
        require_gap(self.gap_max)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainDotConfig:
    """Train a Dot for your own diffusers pipeline on a folder of images."""

    pipe: str = field(metadata={"help": "folder of a diffusers pipeline"})
    data: str = field(
        metadata={
            "help": "folder of images; captions in metadata.jsonl (file_name, text) or in a .txt "
            "beside each image; classes are the names of sub-folders"
        }
    )
    out: str | None = setting(None, "folder of the Dot; default runs/train-dot-<time>")
    m: int = setting(2, "extra halvings: 2 makes the Dot 5 to 10 times faster, 1 about 3 times")
    channels: tuple[int, ...] = setting((96, 160), "width of each extra level, outermost first")
    layers: int = setting(1, "residual blocks per extra down block")
    rank: int = setting(64, "rank of the residuals on the shared weights")
    guidance: tuple[float, ...] = setting(
        (2.0, 10.0), "range of guidance scales for text pipelines; one number for LCM models"
    )
    steps: int = setting(100_000, "updates")
    batch: int = setting(8, "images per update, over all processes")
    lr: float = setting(1e-4, "learning rate of AdamW")
    ema: float = setting(0.999, "decay of the average of the weights that is saved")
    clip: float = setting(1.0, "largest gradient norm")
    gap_max: float = setting(1.0, "largest jump of a training pair, as a share of T")
    rollout: float = setting(
        0.0, "share of the last updates whose jump has a Dot step in the middle, as in sampling"
    )
    min_snr: bool = setting(
        False, "weigh errors near t = 0 down, where noise cannot be predicted; not in the paper"
    )
    cosine: bool = setting(False, "let the learning rate fall to 0 along a cosine; for short runs")
    device: str = setting("auto", DEVICE_HELP)
    precision: Literal["no", "bf16"] = setting("no", "bf16 runs the networks in bfloat16")
    checkpointing: bool = setting(False, "recompute shared blocks in the backward pass")
    seed: int = setting(0, "seed of the start and of every draw")
    save_every: int = setting(1000, "updates between checkpoints")
    log_every: int = setting(50, "updates between lines of metrics.jsonl")
    resume: Literal["never", "auto"] = setting(
        "never", "auto continues an interrupted run in the same --out"
    )

    def __post_init__(self) -> None:
        # Counts, and one width per extra level.
        require_counts(self, "m", "layers", "rank", "steps", "batch", "save_every", "log_every")
        require(
            len(self.channels) == self.m and all(c >= 1 for c in self.channels),
            f"channels {list(self.channels)} do not fit m={self.m}",
            "give one positive width per extra level",
        )

        # Numbers with a range.
        require(
            len(self.guidance) in (1, 2) and all(w >= 0 for w in self.guidance)
            and self.guidance[0] <= self.guidance[-1],
            f"guidance is {list(self.guidance)}",
            "give one scale, or the lower and the upper end of a range, such as 2 10",
        )  # fmt: skip
        for name in ("lr", "clip"):
            value = getattr(self, name)
            remedy = "give a finite number above 0, such as 1e-4"
            require(0 < value < float("inf"), f"{name} is {value}", remedy)
        require(0 <= self.ema < 1, f"ema is {self.ema}", "give 0 or more and less than 1")
        require_gap(self.gap_max)
        require(0 <= self.rollout <= 1, f"rollout is {self.rollout}", "give a share from 0 to 1")

    def settings_of_result(self) -> dict[str, Any]:
        """Return the settings that the trained Dot depends on, which a resumed run must share.

        A run with a constant learning rate and one kind of pair may be resumed with more steps: it
        then gives what an uninterrupted run of as many steps gives.
        """
        settings = {k: v for k, v in asdict(self).items() if k not in FREE_WHEN_RESUMED}
        settings["pipe"] = Path(self.pipe).name  # no path of the user's machine is kept
        steps = settings.pop("steps")
        return {**settings, "steps": steps} if self.cosine or self.rollout > 0 else settings


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """Sample images from a pipeline and its Dot within a time budget."""

    pipe: str = field(metadata={"help": "folder of a diffusers pipeline"})
    dot: str = field(metadata={"help": "folder of its Dot, as train-dot writes it"})
    budget_lsd: float = setting(10.0, "time for the denoising loop, in steps of the full network")
    speed_ratio: float | None = setting(None, "N; default measured by a short run")
    early: float = setting(
        1.0,
        "1 spreads the full steps evenly, as the paper does; 1.5 crowds them at the noisy start",
    )
    prompt: str = setting("", "text, for text-to-image pipelines")
    guidance_scale: float | None = setting(None, "guidance; default the pipeline's own")
    n: int = setting(4, "images")
    seed: int = setting(0, "seed of the noise")
    out: str | None = setting(None, "folder of the images; default runs/sample-<time>")
    device: str = setting("auto", DEVICE_HELP)

    def __post_init__(self) -> None:
        require_counts(self, "n")
        require(self.budget_lsd >= 1, f"budget_lsd is {self.budget_lsd}", "give 1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """Quality and measured time of a Dot beside other samplers, on your own pipeline."""

    pipe: str = field(metadata={"help": "folder of a diffusers pipeline"})
    dot: str = field(metadata={"help": "folder of its Dot"})
    data: str = field(metadata={"help": "folder of real images to compare with"})
    budgets: tuple[int, ...] = setting((5, 10, 15, 20), "budgets in LSD")
    baselines: tuple[str, ...] = setting(
        ("ddim", "dpmpp", "unipc", "extrapolate"), f"some of {', '.join(BASELINES)}"
    )
    early: float = setting(1.0, "placement of Morse's full steps, as for sample")
    prompt: str = setting("", "text, for text-to-image pipelines")
    samples: int = setting(256, "images per cell")
    batch: int = setting(64, "images per call")
    seeds: int = setting(1, "seeds of the noise; claims need 3")
    out: str | None = setting(None, "folder of the report; default runs/bench-<time>")
    device: str = setting("auto", DEVICE_HELP)

    def __post_init__(self) -> None:
        unknown = [name for name in self.baselines if name not in BASELINES]
        require(not unknown, f"baseline {unknown} is not known", f"use {', '.join(BASELINES)}")
        require_counts(self, "samples", "batch", "seeds")
        require_budgets(self.budgets)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """Print the order of Dash and Dot steps for a budget."""

    budget_lsd: float | None = setting(None, "budget in steps of the full network")
    budget_ms: float | None = setting(None, "budget in milliseconds, with --profile")
    n: float | None = setting(None, "N: how many Dot steps take the time of a Dash step")
    r: float | None = setting(None, "steps per LSD, 2 to 3; default 2.5, less for a small N")
    early: float = setting(1.0, "1: full steps spread evenly; 1.5 crowds them at the noisy start")
    profile: str | None = setting(None, "JSON file with t_dash, t_dot and t_sched in ms")

    def __post_init__(self) -> None:
        lsd, ms = self.budget_lsd is not None, self.budget_ms is not None
        require(
            lsd != ms,
            "both budgets are given" if lsd else "no budget is given",
            "use --budget-lsd 10 --n 6, or --budget-ms 400 --profile FILE",
        )
        require(not lsd or self.n is not None, "N is not given", "add --n, as bench measures it")
        require(not ms or self.profile is not None, "no profile is given", "add --profile FILE")


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectConfig:
    """Show what a Dot is made of, or count the one of the paper."""

    dot: str | None = setting(None, "folder of a Dot")
    published: bool = setting(
        False, "count a Dot of Stable Diffusion 1.4 beside the paper's 97.84M, without weights"
    )

    def __post_init__(self) -> None:
        require(
            (self.dot is not None) != self.published,
            "inspect needs either a Dot or the published shape",
            "give --dot DIR or --published, one of them",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig(DemoDotConfig):
    """Compare samplers at equal time on a small denoiser, with sample grids and a report."""

    seeds: int = setting(1, "seeds of the noise; claims need 3")
    budgets: tuple[int, ...] = setting((5, 10, 20), "budgets in steps of the full network")
    samples: int = setting(80, "images per cell")
    expansion: float = setting(
        1.5, "r, steps per LSD; the paper has 2 to 3, this Dot does less well there"
    )
    out: str | None = setting(None, "folder of the report; default runs/demo-<time>")
    device: str = setting("auto", DEVICE_HELP)

    def __post_init__(self) -> None:
        DemoDotConfig.__post_init__(self)
        require(
            self.expansion >= 1, f"expansion is {self.expansion}", "give 1 or more, such as 1.5"
        )
        require_counts(self, "seeds")
        require(
            self.samples >= LEAST_SAMPLES,
            f"samples is {self.samples}",
            f"give {LEAST_SAMPLES} or more; distances of fewer images mean nothing",
        )
        require_budgets(self.budgets)
