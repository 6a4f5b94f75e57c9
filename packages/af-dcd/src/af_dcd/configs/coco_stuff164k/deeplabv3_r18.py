_base_ = ["../_base_/deeplabv3_r18.py", "../_base_/coco_stuff164k.py", "../_base_/recipe.py"]
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    decode_head=dict(num_classes=171),
    auxiliary_head=dict(num_classes=171),
)
train_cfg = dict(max_iters=80000)
param_scheduler = [
    dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=80000, by_epoch=False),
]
