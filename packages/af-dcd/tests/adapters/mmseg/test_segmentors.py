# ruff: noqa: E501 -- one case a line
"""Pairs of mmsegmentation models build, distil a step and predict, at small width."""

import copy

import pytest
import torch

pytest.importorskip("mmseg")

from mmengine.config import ConfigDict
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from af_dcd.adapters.mmseg.shims import build_model
from effml_common.errors import InputError

BN = {"type": "BN"}
PREPROCESSOR = {
    "type": "SegDataPreProcessor", "mean": [120.0, 110.0, 100.0], "std": [58.0, 57.0, 56.0],
    "bgr_to_rgb": True, "pad_val": 0, "seg_pad_val": 255, "size": (64, 64),
}  # fmt: skip
SETTINGS = {"groups": 4, "pool": 1, "patch": 2}


def resnet(depth: int, width: int) -> dict:
    return {
        "type": "ResNetV1c", "depth": depth, "base_channels": width, "stem_channels": width,
        "strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4), "norm_cfg": BN,
        "contract_dilation": True,
    }  # fmt: skip


def mobilenet() -> dict:
    return {
        "type": "MobileNetV2", "widen_factor": 0.1, "strides": (1, 2, 2, 1, 1, 1, 1),
        "dilations": (1, 1, 1, 2, 2, 4, 4), "out_indices": (1, 2, 4, 6), "norm_cfg": BN,
    }  # fmt: skip


def model(backbone: dict, kind: str, channels, **more) -> ConfigDict:
    head = {"type": kind, "in_channels": channels, "channels": 8, "num_classes": 4, "norm_cfg": BN}
    head |= {"in_index": 3, "dropout_ratio": 0.1, "align_corners": False, **more}
    return ConfigDict(
        {
            "type": "EncoderDecoder", "data_preprocessor": dict(PREPROCESSOR),
            "backbone": backbone, "decode_head": head, "train_cfg": {}, "test_cfg": {"mode": "whole"},
        }
    )  # fmt: skip


def deeplab(backbone: dict, channels: int) -> ConfigDict:
    return model(backbone, "ASPPHead", channels, dilations=(1, 3, 6, 9))


def segformer(width: int) -> ConfigDict:
    backbone = {
        "type": "MixVisionTransformer", "embed_dims": width, "num_layers": [1, 1, 1, 1],
        "num_heads": [1, 2, 2, 2], "drop_path_rate": 0.1,
    }  # fmt: skip
    widths = [width, 2 * width, 2 * width, 2 * width]
    return model(backbone, "SegformerHead", widths, in_index=[0, 1, 2, 3])


def hrnet(width: int) -> ConfigDict:
    def stage(branches: int) -> dict:
        return {
            "num_modules": 1, "num_branches": branches, "block": "BASIC",
            "num_blocks": (1,) * branches, "num_channels": tuple(width * 2**i for i in range(branches)),
        }  # fmt: skip

    first = {"num_modules": 1, "num_branches": 1, "block": "BOTTLENECK", "num_blocks": (1,)}
    extra = {"stage1": {**first, "num_channels": (8,)}}
    extra |= {f"stage{n}": stage(n) for n in (2, 3, 4)}
    backbone = {"type": "HRNet", "norm_cfg": BN, "extra": extra}
    widths = [width * 2**i for i in range(4)]
    more = {"in_index": (0, 1, 2, 3), "input_transform": "resize_concat", "kernel_size": 1}
    return model(backbone, "FCNHead", widths, num_convs=1, concat_input=False, **more)


def cascade(width: int) -> ConfigDict:
    plain = model(resnet(18, width), "FCNHead", 8 * width, num_convs=1, concat_input=False)
    first = plain.decode_head
    second = {**first, "type": "OCRHead", "ocr_channels": 8}
    for name in ("num_convs", "concat_input"):
        second.pop(name)
    plain.update(type="CascadeEncoderDecoder", num_stages=2, decode_head=[first, second])
    return plain


