"""Every setting of scalekd: its default, its unit and its check, once."""

from dataclasses import dataclass, field
from typing import Literal

from effml_common.device import DEVICE_HELP
from effml_common.parsing import require, setting


@dataclass(frozen=True, kw_only=True)
class ScaleKDConfig:
    """The method: which parts take part, and how strongly.

    None means the released setting of the pair, or the rule that covers the released ones.

    >>> ScaleKDConfig(use_tpp=False, tau=5.0).tau
    5.0
    """

    use_tpp: bool = setting(True, "stage 3 learns through the frozen end of the teacher")
    use_dfm: bool = setting(True, "a second view without each channel's mean")
    w_full: float | None = setting(None, "weight of the full view, a mean over tokens")
    w_ac: float | None = setting(None, "weight of the view without the mean")
    tau: float | None = setting(None, "sharpness of the projectors' attention")
    heads: tuple[int, ...] = setting((), "heads of the stage-3 and stage-4 projectors")
    kd_alpha: float | None = setting(None, "share of the logit term; 0 switches it off")
    kd_t: float = setting(1.0, "temperature of the logit term")
    tail_blocks: int = setting(2, "blocks in the tail of a plain transformer teacher")
    tpp_prefix: Literal["teacher", "none"] = setting(
        "teacher", "class tokens in the tail: the teacher's own for the image, or none"
    )
    stem_norm: Literal["auto", "bn", "ln"] = setting("auto", "norm in the projectors' stems")

    def __post_init__(self) -> None:
        # Factors of the loss, and the sharpness of the attention.
        for name in ("w_full", "w_ac", "tau"):
            value = getattr(self, name)
            require(
                value is None or 0 <= value < float("inf"),
                f"{name} is {value}",
                "give a finite number, 0 or more, or leave it out for the pair's own",
            )
        require(self.tau != 0, "tau is 0", "give a positive number")

        # The logit term.
        require(
            self.kd_alpha is None or 0 <= self.kd_alpha < 1,
            f"kd_alpha is {self.kd_alpha}",
            "give 0 or more and less than 1, such as 0.5",
        )
        require(self.kd_t > 0, f"kd_t is {self.kd_t}", "give a positive number, such as 1")

        # Projectors and tail.
        require(
            len(self.heads) in (0, 2),
            f"{len(self.heads)} head counts were given",
            "give two, for stages 3 and 4",
        )
        require(self.tail_blocks >= 1, f"tail_blocks is {self.tail_blocks}", "give 1 or more")


@dataclass(frozen=True, kw_only=True)
class PairConfig(ScaleKDConfig):
    """A teacher, a student and the method between them."""

    teacher: str = field(metadata={"help": "timm name of the teacher"})
    student: str = field(metadata={"help": "timm name of the student"})
    img_size: int = setting(224, "side of the student's images in pixels")
    num_classes: int = setting(1000, "classes")
    student_args: str = setting("", "JSON of further arguments for timm.create_model")
    teacher_args: str = setting("", "JSON of further arguments for timm.create_model")

    def __post_init__(self) -> None:
        ScaleKDConfig.__post_init__(self)
        require(self.img_size >= 1, f"img_size is {self.img_size}", "give 1 or more, such as 224")
        require(self.num_classes >= 1, f"num_classes is {self.num_classes}", "give 1 or more")


