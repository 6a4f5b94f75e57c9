_base_ = ["../_base_/pspnet_r18.py", "../_base_/camvid.py", "../_base_/recipe.py"]
custom_imports = dict(imports=["af_dcd.adapters.mmseg"], allow_failed_imports=False)
model = dict(
    data_preprocessor=dict(size=(360, 360)),
    decode_head=dict(num_classes=11),
    auxiliary_head=dict(num_classes=11),
)
