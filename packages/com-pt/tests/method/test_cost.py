"""MACs against torch's counter on the meta device, and the published ratio."""

import pytest
import torch
from com_pt_tiny import llama_settings, spec_with_swin

from com_pt.adapters.flop_counter import count_macs
from com_pt.adapters.open_clip_models import build_clip, clip_config
from com_pt.method.cost import image_tower_macs, llama_macs, text_tower_macs
from com_pt.training.tasks.clip import ClipTask

# Forward GMAC of one image and of one caption, and millions of parameters of both towers, from the
# table of the method's notes.
TABLE = {"N": (0.641, 0.763, 2.95, 22.28), "T": (1.254, 0.763, 5.62, 22.28),
         "C": (2.136, 1.181, 9.86, 30.80), "S": (4.599, 1.690, 21.86, 40.49),
         "M": (7.991, 2.289, 38.59, 51.37), "B": (17.563, 2.980, 86.19, 63.43),
         "BL": (30.855, 6.650, 152.93, 123.65), "L": (61.554, 6.650, 303.83, 123.45)}  # fmt: skip


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
    assert [value / 1e9 for value in ours] == pytest.approx(TABLE[name][:2], abs=6e-4)

    # Parameters tell embeddings of 512 and 768 channels apart.
    with torch.device("meta"):
        model = build()
    image_tower = sum(p.numel() for p in model.visual.parameters())
    text_tower = sum(p.numel() for p in model.parameters()) - image_tower
    assert (image_tower / 1e6, text_tower / 1e6) == pytest.approx(TABLE[name][2:], abs=6e-3)


def test_the_released_bl_costs_77_40_gmac_with_seven_captions() -> None:
    assert ClipTask({"captions": 7}).macs("compt-ViT-BL-16") / 1e9 == pytest.approx(
        77.40, abs=0.005
    )


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