def distilling(student: ConfigDict, teacher: ConfigDict, **settings):
    spec = {"config": {"model": teacher}, "allow_untrained": True}
    whole = {**student, "type": f"AfDCD{student.type}", "teacher": spec}
    return build_model(ConfigDict({**whole, "distill": {**SETTINGS, **settings}}))


def samples(labels: torch.Tensor) -> list[SegDataSample]:
    found = []
    for each in labels:
        sample = SegDataSample(gt_sem_seg=PixelData(data=each[None]))
        sample.set_metainfo({"img_shape": each.shape, "ori_shape": each.shape})
        found.append(sample)
    return found


def batch(seed: int = 0) -> tuple[torch.Tensor, list[SegDataSample]]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (2, 64, 64), generator=g)
    labels[:, :8] = 255
    return torch.randn((2, 3, 64, 64), generator=g), samples(labels)


PAIRS = {
    "DeepLabV3-R101 to R18": (deeplab(resnet(18, 4), 32), deeplab(resnet(101, 4), 128), "feat:-1", {}),
    "DeepLabV3-R101 to MobileNetV2": (deeplab(mobilenet(), 32), deeplab(resnet(101, 4), 128), "feat:-1", {}),
    "DeepLabV3-R101 to PSPNet-R18": (
        model(resnet(18, 4), "PSPHead", 32, pool_scales=(1, 2)), deeplab(resnet(101, 4), 128), "feat:-1", {},
    ),
    "SegFormer to SegFormer": (segformer(8), segformer(16), "pre_cls", {}),
    "HRNet to HRNet": (hrnet(4), hrnet(8), "pre_cls", {}),
    "DeepLabV3 to SegFormer": (segformer(8), deeplab(resnet(18, 4), 32), "pre_cls", {"resize": "teacher"}),
    "OCR cascade to OCR cascade": (cascade(4), cascade(8), "feat:-1", {}),
}  # fmt: skip
# One of each kind of student; the others are slow tests.
FIRST = ("DeepLabV3-R101 to R18", "SegFormer to SegFormer", "OCR cascade to OCR cascade")


@pytest.mark.parametrize(
    "name",
    [pytest.param(pair, marks=[] if pair in FIRST else [pytest.mark.slow]) for pair in PAIRS],
)
def test_a_pair_builds_distils_a_step_and_predicts(name) -> None:
    student, teacher, tap, settings = PAIRS[name]
    torch.manual_seed(0)
    pair = distilling(student, teacher, **settings).train()
    assert pair.taps[0].kind == tap.partition(":")[0]
    assert not pair.teacher.model.training
    before = {k: v.clone() for k, v in pair.teacher.model.state_dict().items()}
    inputs, data = batch()
    losses = pair.loss(inputs, data)
    assert {"loss_kd", "loss_fd", "loss_ctr"} <= set(losses)
    total, _ = pair.parse_losses(losses)
    total.backward()
    for name_, p in pair.named_parameters():
        assert p.grad is not None, name_
    assert all(torch.equal(before[k], v) for k, v in pair.teacher.model.state_dict().items())
    found = pair.eval().predict(inputs, data)
    assert found[0].pred_sem_seg.data.shape == (1, 64, 64)
    assert "extract_feat" not in pair.__dict__  # the wrapping is gone


def test_the_task_loss_is_exactly_that_of_the_plain_model() -> None:
    student, teacher, _, _ = PAIRS["DeepLabV3-R101 to R18"]
    pair, plain = distilling(student, teacher).train(), build_model(student).train()
    plain.load_state_dict({k: v for k, v in pair.state_dict().items() if not k.startswith("afdcd")})
    inputs, data = batch()
    torch.manual_seed(3)
    ours = pair.loss(inputs, data)
    torch.manual_seed(3)
    theirs = plain.loss(inputs, data)
    assert torch.equal(ours["decode.loss_ce"], theirs["decode.loss_ce"])


