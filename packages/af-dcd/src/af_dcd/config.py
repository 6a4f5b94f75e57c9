"""Settings of the method and of the commands: their defaults, units and checks, once.

What each data set needs of the method is in ``method/presets.py``.
"""

from ast import literal_eval
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from effml_common.device import DEVICE_HELP
from effml_common.errors import ConfigError
from effml_common.parsing import require, setting

Side = Literal["none", "student", "teacher"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """Settings of the method; the defaults are the released code's on Cityscapes.

    Raises:
        ConfigError: If a value is out of range.

    >>> DistillConfig(groups=8, tau=0.5).contrast_settings()["groups"]
    8
    """

    lambda_kd: float = setting(1.0, "weight of logits distillation")
    lambda_fd: float = setting(2e-6, "weight of masked feature mimicking")
    lambda_ctr: float = setting(5e-3, "weight of the contrast")
    temperature: float = setting(1.0, "T of logits distillation")
    fd_reduction: Literal["sum", "mean"] = setting("sum", "how mimicking adds its squared errors")
    mask: Literal["random", "center"] = setting("random", "which positions mimicking zeroes")
    mask_ratio: float = setting(0.75, "share that the random mask zeroes")
    enhanced: bool = setting(False, "two-depth generator")
    hidden: int | None = setting(None, "inner channels of the generator; none: the teacher's")
    contrast: Literal["omni", "spatial", "channel"] = setting("omni", "what is contrasted")
    groups: int = setting(16, "M, channel groups (omni, channel)")
    patch: int | None = setting(4, "side of the patches (omni, spatial); none: the whole map")
    pool: int = setting(4, "max-pooling before the contrast")
    tau: float = setting(0.07, "temperature of the contrast")
    p: int = setting(1, "distance: 1 or 2")
    negatives: Literal["cross_group", "all"] = setting(
        "cross_group", "released code, or the paper's figure (omni, channel)"
    )
    crop_to_fit: bool = setting(False, "drop what patches leave over")
    resize: Literal["none", "student", "teacher"] = setting(
        "none", "side that is resized when feature or score maps differ in size"
    )
    impl: Literal["chunked", "naive"] = setting("chunked", "how the contrast is computed")

    def __post_init__(self) -> None:
        # Each number in its range.
        for name in ("lambda_kd", "lambda_fd", "lambda_ctr"):
            value = getattr(self, name)
            require(0 <= value < float("inf"), f"{name} is {value}", "give 0 or more")
        for name in ("temperature", "tau"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}", "give above 0")
        require(
            0 <= self.mask_ratio < 1,
            f"mask_ratio is {self.mask_ratio}, and 1 would zero everything",
            "give a share in [0, 1)",
        )
        require(self.p in (1, 2), f"p is {self.p}", "give 1 or 2")
        for name in ("groups", "pool", "patch", "hidden"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} is {value}", "give 1 or more")

        # Each word is one of the choices that its annotation names.
        for name, hint in get_type_hints(DistillConfig).items():
            choices, value = get_args(hint), getattr(self, name)
            if choices and isinstance(choices[0], str):
                require(value in choices, f"{name} is {value!r}", f"give {' or '.join(choices)}")

    @property
    def has_branch(self) -> bool:
        """Whether a branch, alignment and generator, is trained beside the student."""
        return self.lambda_fd > 0 or self.lambda_ctr > 0

    def contrast_settings(self) -> dict[str, Any]:
        """Give the arguments of ``omni_contrastive_loss``.

        Spatial and channel contrast are cases of it: one group, and patches of one pixel.
        """
        settings: dict[str, Any] = {
            "groups": self.groups, "patch": self.patch, "pool": self.pool, "tau": self.tau,
            "p": self.p, "negatives": self.negatives, "crop_to_fit": self.crop_to_fit,
            "impl": self.impl,
        }  # fmt: skip
        if self.contrast == "spatial":
            return {**settings, "groups": 1, "negatives": "all"}
        return {**settings, "patch": 1} if self.contrast == "channel" else settings


@dataclass(frozen=True, kw_only=True, slots=True)
class PairConfig:
    """The drawn scenes and the two networks that the demo compares on."""

    teacher_width: int = setting(24, "channels of the teacher's first stage")
    teacher_scenes: int = setting(400, "scenes that the teacher is trained on")
    teacher_steps: int = setting(1500, "updates of the teacher")
    student_width: int = setting(12, "channels of the student's first stage")
    scenes: int = setting(12, "labelled scenes that students are trained on")
    batch: int = setting(4, "crops per update of a student")

    def __post_init__(self) -> None:
        for name in PairConfig.__dataclass_fields__:
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}", "give a positive count")


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig(PairConfig):
    """Distil a small segmenter on drawn scenes and compare with other ways to train it."""

    steps: int = setting(300, "updates of a student")
    seeds: int = setting(1, "seeds of init, crops and masks; claims need 3")
    tests: int = setting(80, "scenes that everything is measured on")
    device: str = setting("auto", DEVICE_HELP)
    out: str | None = setting(None, "folder; default runs/demo-<time>")

    def __post_init__(self) -> None:
        PairConfig.__post_init__(self)
        for name in ("steps", "seeds", "tests"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}", "give a positive count")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Distil a teacher into a student, both given by mmsegmentation configs."""

    student: str | None = setting(None, "config: a file, mmseg::<file> or af-dcd::<file>")
    teacher: str | None = setting(None, "config of the teacher, in the same forms")
    teacher_checkpoint: str | None = setting(None, "weights of the teacher (.pth)")
    student_init: str | None = setting(None, "weights the student starts from (.pth)")
    pretrained: bool = setting(True, "start from the pretrained backbone that the config names")
    preset: str = setting("auto", "weights and settings of a data set; auto: the student's")
    lambda_kd: float | None = setting(None, "weight of logits distillation; none: the preset's")
    lambda_fd: float | None = setting(None, "weight of masked mimicking; none: the preset's")
    lambda_ctr: float | None = setting(None, "weight of the contrast; none: the preset's")
    student_tap: str | None = setting(None, "feat:<i>, pre_cls or module:<path>; none: chosen")
    teacher_tap: str | None = setting(None, "the same, on the teacher")
    method: tuple[str, ...] = setting((), "other settings of the method, as name=value")
    cfg_options: tuple[str, ...] = setting((), "changes of the student's config, as name=value")
    iters: int | None = setting(None, "iterations; the rate's schedule is scaled along")
    amp: Literal["no", "fp16", "bf16"] = setting("no", "mixed precision, on CUDA")
    launcher: Literal["none", "pytorch", "slurm", "mpi"] = setting(
        "none", "pytorch under torchrun; on CPUs it uses gloo"
    )
    device: str = setting("auto", DEVICE_HELP)
    seed: int = setting(0, "seed of the data order, the init and the masks")
    save_every: int = setting(1000, "iterations between checkpoints")
    resume: Literal["never", "auto"] = setting("never", "auto continues in the same --out")
    allow_untrained_teacher: bool = setting(False, "take a teacher without a checkpoint")
    dry_run: bool = setting(False, "one batch of noise through both models, then stop")
    out: str | None = setting(None, "folder; default runs/train-<time>")

    def __post_init__(self) -> None:
        # Each setting by itself.
        require(self.student is not None, "no student is given", "add --student CONFIG")
        require(self.save_every >= 1, f"save_every is {self.save_every}", "give 1 or more")
        require(self.iters is None or self.iters >= 1, f"iters is {self.iters}", "give 1 or more")
        for name in ("lambda_kd", "lambda_fd", "lambda_ctr"):
            value = getattr(self, name)
            require(
                value is None or 0 <= value < float("inf"), f"{name} is {value}", "give 0 or more"
            )

        # Settings that exclude each other.
        require(
            self.launcher == "none" or self.device in ("auto", "cpu", "cuda"),
            f"device {self.device} does not go with launcher {self.launcher}, which gives every "
            "process a device of its own",
            "use auto, cpu or cuda",
        )
        require(
            self.out is not None or self.resume == "never",
            "resume without a folder",
            "name the run's folder with --out",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectConfig:
    """Feature shapes, loss weights, memory and cost of a pair; no data and no weights are needed."""

    student: str | None = setting(None, "config: a file, mmseg::<file> or af-dcd::<file>")
    teacher: str | None = setting(None, "config of the teacher, in the same forms")
    preset: str = setting("auto", "weights and settings of a data set; auto: the student's")
    student_tap: str | None = setting(None, "feat:<i>, pre_cls or module:<path>; none: chosen")
    teacher_tap: str | None = setting(None, "the same, on the teacher")
    method: tuple[str, ...] = setting((), "settings of the method, as name=value")

    def __post_init__(self) -> None:
        require(self.student is not None, "no student is given", "add --student CONFIG")
        require(self.teacher is not None, "no teacher is given", "add --teacher CONFIG")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Measure a checkpoint on the test data of its config."""

    model: str = field(metadata={"help": "config: a file, mmseg::<file> or af-dcd::<file>"})
    checkpoint: str = field(metadata={"help": "weights (.pth)"})
    cfg_options: tuple[str, ...] = setting((), "changes of the config, as name=value")
    device: str = setting("auto", DEVICE_HELP)
    out: str | None = setting(None, "folder; default runs/eval-<time>")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Take the plain student out of a run's checkpoint, for mmseg without this package."""

    run_folder: str = field(metadata={"help": "folder of a train run, also of an unfinished one"})
    to: str = field(metadata={"help": "new .pth file; its config is written beside it"})


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """Time and memory of the contrast, chunked against naive, and of a step's other parts."""

    channels: int = setting(2048, "channels of the teacher's map")
    student_channels: int = setting(512, "channels of the student's map")
    height: int = setting(64, "of the map")
    width: int = setting(128, "of the map")
    batch: int = setting(1, "images")
    preset: str = setting("cityscapes", "settings of the method")
    method: tuple[str, ...] = setting((), "changes of them, as name=value")
    hidden: int | None = setting(None, "inner channels of the generator; none: the teacher's")
    repeats: int = setting(3, "runs of each, in turns")
    device: str = setting("auto", DEVICE_HELP)
    out: str | None = setting(None, "folder; default runs/bench-<time>")

    def __post_init__(self) -> None:
        for name in ("channels", "student_channels", "height", "width", "batch", "repeats"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}", "give 1 or more")


def parse_options(words: tuple[str, ...]) -> dict[str, Any]:
    """Read ``name=value`` words; values are Python literals, true, false, none, or else text.

    Raises:
        ConfigError: If a word has no ``=``.
    """
    constants = {"true": True, "false": False, "none": None}
    settings: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise ConfigError(f"{word!r} is no setting; write name=value")
        try:
            settings[name] = constants[value] if value in constants else literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name] = value
    return settings
