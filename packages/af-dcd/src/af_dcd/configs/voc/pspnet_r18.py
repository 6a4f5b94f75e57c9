_base_ = ["../_base_/pspnet_r18.py", "../_base_/voc.py", "../_base_/recipe.py"]
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    decode_head=dict(num_classes=21),
    auxiliary_head=dict(num_classes=21),
)
