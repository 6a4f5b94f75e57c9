"""Cityscapes: 2975 training and 500 validation images, 19 classes."""

dataset_type = "CityscapesDataset"
data_root = "data/cityscapes"
crop_size = (512, 1024)
load = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")]
train_pipeline = [
    *load,
    dict(
        type="RandomChoice",
        transforms=[
            [dict(type="Resize", scale_factor=k / 10, keep_ratio=True)] for k in range(5, 21)
        ],
    ),
    dict(type="RandomCrop", crop_size=crop_size),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [*load, dict(type="PackSegInputs")]
train_dataloader = dict(
    batch_size=8,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix=dict(img_path="leftImg8bit/train", seg_map_path="gtFine/train"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix=dict(img_path="leftImg8bit/val", seg_map_path="gtFine/val"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator
