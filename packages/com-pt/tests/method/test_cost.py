"""MACs against torch's counter on the meta device, and the published ratio."""

import pytest
import torch
from com_pt_tiny import llama_settings, spec_with_swin

from com_pt.adapters.flop_counter import count_macs
from com_pt.adapters.open_clip_models import build_clip, clip_config
from com_pt.method.cost import image_tower_macs, llama_macs, text_tower_macs
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
