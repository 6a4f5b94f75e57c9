"""COCO-Stuff-164K, labels converted by mmseg's script: 171 classes."""

dataset_type = "COCOStuffDataset"
data_root = "data/coco_stuff164k"
crop_size = (512, 512)
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
        data_prefix=dict(img_path="images/train2017", seg_map_path="annotations/train2017"),
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
        data_prefix=dict(img_path="images/val2017", seg_map_path="annotations/val2017"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator
