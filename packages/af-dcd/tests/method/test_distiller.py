"""Af-DCD on pairs that have nothing to do with mmsegmentation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from af_dcd import DistillConfig, Distiller
from effml_common.errors import InputError, NonFiniteError

SMALL = DistillConfig(lambda_fd=1e-3, groups=4, pool=1, patch=2)


class Net(nn.Module):
    def __init__(self, width: int, classes: int = 3, stride: int = 2) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def distiller(**more) -> Distiller:
    torch.manual_seed(0)
    taps = ("module:body", "module:body")
    return Distiller(Net(4), more.pop("teacher", Net(8)), taps, more.pop("config", SMALL))


def step(module: Distiller, images: torch.Tensor, labels: torch.Tensor, optimizer) -> dict:
    found = module(images)
    large = F.interpolate(found.output, labels.shape[1:], mode="bilinear")
    (F.cross_entropy(large, labels) + found.total).backward()
    optimizer.step()
    optimizer.zero_grad()
    return found.losses


def test_a_step_moves_student_and_branch_and_leaves_the_teacher_alone() -> None:
    module = distiller().prepare(torch.randn(2, 3, 16, 16)).train()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    teacher = {k: v.clone() for k, v in module.teacher.state_dict().items()}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = step(module, torch.randn(2, 3, 16, 16), torch.zeros(2, 16, 16).long(), optimizer)
    assert set(losses) == {"loss_kd", "loss_fd", "loss_ctr"}
    after = module.state_dict()
    assert not any("teacher" in k for k in after)
    assert {k.partition(".")[0] for k in after} == {"student", "branch"}
    assert all(not torch.equal(before[k], after[k]) for k in after if k.endswith("weight"))
    assert all(torch.equal(teacher[k], v) for k, v in module.teacher.state_dict().items())
    assert not module.teacher.training
    assert module.student.training


def test_the_student_alone_is_unchanged_by_being_distilled_with_zero_weights() -> None:
    off = DistillConfig(lambda_kd=0, lambda_fd=0, lambda_ctr=0)
    module = distiller(config=off)
    twin = copy.deepcopy(module.student)
    x = torch.randn(2, 3, 16, 16)
    found = module(x)
    assert found.losses == {}
    assert found.total == 0.0
    assert torch.equal(found.output, twin(x))
    assert module.branch is None


def test_preparing_leaves_running_statistics_untouched() -> None:
    module = distiller().train()
    before = module.student.body[1].running_mean.clone()
    module.prepare(torch.randn(2, 3, 16, 16))
    assert torch.equal(module.student.body[1].running_mean, before)
    assert module.student.training


def test_the_teacher_moves_with_the_module() -> None:
    module = distiller().double()
    assert next(module.teacher.parameters()).dtype == torch.float64


def test_a_teacher_with_nan_features_stops_with_its_name() -> None:
    teacher = Net(8)
    nn.init.constant_(teacher.body[0].weight, float("nan"))
    with pytest.raises(
        NonFiniteError, match="teacher's features are not finite; check its weights"
    ):
        distiller(teacher=teacher)(torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (Net(8, stride=1), "tap layers of one stride"),
        (Net(8, classes=5), "3 classes and the teacher 5"),
        (Net(6), "6 channels do not split into 4 groups"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(teacher, message) -> None:
    with pytest.raises(InputError, match=message):
        distiller(teacher=teacher)(torch.randn(2, 3, 16, 16))


def test_taps_of_mmsegmentation_are_refused_here() -> None:
    with pytest.raises(InputError, match="is for mmsegmentation models"):
        Distiller(Net(4), Net(8), ("feat:-1", "module:body"))


def test_a_tapped_module_that_does_not_run_is_named() -> None:
    net = Net(4)
    net.spare = nn.Conv2d(1, 1, 1)
    module = Distiller(net, Net(8), ("module:spare", "module:body"), SMALL)
    with pytest.raises(InputError, match="module spare did not run"):
        module(torch.randn(2, 3, 16, 16))


def test_a_model_without_class_scores_is_refused() -> None:
    module = Distiller(
        nn.Sequential(nn.Flatten()), nn.Sequential(nn.Flatten()), ("module:0", "module:0"), SMALL
    )
    with pytest.raises(InputError, match=r"class scores|tap a module"):
        module(torch.randn(1, 3, 4, 4))


def test_a_torchvision_pair_trains() -> None:
    models = pytest.importorskip("torchvision.models.segmentation")
    torch.manual_seed(0)
    kwargs = {"weights": None, "weights_backbone": None, "num_classes": 4}
    student = models.lraspp_mobilenet_v3_large(**kwargs)
    teacher = models.deeplabv3_mobilenet_v3_large(**kwargs)
    config = DistillConfig(hidden=32, pool=1, patch=2, groups=8, resize="teacher")
    taps = ("module:backbone:high", "module:backbone:out")
    module = Distiller(student, teacher, taps, config).prepare(torch.randn(2, 3, 64, 64)).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    found = module(torch.randn(2, 3, 64, 64))
    F.cross_entropy(found.output["out"], torch.zeros(2, 64, 64).long()).add(found.total).backward()
    optimizer.step()
    assert all(torch.isfinite(v) for v in found.losses.values())
    used = [p for n, p in module.named_parameters() if p.grad is None]
    assert used == []


def test_a_transformers_pair_trains() -> None:
    transformers = pytest.importorskip("transformers")

    def segformer(width: int) -> nn.Module:
        config = transformers.SegformerConfig(
            num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[width, 2 * width],
            patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
            decoder_hidden_size=4 * width, num_labels=4,
        )  # fmt: skip
        return transformers.SegformerForSemanticSegmentation(config)

    torch.manual_seed(0)
    taps = ("module:decode_head.batch_norm", "module:decode_head.batch_norm")
    config = DistillConfig(pool=1, groups=8, patch=4)
    module = Distiller(segformer(8), segformer(16), taps, config)
    images, labels = torch.randn(2, 3, 32, 32), torch.zeros(2, 32, 32).long()
    module.prepare(pixel_values=images)
    found = module(pixel_values=images, labels=labels)
    (found.output.loss + found.total).backward()
    assert set(found.losses) == {"loss_kd", "loss_fd", "loss_ctr"}
    assert module.student.decode_head.linear_fuse.weight.grad.abs().sum() > 0
