"""From two mmseg configs to one that distils, and back to the plain student's."""

import copy
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict

from af_dcd.adapters.mmseg.config_files import read_config
from af_dcd.config import TrainConfig, parse_options
from effml_common.errors import ConfigError, InputError

PRESET_OF_DATASET = {
    "CityscapesDataset": "cityscapes", "PascalVOCDataset": "voc", "CamVidDataset": "camvid",
    "ADE20KDataset": "ade20k", "COCOStuffDataset": "coco_stuff164k",
}  # fmt: skip
SEGMENTORS = ("EncoderDecoder", "CascadeEncoderDecoder")
BRANCH_CLIP = {"max_norm": 15.0}  # of the gradient, as in the paper
AMP_DTYPES = {"fp16": "float16", "bf16": "bfloat16"}
_RUNS = itertools.count()


@dataclass(frozen=True)
class TrainingPlan:
    """What a run is going to do; nothing is written or built yet.

    Attributes:
        config: mmengine's config of the distilling run, as the device needs it.
        student_text: Text of the plain student's config, as mmseg reads it.
        estimate: What the run is going to take, as far as it can be told before the first step.
        device: Where it computes.
    """

    config: Config
    student_text: str
    estimate: str
    device: torch.device


def plan_training(settings: TrainConfig, run_dir: Path, device: torch.device) -> TrainingPlan:
    """Read both configs and join them, for a device.

    Raises:
        InputError: If a config cannot be read, its kind is not served, or the device cannot do it.
    """
    config = build_config(settings, run_dir)
    fit_to_device(config, device)
    name_experiment(config)

    # What mmengine will refuse may still be missing here.
    batch = (config.get("train_dataloader") or {}).get("batch_size", 1)
    iterations = config.train_cfg.get("max_iters")
    estimate = (
        f"{iterations} iterations of {batch} crops; the time left appears beside the progress after "
        "the first of them (af-dcd inspect tells the cost of a step)"
    )
    return TrainingPlan(config, plain_student_config(config).pretty_text, estimate, device)


def build_config(settings: TrainConfig, run_dir: Path) -> Config:
    """Put the teacher, the optimizer wrapper and the loop into the student's config.

    Raises:
        InputError: If a config cannot be read or its kind is not served.
    """
    # Words of the command line first, then the student's config, changed by them.
    changes, method = parse_options(settings.cfg_options), parse_options(settings.method)
    assert settings.student is not None
    config = read_config(settings.student)
    config.merge_from_dict(changes)

    # What distils.
    config.model = _distilling_model(config, settings, method)
    config.custom_imports = {"imports": ["af_dcd.adapters.mmseg"], "allow_failed_imports": False}
    _set_optimizer_wrapper(config, settings)
    _set_loop(config, settings, run_dir)

    # What the command line decides; checkpoints are the loop's.
    config.work_dir = str(run_dir / "mmengine")
    config.launcher = settings.launcher
    config.randomness = {"seed": settings.seed}
    config.load_from, config.resume = None, False
    config.setdefault("default_hooks", ConfigDict())["checkpoint"] = None
    return config


def _distilling_model(config: Config, settings: TrainConfig, method: dict[str, Any]) -> ConfigDict:
    """Describe the distilling model; one that already distils keeps what it says."""
    model = config.model
    if str(model.type).startswith("AfDCD"):
        return model
    if model.type not in SEGMENTORS:
        raise InputError(f"{model.type} is not served; use {' or '.join(SEGMENTORS)}")
    if settings.teacher is None:
        raise ConfigError("no teacher is given; add --teacher CONFIG")

    # Settings of the method: those of the data set, and what the command line changes.
    dataset = str(config.get("dataset_type", ""))
    preset = PRESET_OF_DATASET.get(dataset, "cityscapes")
    preset = preset if settings.preset == "auto" else settings.preset
    distill = {"preset": preset, **method}
    for name in ("lambda_kd", "lambda_fd", "lambda_ctr", "student_tap", "teacher_tap"):
        if getattr(settings, name) is not None:
            distill[name] = getattr(settings, name)

    # The segmenter's own settings come first.
    model = without_downloads(model) if settings.student_init or not settings.pretrained else model
    teacher = {
        "config": settings.teacher,
        "checkpoint": settings.teacher_checkpoint,
        "allow_untrained": settings.allow_untrained_teacher,
    }
    return ConfigDict(
        {**model, "type": f"AfDCD{model.type}", "teacher": teacher, "distill": distill}
    )