def test_the_tapped_features_are_those_of_the_backbone_and_before_the_classifier() -> None:
    from af_dcd.adapters.mmseg.feature_recorder import record_features, run_heads
    from af_dcd.method.taps import Tap

    net = build_model(PAIRS["HRNet to HRNet"][0]).eval()
    x = batch()[0]
    with torch.no_grad(), record_features(net, Tap.parse("pre_cls")) as seen:
        scores = run_heads(net, x)
    assert torch.equal(scores, seen.scores())
    with torch.no_grad():
        torch.testing.assert_close(net.decode_head.conv_seg(seen.feature()), scores)
        with record_features(net, Tap.parse("feat:1")) as seen:
            run_heads(net, x)
        assert torch.equal(seen.feature(), net.extract_feat(x)[1])
        with record_features(net, Tap.parse("module:backbone.conv2")) as seen:
            run_heads(net, x)
        assert seen.feature().shape == (2, 64, 16, 16)


def test_images_are_handed_to_the_teacher_as_its_own_preprocessor_would(capsys) -> None:
    student, teacher, _, _ = PAIRS["SegFormer to SegFormer"]
    teacher = copy.deepcopy(teacher)
    teacher.data_preprocessor.update(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], bgr_to_rgb=False)
    pair = distilling(student, teacher)
    raw = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    data = {"inputs": [raw], "data_samples": batch()[1][:1]}
    ours = pair.data_preprocessor(dict(data), True)["inputs"]
    theirs = pair.teacher.model.data_preprocessor(dict(data), True)["inputs"]
    torch.testing.assert_close(
        pair.teacher._convert_images(ours, pair), theirs, atol=1e-4, rtol=1e-4
    )
    pair.teacher._convert_images(ours, pair)
    assert capsys.readouterr().err.count("normalise images differently") == 1


def test_a_copy_for_ema_shares_the_teacher_and_the_teacher_moves_along() -> None:
    student, teacher, _, _ = PAIRS["SegFormer to SegFormer"]
    pair = distilling(student, teacher)
    assert copy.deepcopy(pair).teacher is pair.teacher
    pair.double()
    assert next(pair.teacher.model.parameters()).dtype == torch.float64
    assert not any("teacher" in name for name in pair.state_dict())


