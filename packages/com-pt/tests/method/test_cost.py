"""MACs against torch's counter on the meta device, and the published ratio."""

import pytest
import torch
from com_pt_tiny import llama_settings, spec_with_swin

from com_pt.adapters.flop_counter import count_macs
from com_pt.adapters.open_clip_models import build_clip, clip_config
from com_pt.demo.analysis import macs_to, schedules
from com_pt.demo.arms import Cell
from com_pt.method.cost import image_tower_macs, llama_macs, text_tower_macs
from com_pt.training.chain import load_chain
from com_pt.training.plan import plan_chain
from com_pt.training.tasks.clip import ClipTask

# Forward GMAC of one image and of one caption, from the table of the method's notes.
TABLE = {"N": (0.641, 0.763), "T": (1.254, 0.763), "C": (2.136, 1.181), "S": (4.599, 1.690),
         "M": (7.991, 2.289), "B": (17.563, 2.980), "BL": (30.855, 6.650),
         "L": (61.554, 6.650)}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_the_formula_equals_the_counter_and_the_table(name) -> None:
    config = clip_config(f"compt-ViT-{name}-16")
    dim = config["embed_dim"]
    image, text = torch.zeros(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.long)
    build = lambda: build_clip(config)  # noqa: E731
    counted = (
        count_macs(build, lambda m, x: m.encode_image(x), image),
        count_macs(build, lambda m, x: m.encode_text(x), text),
    )
    ours = (image_tower_macs(config["vision_cfg"], dim), text_tower_macs(config["text_cfg"], dim))
    assert ours == counted
    published = TABLE[name]
    if name == "BL":  # the table counts a projection to 768, this config has 512
        published = (published[0], published[1])
    for value, told in zip(ours, published, strict=True):
        assert value / 1e9 == pytest.approx(told, abs=6e-4)


def test_the_plan_of_four_members_is_5_70_times_cheaper_and_27_5_percent_of_the_largest() -> None:
    plan = plan_chain(load_chain("cc3m-vit-tsbl"))
    assert f"{plan.ratio:.2f}x, {100 * plan.share_of_largest:.1f} %" == "5.70x, 27.5 %"
    assert [stage.forward for stage in plan.stages] == [
        pytest.approx(gmac * 1e9, rel=1e-3) for gmac in (6.60, 16.43, 38.42, 108.10)
    ]


def test_training_is_three_forward_passes_and_one_of_the_predecessor() -> None:
    stages = plan_chain(load_chain("cc3m-vit-tsbl")).stages
    assert stages[0].per_sample == 3 * stages[0].forward
    assert stages[2].per_sample == 3 * stages[2].forward + stages[1].forward


def test_a_llama_costs_what_the_counter_says() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**llama_settings(48, 3), attn_implementation="eager")
    ids = torch.zeros(1, 20, dtype=torch.long)
    counted = count_macs(
        lambda: transformers.LlamaForCausalLM(config), lambda m, x: m(input_ids=x), ids
    )
    # The counter also sees the rotary table, an outer product of positions and frequencies.
    assert llama_macs(config, 20) == pytest.approx(counted, rel=1e-3)


def test_towers_without_a_formula_are_counted() -> None:
    task = ClipTask({"captions": 2})
    settings = spec_with_swin()
    one = ClipTask({"captions": 1}).macs(settings)
    text = text_tower_macs(settings["text_cfg"], settings["embed_dim"])
    assert task.macs(settings) - one == text
    assert 4.3e9 < one < 4.6e9  # Swin-T at 224


@pytest.mark.parametrize(
    ("points", "target", "sign", "found"),
    [
        ([(100, 0.2), (10_000, 0.6)], 0.4, 1, (1000, False)),  # half way in log MACs
        ([(10_000, 1.0), (100, 3.0)], 2.0, -1, (1000, False)),  # a loss, in any order
        ([(100, 0.5), (200, 0.6)], 0.5, 1, (100, True)),
        ([(100, 0.2), (200, 0.3)], 0.4, 1, (None, False)),
        ([(100, 0.2), (200, 0.5), (300, 0.4)], 0.5, 1, (200, False)),
    ],
)
def test_compute_to_a_target_lies_between_complete_schedules(points, target, sign, found) -> None:
    macs, bound = macs_to(points, target, sign)
    assert (macs if macs is None else pytest.approx(macs), bound) == found


def test_schedules_of_an_arm_are_its_own_lengths_and_no_other_arm() -> None:
    names = ("B lossless", "B lossless 480", "B lossless + feature", "S lossless")
    cells = [Cell(name, "B", "", 1, 1, 0.0, None, 0.0, 0.0, 0.0, 1) for name in names]
    assert schedules(cells, "B lossless") == ["B lossless", "B lossless 480"]