def _set_optimizer_wrapper(config: Config, settings: TrainConfig) -> None:
    wrapper = config.get("optim_wrapper")
    if wrapper is None:
        raise InputError("the student's config has no optim_wrapper; give a config to train with")
    kind = str(wrapper.get("type", "OptimWrapper"))
    if kind not in ("OptimWrapper", "AmpOptimWrapper") and not kind.startswith("AfDCD"):
        raise InputError(f"optimizer wrapper {kind} is not served; use OptimWrapper")

    # Mixed precision, if the config or the command line asks for it.
    if settings.amp != "no" or "Amp" in kind:
        wrapper.update(type="AfDCDAmpOptimWrapper")
        if settings.amp != "no":
            wrapper.dtype = AMP_DTYPES[settings.amp]
    else:
        wrapper.update(type="AfDCDOptimWrapper")
    wrapper.setdefault("branch_clip", dict(BRANCH_CLIP))


def _set_loop(config: Config, settings: TrainConfig, run_dir: Path) -> None:
    train = config.get("train_cfg")
    kind = "" if train is None else str(train.get("type", ""))
    if train is None or kind not in ("IterBasedTrainLoop", "AfDCDTrainLoop"):
        raise InputError(
            f"train_cfg of the student is {kind or 'missing'}; give an IterBasedTrainLoop "
            "(--cfg-options train_cfg.type=IterBasedTrainLoop train_cfg.max_iters=40000)"
        )

    # A shorter run still ends at the low rate: schedules are scaled along.
    if settings.iters is not None:
        scale = settings.iters / train.max_iters
        train.max_iters = settings.iters
        for scheduler in config.get("param_scheduler") or []:
            for name in ("begin", "end"):
                if scheduler.get(name) is not None and not scheduler.get("by_epoch", False):
                    scheduler[name] = round(scheduler[name] * scale)

    train.update(
        type="AfDCDTrainLoop",
        run_dir=str(run_dir),
        save_every=settings.save_every,
        resume=settings.resume == "auto",
    )


def fit_to_device(config: Config, device: torch.device) -> None:
    """See that a device can do what a distilling config asks for, and change what it cannot do.

    Raises:
        InputError: If mixed precision or the launcher needs a card.
    """
    # What a CPU cannot do at all.
    if device.type != "cuda":
        if "Amp" in config.optim_wrapper.type:
            raise InputError(f"amp needs a CUDA device, not {device}; leave --amp at no")
        if config.launcher not in ("none", "pytorch"):
            raise InputError(
                f"launcher {config.launcher} needs a CUDA device, not {device}; "
                "use --launcher pytorch"
            )

        # What it does in another way.
        if config.launcher == "pytorch":
            config.model_wrapper_cfg = {"type": "MMDistributedDataParallel", "device_ids": None}
        replace_sync_bn(config.model)


def name_experiment(config: Config) -> None:
    """Give a run a name of its own.

    mmengine names a run by the second and shares loggers and visualizers by that name, so two runs
    begun within a second in one process would write into the first one's folder.
    """
    if "experiment_name" not in config:
        config.experiment_name = f"af-dcd-{os.getpid()}-{next(_RUNS)}"


def plain_student_config(config: Config) -> Config:
    """Copy a distilling config without anything of ours, as plain mmseg reads it."""
    # Model and optimizer as they were.
    plain = Config(config.to_dict())
    plain.model = plain_model(plain.model)
    for name in ("custom_imports", "launcher"):
        plain.pop(name, None)
    wrapper = plain.get("optim_wrapper")
    if wrapper:
        wrapper.pop("branch_clip", None)
        wrapper["type"] = str(wrapper["type"]).removeprefix("AfDCD")

    # mmengine's loop and its checkpoints, without our folders.
    train: Any = plain.get("train_cfg")
    if train:
        for name in ("run_dir", "save_every", "resume"):
            train.pop(name, None)
        train["type"] = "IterBasedTrainLoop"
    plain.default_hooks["checkpoint"] = {"type": "CheckpointHook", "by_epoch": False}
    plain.work_dir = None
    return plain


def plain_model(model: ConfigDict) -> ConfigDict:
    """Copy a segmenter's config without what distilling it added."""
    model = ConfigDict({k: v for k, v in model.items() if k not in ("teacher", "distill")})
    model["type"] = str(model["type"]).removeprefix("AfDCD")
    return model


def without_downloads(model: ConfigDict) -> ConfigDict:
    """Copy a model's config so that it fetches no pretrained weights; a checkpoint will follow."""
    model = copy.deepcopy(model)
    for part in _dicts_in(model):
        for name in ("pretrained", "init_cfg"):
            if part.get(name):
                part[name] = None
    return model


def replace_sync_bn(model: Any) -> None:
    """Turn SyncBN into BN in a config, in place.

    SyncBatchNorm runs on CUDA alone; one process on a CPU has nothing to synchronise.
    """
    for part in _dicts_in(model):
        if part.get("type") == "SyncBN":
            part["type"] = "BN"


def _dicts_in(node: Any) -> list[Any]:
    """List every dict of a config, however deep."""
    if isinstance(node, dict):
        return [node, *(part for value in node.values() for part in _dicts_in(value))]
    if isinstance(node, list | tuple):
        return [part for value in node for part in _dicts_in(value)]
    return []
