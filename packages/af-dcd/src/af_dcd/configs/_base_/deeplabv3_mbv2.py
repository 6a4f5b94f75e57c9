"""DeepLabV3 on a dilated MobileNetV2, without an auxiliary head."""

norm_cfg = dict(type="SyncBN", requires_grad=True)
cross_entropy = dict(type="CrossEntropyLoss", avg_non_ignore=True, loss_weight=1.0)
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
    ),
    pretrained="mmcls://mobilenet_v2",
    backbone=dict(
        type="MobileNetV2",
        widen_factor=1.0,
        strides=(1, 2, 2, 1, 1, 1, 1),
        dilations=(1, 1, 1, 2, 2, 4, 4),
        out_indices=(1, 2, 4, 6),
        norm_cfg=norm_cfg,
    ),
    decode_head=dict(
        type="ASPPHead",
        in_channels=320,
        in_index=3,
        channels=128,
        dilations=(1, 12, 24, 36),
        dropout_ratio=0.1,
        num_classes=19,
        norm_cfg=norm_cfg,
        align_corners=True,
        loss_decode=cross_entropy,
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
