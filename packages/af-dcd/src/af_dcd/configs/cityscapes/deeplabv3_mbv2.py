_base_ = ["../_base_/deeplabv3_mbv2.py", "../_base_/cityscapes.py", "../_base_/recipe.py"]
model = dict(
    data_preprocessor=dict(size=(512, 1024)),
    decode_head=dict(num_classes=19),
)
