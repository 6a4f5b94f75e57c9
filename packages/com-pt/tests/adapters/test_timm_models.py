"""Folders of timm: what timm makes of them is what training used."""

import pytest
import timm
import torch
from com_pt_tiny import vit
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from com_pt.adapters.grow import grow
from com_pt.adapters.timm_models import load_timm, save_timm
from com_pt.training.data.captions import image_transform


def spec(size: object, width: int = 32) -> dict:
    return {"name": "vit_tiny_patch16_224", "img_size": size, "patch_size": 4, "embed_dim": width,
            "depth": 2, "num_heads": width // 16}  # fmt: skip


@pytest.mark.parametrize("size", [16, (8, 16)])
def test_timm_prepares_images_of_a_member_as_our_validation_does(size, tmp_path) -> None:
    model = timm.create_model(**{"model_name": "vit_tiny_patch16_224", "num_classes": 5, **{
        k: v for k, v in spec(size).items() if k != "name"}})  # fmt: skip
    save_timm(model, spec(size), 5, tmp_path / "member")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'member'}", pretrained=True)
    theirs = create_transform(**resolve_model_data_config(loaded))
    ours = image_transform(size, None)
    picture = Image.effect_noise((37, 23), 80).convert("RGB")
    torch.testing.assert_close(theirs(picture), ours(picture), atol=1e-6, rtol=0)  # pyright: ignore


def test_an_eps_that_timm_does_not_keep_is_warned_about(tmp_path, capsys) -> None:
    small, large = vit(32), vit(48)
    grow(small, large, "lossless")
    save_timm(large, spec(16, 48), 5, tmp_path / "grown")
    assert "eps of blocks.0.norm1 is 6.67e-07 and will be 1e-06" in capsys.readouterr().err
    assert load_timm(tmp_path / "grown").blocks[0].norm1.eps == 1e-6  # pyright: ignore
    save_timm(vit(48), spec(16, 48), 5, tmp_path / "plain")
    assert "eps" not in capsys.readouterr().err