def test_layer_decay_sees_the_students_own_names() -> None:
    from mmseg.engine import LearningRateDecayOptimizerConstructor as Constructor

    backbone = {
        "type": "BEiT", "img_size": (64, 64), "patch_size": 16, "embed_dims": 16, "num_layers": 4,
        "num_heads": 2, "mlp_ratio": 2, "out_indices": (0, 1, 2, 3), "qv_bias": True,
        "init_values": 0.1,
    }  # fmt: skip
    student = model(backbone, "FCNHead", 16, num_convs=1, concat_input=False)
    pair = distilling(student, student, patch=1, student_tap="feat:-1", teacher_tap="feat:-1")
    groups: list[dict] = []
    rule = {"decay_rate": 0.5, "decay_type": "layer_wise", "num_layers": 4}
    wrapper = {"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 1.0}}
    Constructor(wrapper, paramwise_cfg=rule).add_params(groups, pair)
    rates = {n: g["lr_scale"] for g in groups for n in g["param_names"]}
    first = [v for k, v in rates.items() if k.startswith("backbone.patch_embed")]
    last = [v for k, v in rates.items() if k.startswith("backbone.layers.3")]
    assert max(first) < min(last) < 1
    assert all(v == 1 for k, v in rates.items() if k.startswith("afdcd"))


def test_a_batch_of_ignored_pixels_gives_no_nan() -> None:
    student, teacher, _, _ = PAIRS["DeepLabV3-R101 to R18"]
    for averaged in (False, True):
        student = copy.deepcopy(student)
        student.decode_head.loss_decode = {"type": "CrossEntropyLoss", "avg_non_ignore": averaged}
        pair = distilling(student, teacher).train()
        data = samples(torch.full((2, 64, 64), 255))
        losses = pair.loss(batch()[0], data)
        assert losses["decode.loss_ce"].item() == 0
        total, _ = pair.parse_losses(losses)
        total.backward()


@pytest.mark.parametrize(
    ("student", "teacher", "settings", "message"),
    [
        (deeplab(resnet(18, 4), 32), deeplab(resnet(18, 3), 24), {"groups": 16}, "24 channels do not split"),
        (deeplab(resnet(18, 4), 32), segformer(8), {}, "the student's feature map is 8x8 .* 16x16 at crops of 64x64"),
        (deeplab(resnet(18, 4), 32), deeplab(resnet(18, 4), 32), {"patch": 5}, "5x5 patches do not divide"),
        (deeplab(resnet(18, 4), 32), deeplab(resnet(18, 4), 32), {"student_tap": "feat:7"}, "no entry 7; it has 0 to 3"),
        (deeplab(resnet(18, 4), 32), deeplab(resnet(18, 4), 32), {"teacher_tap": "module:bakbone.layer4"}, "no module 'bakbone.layer4'; try backbone"),
        (deeplab(resnet(18, 4), 32), deeplab(resnet(18, 4), 32), {"preset": "mars"}, "no preset 'mars'; use one of"),
        (deeplab(resnet(18, 4), 32), deeplab(resnet(18, 4), 32), {"grops": 4}, "did you mean groups"),
        (deeplab(resnet(18, 4), 32), deeplab(resnet(18, 4), 32), {"tau": 0.0}, "tau is 0.0"),
    ],
)  # fmt: skip
def test_pairs_and_settings_that_do_not_fit_are_refused(
    student, teacher, settings, message
) -> None:
    with pytest.raises(InputError, match=message):
        distilling(student, teacher, **settings)


def test_class_counts_that_differ_need_kd_off() -> None:
    student, teacher, _, _ = PAIRS["DeepLabV3-R101 to R18"]
    teacher = copy.deepcopy(teacher)
    teacher.decode_head.num_classes = 7
    with pytest.raises(InputError, match=r"student has 4 classes and the teacher 7; .*lambda_kd=0"):
        distilling(student, teacher)
    losses = distilling(student, teacher, lambda_kd=0.0).train().loss(*batch())
    assert "loss_kd" not in losses
    assert "loss_fd" in losses


def test_heads_of_mask_classification_are_refused() -> None:
    from af_dcd.adapters.mmseg.feature_recorder import last_head

    net = torch.nn.Module()
    net.decode_head = torch.nn.Identity()
    with pytest.raises(InputError, match=r"Identity does not classify pixels .*Mask2Former"):
        last_head(net)


def test_labels_out_of_range_name_the_file() -> None:
    student, teacher, _, _ = PAIRS["DeepLabV3-R101 to R18"]
    pair = distilling(student, teacher).train()
    inputs, data = batch()
    data[1].gt_sem_seg.data[0, 0, 0] = 9
    data[1].set_metainfo({"seg_map_path": "labels/b.png"})
    with pytest.raises(
        InputError, match=r"labels/b.png has label 9, and the model 4 classes; use labels 0 to 3"
    ):
        pair.loss(inputs, data)


def test_a_dominating_contrast_is_warned_about_once(capsys) -> None:
    student, teacher, _, _ = PAIRS["DeepLabV3-R101 to R18"]
    pair = distilling(student, teacher, lambda_ctr=10.0).train()
    for _ in range(2):
        pair.parse_losses(pair.loss(*batch()))
    assert capsys.readouterr().err.count("lower lambda_ctr") == 1
    calm = distilling(student, teacher, lambda_ctr=1e-6).train()
    calm.parse_losses(calm.loss(*batch()))
    assert "lambda_ctr" not in capsys.readouterr().err
