"""Tiny mmsegmentation pairs and data sets in real layouts, as files."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

SIDE = 32
RESNET = """dict(type="ResNetV1c", depth=18, base_channels={w}, stem_channels={w}, num_stages=4,
        strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), out_indices=(0, 1, 2, 3),
        norm_cfg=dict(type="BN"), contract_dilation=True)"""
HEAD = """dict(type="{head}", in_channels={c}, in_index={index}, channels=8, num_classes={k},
        norm_cfg=dict(type="BN"), align_corners=False, dropout_ratio=0.1, {more})"""
CONFIG = """
default_scope = "mmseg"
crop_size = ({side}, {side})
dataset_type = "BaseSegDataset"
data_root = {root!r}
metainfo = dict(classes=("a", "b", "c"), palette=[[0, 0, 0], [9, 9, 9], [99, 9, 9]])
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(type="SegDataPreProcessor", mean=[120.0, 110.0, 100.0],
        std=[58.0, 57.0, 56.0], bgr_to_rgb=True, pad_val=0, seg_pad_val=255, size=crop_size),
    backbone={backbone},
    decode_head={head},
    {auxiliary}
    train_cfg=dict(), test_cfg=dict(mode="whole"))
load = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")]
train_pipeline = [*load, dict(type="RandomCrop", crop_size=crop_size),
    dict(type="RandomFlip", prob=0.5), dict(type="PackSegInputs")]
test_pipeline = [*load, dict(type="PackSegInputs")]
common = dict(type=dataset_type, data_root=data_root, metainfo=metainfo,
    data_prefix=dict(img_path="images", seg_map_path="labels"))
train_dataloader = dict(batch_size=2, num_workers=0, sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(**common, pipeline=train_pipeline))
val_dataloader = dict(batch_size=1, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(**common, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator
optim_wrapper = dict(type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.02, momentum=0.9, weight_decay=1e-4))
param_scheduler = [dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=6, by_epoch=False)]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=6, val_interval=6)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
default_hooks = dict(timer=dict(type="IterTimerHook"), logger=dict(type="LoggerHook", interval=2),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=100),
    sampler_seed=dict(type="DistSamplerSeedHook"))
log_processor = dict(by_epoch=False)
env_cfg = dict(dist_cfg=dict(backend="gloo"))
"""


def fcn(width: int, classes: int = 3) -> dict[str, str]:
    """A ResNet-18 at stride 8 with an FCN head; the last stage has 8 * width channels."""
    more = "num_convs=1, concat_input=False"
    head = {"head": "FCNHead", "c": 8 * width, "index": 3, "k": classes, "more": more}
    return {"backbone": RESNET.format(w=width), "head": HEAD.format(**head), "auxiliary": ""}


def write_config(path: Path, root: Path, parts: dict[str, str], side: int = SIDE) -> Path:
    path.write_text(CONFIG.format(root=str(root), side=side, **parts))
    return path


def write_images(
    root: Path, count: int = 6, side: int = 40, classes: int = 3, seed: int = 0
) -> Path:
    """An mmseg-format folder of stripes whose class is their brightness; some pixels are ignored."""
    rng = np.random.default_rng(seed)
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True)
    for i in range(count):
        labels = np.repeat(rng.integers(0, classes, side // 8), 8)[None].repeat(side, 0)
        image = 80 * labels[..., None] + rng.integers(0, 40, (side, side, 3))
        labels[:4] = 255
        Image.fromarray(image.astype(np.uint8)).save(root / "images" / f"{i}.jpg")
        Image.fromarray(labels.astype(np.uint8)).save(root / "labels" / f"{i}.png")
    return root


def save_weights(config: Path, target: Path, seed: int = 0, **meta: object) -> Path:
    """Random weights of a config, as mmengine keeps them."""
    from af_dcd.adapters.mmseg.config_files import read_config
    from af_dcd.adapters.mmseg.shims import build_model

    torch.manual_seed(seed)
    model = build_model(read_config(str(config)).model)
    torch.save({"state_dict": model.state_dict(), "meta": meta}, target)
    return target
