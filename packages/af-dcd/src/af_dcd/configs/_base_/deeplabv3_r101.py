"""DeepLabV3 on a dilated ResNet-101: the teacher of every pair of the paper."""

_base_ = ["deeplabv3_r18.py"]
model = dict(
    pretrained="open-mmlab://resnet101_v1c",
    backbone=dict(depth=101),
    decode_head=dict(in_channels=2048, channels=256),
    auxiliary_head=dict(in_channels=1024, channels=256),
)
