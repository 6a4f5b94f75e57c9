"""From two mmseg configs to one that distils."""

from pathlib import Path

from mmengine.config import Config, ConfigDict

from af_dcd.adapters.mmseg.checkpoints import read_config
from af_dcd.adapters.mmseg.teacher import plain, without_downloads
from af_dcd.config import TrainConfig, options
from effml_common.errors import ConfigError, InputError
from effml_common.parsing import one_line

PRESET_OF = {
    "CityscapesDataset": "cityscapes", "PascalVOCDataset": "voc", "CamVidDataset": "camvid",
    "ADE20KDataset": "ade20k", "COCOStuffDataset": "coco_stuff164k",
}  # fmt: skip
SERVED = ("EncoderDecoder", "CascadeEncoderDecoder")


def compose(config: TrainConfig, run_dir: Path) -> Config:
    """The student's config with the teacher, the optimizer wrapper and the loop put in.

    Raises:
        InputError: If a config cannot be read or its kind is not served.
    """
    assert config.student is not None
    whole = read_config(config.student)
    whole.merge_from_dict(options(config.cfg_options))
    whole.model = model_config(whole, config)
    whole.custom_imports = {"imports": ["af_dcd.adapters.mmseg"], "allow_failed_imports": False}
    _optimizer(whole, config)
    _loop(whole, config, run_dir)
    whole.work_dir = str(run_dir / "mmengine")
    whole.launcher = config.launcher
    whole.randomness = {"seed": config.seed}
    whole.load_from, whole.resume = None, False
    hooks = whole.setdefault("default_hooks", ConfigDict())
    hooks["checkpoint"] = None  # the loop saves
    return whole


def model_config(whole: Config, config: TrainConfig) -> ConfigDict:
    """The distilling model; one that already distils keeps what it says."""
    model = whole.model
    if str(model.type).startswith("AfDCD"):
        return model
    if model.type not in SERVED:
        raise InputError(f"{model.type} is not served; use {' or '.join(SERVED)}")
    if config.teacher is None:
        raise ConfigError("no teacher is given; add --teacher CONFIG")
    model = without_downloads(model) if config.student_init or not config.pretrained else model
    distill = {"preset": preset_of(whole, config), **options(config.method)}
    for name in ("lambda_kd", "lambda_fd", "lambda_ctr", "student_tap", "teacher_tap"):
        if getattr(config, name) is not None:
            distill[name] = getattr(config, name)
    teacher = {
        "config": config.teacher,
        "checkpoint": config.teacher_checkpoint,
        "allow_untrained": config.allow_untrained_teacher,
    }
    return ConfigDict(
        {**model, "type": f"AfDCD{model.type}", "teacher": teacher, "distill": distill}
    )


def preset_of(whole: Config, config: TrainConfig) -> str:
    """The named preset, or that of the student's data set; Cityscapes' for others."""
    if config.preset != "auto":
        return config.preset
    return PRESET_OF.get(str(whole.get("dataset_type", "")), "cityscapes")


def student_of(whole: Config) -> Config:
    """A composed config without anything of ours, as plain mmseg reads it."""
    bare = Config(whole.to_dict())
    bare.model = plain(bare.model)
    for name in ("custom_imports", "launcher"):
        bare.pop(name, None)
    wrapper = bare.get("optim_wrapper")
    if wrapper:
        wrapper.pop("branch_clip", None)
        wrapper["type"] = str(wrapper["type"]).removeprefix("AfDCD")
    train = bare.get("train_cfg")
    if train:
        for name in ("run_dir", "save_every", "resume"):
            train.pop(name, None)
        train["type"] = "IterBasedTrainLoop"
    bare.default_hooks["checkpoint"] = {"type": "CheckpointHook", "by_epoch": False}
    bare.work_dir = None
    return bare


def _optimizer(whole: Config, config: TrainConfig) -> None:
    wrapper = whole.get("optim_wrapper")
    if wrapper is None:
        raise InputError("the student's config has no optim_wrapper; give a config to train with")
    kind = str(wrapper.get("type", "OptimWrapper"))
    if kind not in ("OptimWrapper", "AmpOptimWrapper") and not kind.startswith("AfDCD"):
        raise InputError(f"optimizer wrapper {kind} is not served; use OptimWrapper")
    if config.amp != "no" or "Amp" in kind:
        wrapper.update(type="AfDCDAmpOptimWrapper")
        if config.amp != "no":
            wrapper.dtype = {"fp16": "float16", "bf16": "bfloat16"}[config.amp]
    else:
        wrapper.update(type="AfDCDOptimWrapper")
    wrapper.setdefault("branch_clip", {"max_norm": 15.0})


def _loop(whole: Config, config: TrainConfig, run_dir: Path) -> None:
    train = whole.get("train_cfg")
    kind = "" if train is None else str(train.get("type", ""))
    if train is None or not (kind == "IterBasedTrainLoop" or kind == "AfDCDTrainLoop"):
        raise InputError(
            f"train_cfg of the student is {kind or 'missing'}; give an IterBasedTrainLoop "
            "(--cfg-options train_cfg.type=IterBasedTrainLoop train_cfg.max_iters=40000)"
        )
    if config.iters is not None:
        scale = config.iters / train.max_iters
        train.max_iters = config.iters
        for each in whole.get("param_scheduler") or []:  # a shorter run still ends at the low rate
            for name in ("begin", "end"):
                if each.get(name) is not None and not each.get("by_epoch", False):
                    each[name] = round(each[name] * scale)
    train.update(
        type="AfDCDTrainLoop",
        run_dir=str(run_dir),
        save_every=config.save_every,
        resume=config.resume == "auto",
    )


def one_error_line(error: Exception) -> InputError:
    """What mmengine says about a config or data set that it cannot build, in one line."""
    return InputError(f"mmseg refuses this: {one_line(str(error))[:400]}; see the config")