@dataclass(frozen=True, kw_only=True)
class InspectConfig(PairConfig):
    """Show what a pair would be: shapes, tail, projectors, weights, cost. No data, no weights."""

    teacher: str = setting("swin_large_patch4_window7_224", "timm name of the teacher")
    student: str = setting("resnet50", "timm name of the student")
    published: bool = setting(False, "list every pair of the paper beside its projector size")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from: whatever timm's create_dataset reads."""

    data_dir: str = setting("", "folder with train and val sub-folders, or of shards")
    dataset: str = setting("", "empty for folders, or hfds/NAME, wds/NAME, torch/NAME")
    train_split: str = setting("train", "split to train on")
    val_split: str = setting("val", "split to evaluate on")
    workers: int = setting(4, "loading processes")
    skip_bad: bool = setting(False, "leave unreadable images out, counted, instead of stopping")

    def __post_init__(self) -> None:
        require(bool(self.data_dir or self.dataset), "no images are named", "add --data-dir DIR")
        require(self.workers >= 0, f"workers is {self.workers}", "give 0 or more")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(PairConfig, DataConfig):
    """Train a student of timm beside a strong teacher; the result is a plain timm checkpoint.

    Several processes: torchrun --nproc-per-node 8 -m scalekd train ...
    """

    teacher: str = setting("swin_large_patch4_window7_224.ms_in22k_ft_in1k", "timm name")
    student: str = setting("resnet50", "timm name of the student")
    teacher_checkpoint: str | None = setting(None, "weights of the teacher; default timm's own")
    student_checkpoint: str | None = setting(None, "weights that the student starts from")
    pretrained: bool = setting(False, "start the student from timm's weights")
    allow_random_teacher: bool = setting(False, "a teacher without learned weights, for tests")
    teacher_resize: Literal["auto", "none"] = setting(
        "auto", "resize images for a teacher that takes one size only"
    )
    recipe: Literal["traditional", "adv-r50", "adv-vit", "adv-mixer", "mbv1"] = setting(
        "traditional", "optimisation of the paper"
    )
    epochs: int | None = setting(None, "default: the recipe's")
    batch_size: int | None = setting(None, "images per update over all processes; the recipe's")
    lr: float | None = setting(None, "peak learning rate; the recipe's")
    ema: float | None = setting(None, "decay of the averaged weights, 0 for none; the recipe's")
    drop_path: float = setting(0.0, "stochastic depth of the student")
    mixup: float = setting(0.0, "mixup alpha; the paper has none")
    cutmix: float = setting(0.0, "cutmix alpha; the paper has none")
    color_jitter: float = setting(0.0, "strength of colour jitter; the paper has none")
    min_crop: float = setting(0.08, "smallest area of the random crop")
    amp: Literal["none", "bf16", "fp16"] = setting("none", "mixed precision")
    grad_accum: int = setting(1, "batches per update")
    scale_lr: bool = setting(False, "scale lr by batch size over the recipe's")
    sync_bn: bool | None = setting(None, "synchronised batch norm; the recipe's")
    compile: bool = setting(False, "torch.compile student, projectors and tail")
    channels_last: bool = setting(False, "channels-last memory, faster for CNNs on GPUs")
    cache: str | None = setting(None, "folder that scalekd cache wrote, instead of the live trunk")
    device: str = setting("auto", DEVICE_HELP)
    seed: int = setting(0, "seed of the start, the order and the augmentation")
    log_every: int = setting(50, "updates between lines of metrics.jsonl")
    save_every: int = setting(0, "updates between checkpoints; 0: every epoch")
    resume: Literal["never", "auto"] = setting("never", "auto continues the run in --out")
    out: str | None = setting(None, "folder of the result; default runs/train-<time>")

    def __post_init__(self) -> None:
        PairConfig.__post_init__(self)
        DataConfig.__post_init__(self)

        # Optimisation.
        for name in ("epochs", "batch_size", "grad_accum", "log_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} is {value}", "give 1 or more")
        require(self.lr is None or self.lr > 0, f"lr is {self.lr}", "give a positive number")
        require(
            self.ema is None or 0 <= self.ema < 1,
            f"ema is {self.ema}",
            "give 0 or more and less than 1, such as 0.9999",
        )

        # Augmentation. The cache holds the teacher's outputs for images that are not mixed.
        for name in ("mixup", "cutmix"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}", "give 0 or more")
        require(
            0 < self.min_crop <= 1,
            f"min_crop is {self.min_crop}",
            "give more than 0 and at most 1, such as 0.08",
        )
        require(
            not (self.cache and (self.mixup or self.cutmix)),
            "cached teacher outputs do not fit mixed images",
            "drop --cache or --mixup and --cutmix",
        )


@dataclass(frozen=True, kw_only=True)
class EvalConfig(DataConfig):
    """Top-1 and top-5 accuracy of a trained student."""

    checkpoint: str = field(metadata={"help": "out folder of train, or a checkpoint in it"})
    use_ema: bool = setting(True, "the averaged weights where there are some")
    batch_size: int = setting(256, "images per batch")
    device: str = setting("auto", DEVICE_HELP)

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        require(self.batch_size >= 1, f"batch_size is {self.batch_size}", "give 1 or more")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write the student alone, as timm loads it."""

    checkpoint: str = field(metadata={"help": "out folder of train, or a checkpoint in it"})
    out: str = setting("student.safetensors", "file to write")
    use_ema: bool = setting(True, "the averaged weights where there are some")
    verify: bool = setting(False, "load it with timm and compare logits; the gap must be 0")

    def __post_init__(self) -> None:
        require(self.out.endswith(".safetensors"), f"out is {self.out}", "end it in .safetensors")


@dataclass(frozen=True, kw_only=True)
class CacheConfig(TrainConfig):
    """Run the teacher once over K augmented views of a data set and keep what training needs."""

    views: int = setting(4, "augmented views of each image; few views overfit")
    top_k: int = setting(100, "logits kept per image")

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        require(self.views >= 1, f"views is {self.views}", "give 1 or more")
        require(self.top_k >= 1, f"top_k is {self.top_k}", "give 1 or more")
        require(self.cache is None, "--cache belongs to train", "name the folder with --out")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Distil a small Swin into three kinds of students, beside other ways to train them."""

    seeds: int = setting(1, "seeds of data and students; claims need 3")
    labelled: int = setting(400, "labelled images of the students")
    epochs: int = setting(30, "epochs of every student")
    students: tuple[str, ...] = setting(("cnn", "mlp", "vit"), "some of cnn, mlp, vit")
    device: str = setting("auto", DEVICE_HELP)
    out: str | None = setting(None, "folder of the report; default runs/demo-<time>")

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}", "give 1 or more")
        require(self.labelled >= 100, f"labelled is {self.labelled}", "give 100 or more")
        unknown = [name for name in self.students if name not in ("cnn", "mlp", "vit")]
        require(
            bool(self.students) and not unknown,
            f"student {unknown} is not known" if unknown else "no student is named",
            "use some of cnn, mlp, vit",
        )
