"""The training task of timm: any pair, both normalisations, nothing of the teacher in a checkpoint."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scalekd_tiny import CLASSES, STUDENTS, TEACHERS, Foreign, tiny_teacher
from timm.optim import create_optimizer_v2
from timm.task import TrainingTask
from torch import nn
from torch.nn import functional as F
from two_processes import squared_gradients

from effml_common.errors import ConfigError, InputError
from scalekd import ScaleKDConfig, ScaleKDTask, StudentTap, TeacherSplit
from scalekd.adapters.student_families import default_taps, kind_of

TERMS = {"spat_s3", "ac_s3", "spat_s4", "ac_s4"}
SIZE = (64, 64)  # for CNNs of stride 32; the others take 32
PLAIN = ("mixer", "vit", "swin")


def batch(n: int = 3, side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 3, side, side), torch.randint(CLASSES, (n,))


def make(student: str = "vit", teacher: str = "swin", **options) -> ScaleKDTask:
    side = 32 if student in PLAIN else 64
    return ScaleKDTask(STUDENTS[student](), tiny_teacher(teacher), img_size=(side, side), **options)


@pytest.mark.parametrize("teacher", ["swin", "dinov3", "convnext"])
@pytest.mark.parametrize("student", STUDENTS)
def test_any_student_learns_from_any_teacher(student: str, teacher: str) -> None:
    task = make(student, teacher).train()
    x, y = batch(side=32 if student in PLAIN else 64)
    result = task(x, y)
    result["loss"].backward()
    one_token = teacher == "convnext" and student in PLAIN  # stride 32 on 32 pixels
    terms = {"spat_s3", "spat_s4"} if one_token else TERMS
    assert set(result) == {"loss", "output", "task_loss", "kd_loss"} | terms
    assert [n for n, p in task.trainable_module.named_parameters() if p.grad is None] == []
    assert task.export_student() is task.inner().student
    assert sum(task.shares(result).values()) == pytest.approx(1)


def test_the_loss_is_the_sum_of_its_terms() -> None:
    config = ScaleKDConfig(kd_alpha=0.3, kd_t=2.0, w_full=1.7, w_ac=0.9)
    task = make(config=config)
    x, y = batch()
    result = task(x, y)
    teacher = task.split.model(task.teacher_input(x))
    soft = F.softmax(teacher / 2, -1)
    kd = -4 * (soft * F.log_softmax(result["output"] / 2, -1)).sum(-1).mean()
    expected = 0.7 * F.cross_entropy(result["output"], y) + 0.3 * kd
    expected = expected + 1.7 * (result["spat_s3"] + result["spat_s4"])
    expected = expected + 0.9 * (result["ac_s3"] + result["ac_s4"])
    assert result["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_without_the_logit_term_the_labels_have_their_full_weight() -> None:
    task = make(config=ScaleKDConfig(kd_alpha=0, w_full=0, w_ac=0))
    x, y = batch()
    result = task(x, y)
    assert set(result) == {"loss", "output", "task_loss"}
    assert result["loss"].item() == F.cross_entropy(result["output"], y).item()


def test_a_network_outside_timm_learns_through_named_modules() -> None:
    task = ScaleKDTask(Foreign(), tiny_teacher(), img_size=(32, 32), taps=("stem", "body"))
    x, y = batch()
    result = task(x, y)
    result["loss"].backward()
    assert set(result) >= TERMS
    assert [p for p in task.trainable_module.parameters() if p.grad is None] == []
    model = task.export_student()
    assert torch.equal(model(x), result["output"])
    assert not any(m._forward_hooks for m in model.modules())


def test_taps_are_the_papers() -> None:
    import timm

    with torch.device("meta"):
        models = {
            name: timm.create_model(name)
            for name in (
                "vit_small_patch16_224",
                "mixer_s16_224",
                "eva02_small_patch14_336",
                "resnet50",
            )
        }
    taps = [default_taps(model) for model in models.values()]
    assert taps == [(-4, -1), (-3, -1), (-3, -1), (-2, -1)]
    assert [kind_of(model) for model in models.values()] == ["vit", "mlp", "vit", "cnn"]


@pytest.mark.parametrize(("student", "normed"), [("vit", True), ("swin", True), ("mixer", False)])
def test_the_last_map_is_normed_for_transformers_and_raw_for_mixers(student, normed) -> None:
    model = STUDENTS[student]().eval()
    x, _ = batch()
    _, _, s4 = StudentTap(model)(x)
    _, maps = model.forward_intermediates(x, indices=[-1], norm=True, output_fmt="NCHW")
    assert torch.allclose(s4, maps[0], atol=1e-6) == normed


def test_each_network_gets_images_normalised_for_it() -> None:
    student, teacher = STUDENTS["vit"](), tiny_teacher("vit")
    student.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    teacher.pretrained_cfg = {"mean": (0.48, 0.45, 0.40), "std": (0.26, 0.27, 0.28)}
    task = ScaleKDTask(student, teacher, img_size=(32, 32))
    pixels = torch.rand(2, 3, 32, 32)
    direct = (pixels - torch.tensor((0.48, 0.45, 0.40)).view(3, 1, 1)) / torch.tensor(
        (0.26, 0.27, 0.28)
    ).view(3, 1, 1)
    assert torch.allclose(task.teacher_input((pixels - 0.5) / 0.5), direct, atol=1e-5)


def test_a_teacher_of_one_size_gets_resized_images() -> None:
    task = ScaleKDTask(STUDENTS["resnet"](), tiny_teacher("vit"), img_size=(64, 64))
    x, y = batch(side=64)
    assert task.teacher_input(x).shape[-2:] == (32, 32)
    assert torch.isfinite(task(x, y)["loss"])
    with pytest.raises(
        ConfigError, match=r"the teacher takes 32x32 pixels .* 64x64; use --teacher-resize"
    ):
        ScaleKDTask(
            STUDENTS["resnet"](), tiny_teacher("vit"), img_size=(64, 64), teacher_resize="none"
        )


def test_training_leaves_the_teacher_untouched_even_its_statistics() -> None:
    teacher = TEACHERS["swin"]()  # stochastic depth is on in training mode
    teacher.patch_embed.norm = nn.BatchNorm2d(16)
    teacher.patch_embed.norm.forward = lambda x: nn.BatchNorm2d.forward(
        teacher.patch_embed.norm, x.permute(0, 3, 1, 2)
    ).permute(0, 2, 3, 1)
    task = ScaleKDTask(STUDENTS["vit"](), teacher, img_size=(32, 32))
    before = copy.deepcopy(teacher.state_dict())
    task.train()
    optimizer = create_optimizer_v2(task.trainable_module, "adamw", lr=1e-2)
    x, y = batch()
    seen = []
    for _ in range(2):
        task(x, y)["loss"].backward()
        optimizer.step()
        seen.append(task.teach(x).tokens)
    assert not teacher.training
    assert torch.equal(*seen)
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())


def test_nothing_of_the_teacher_is_in_the_checkpoint() -> None:
    task = make()
    task.setup_ema(decay=0.5)
    state = task.get_checkpoint_state()
    assert set(state["state_dict"]) == set(STUDENTS["vit"]().state_dict())
    assert set(state["task_state"]) == {"projectors"}
    ema = task.get_checkpoint_state(ema=True)
    assert set(ema["state_dict_ema"]) == set(state["state_dict"])
    assert not any("split" in name or "teacher" in name for name, _ in task.named_parameters())


def test_a_checkpoint_of_timm_restores_student_and_projectors() -> None:
    one, two = make(), make()
    assert isinstance(two, TrainingTask)
    state = one.get_checkpoint_state()
    two.load_checkpoint_state(state["state_dict"], state["task_state"])
    x, y = batch()
    assert torch.equal(one.eval()(x, y)["loss"], two.eval()(x, y)["loss"])


def test_the_average_follows_the_weights_it_averages() -> None:
    task = make()
    task.setup_ema(decay=0.75)
    name, p = next(iter(task.inner().student.named_parameters()))
    before = p.detach().clone()
    with torch.no_grad():
        p.add_(1.0)
    task.update_ema()
    average = dict(task.export_student(ema=True).named_parameters())[name]
    assert torch.allclose(average, before + 0.25, atol=1e-6)


def test_positions_and_queries_are_free_of_weight_decay_and_layers_are_known() -> None:
    task = make()
    names = task.inner().no_weight_decay()
    assert {"student.pos_embed", "student.cls_token"} <= names
    assert {"projectors.s3.full.position", "projectors.s3.ac.queries"} <= names
    optimizer = create_optimizer_v2(task.trainable_module, "adamw", lr=1e-2, layer_decay=0.5)
    assert len({group["lr_scale"] for group in optimizer.param_groups}) > 2


@pytest.mark.slow
def test_a_compiled_task_equals_the_plain_one_without_graph_breaks() -> None:
    plain = make("vit", "vit")
    x, y = batch()
    expected = plain(x, y)["loss"]
    plain.compile(backend="aot_eager", fullgraph=True)
    assert plain(x, y)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_non_square_images_keep_rows_and_columns() -> None:
    from timm.models.vision_transformer import VisionTransformer

    def wide(width: int) -> nn.Module:
        return VisionTransformer(
            img_size=(16, 48),
            patch_size=8,
            num_classes=CLASSES,
            embed_dim=width,
            depth=3,
            num_heads=2,
        )

    task = ScaleKDTask(wide(16), wide(24), img_size=(16, 48))
    assert task.plan.shape.student[0][1] == (2, 6)
    assert torch.isfinite(task(torch.randn(2, 3, 16, 48), torch.tensor([0, 1]))["loss"])


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "two_processes.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=240,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    alone = squared_gradients()
    for rank in range(2):
        both = json.loads((tmp_path / f"{rank}.json").read_text())
        assert both == {n: pytest.approx(v, rel=1e-6, abs=1e-18) for n, v in alone.items()}


# Bad input


def test_class_counts_that_differ_are_refused_unless_the_logit_term_is_off() -> None:
    teacher = TEACHERS["swin"]()
    teacher.reset_classifier(7)
    message = (
        "the student has 5 classes and the teacher 7, but the logit term is on; use --kd-alpha 0"
    )
    with pytest.raises(ConfigError, match=message):
        ScaleKDTask(STUDENTS["vit"](), teacher, img_size=(32, 32))
    teacher.reset_classifier(0)
    with pytest.raises(ConfigError, match="5 classes and the teacher 0"):
        ScaleKDTask(
            STUDENTS["vit"](), teacher, img_size=(32, 32), config=ScaleKDConfig(kd_alpha=0.5)
        )
    task = ScaleKDTask(STUDENTS["vit"](), teacher, img_size=(32, 32))
    assert task.plan.kd_alpha == 0
    assert "kd_loss" not in task(*batch())


def test_another_image_size_than_at_the_start_is_refused() -> None:
    task = make("resnet")
    with pytest.raises(
        ValueError, match=r"the student's grid is \(6, 6\) but .* built for \(4, 4\)"
    ):
        task(*batch(side=96))


def test_a_single_token_switches_the_second_view_off(capsys) -> None:
    from timm.models.vision_transformer import VisionTransformer

    teacher = VisionTransformer(
        img_size=32, patch_size=32, num_classes=CLASSES, embed_dim=24, depth=3, num_heads=2
    )
    task = ScaleKDTask(STUDENTS["vit"](), teacher, img_size=(32, 32))
    assert "the ac view would be zero and is switched off" in capsys.readouterr().err
    assert set(task(*batch())) & TERMS == {"spat_s3", "spat_s4"}


def test_students_that_lose_the_grid_are_refused() -> None:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2, patch_drop_rate=0.3
    )
    with pytest.raises(InputError, match="drops or packs patches, which loses the token grid"):
        StudentTap(model)


def test_a_batch_of_one_cannot_train_batch_norms() -> None:
    task = make().train()
    with pytest.raises(
        InputError, match="a batch of 1 cannot train batch norms; use --stem-norm ln"
    ):
        task(*batch(1))
    assert torch.isfinite(make(config=ScaleKDConfig(stem_norm="ln")).train()(*batch(1))["loss"])


def test_unknown_module_names_are_answered_with_those_there_are() -> None:
    with pytest.raises(InputError, match="Foreign has no module layer3; it has stem, body, head"):
        StudentTap(Foreign(), ("layer3", "layer4"))
    with pytest.raises(InputError, match="Foreign has no forward_intermediates; name two modules"):
        StudentTap(Foreign())


def test_a_teacher_with_a_foreign_tail_still_teaches_without_tpp() -> None:
    model = Foreign()
    split = TeacherSplit(model, [model.body], layout="NCHW")
    task = ScaleKDTask(
        STUDENTS["vit"](), split, img_size=(32, 32), config=ScaleKDConfig(use_tpp=False)
    )
    assert set(task(*batch())) & TERMS == {"spat_s4", "ac_s4"}
