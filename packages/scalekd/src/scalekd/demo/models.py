"""Networks of the demo, from timm's own classes: a Swin teacher and three small students."""

from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.mlp_mixer import MlpMixer
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from scalekd.demo.data import SIDE

# Mean 0 and deviation 1: the drawn images are normalised already.
PRETRAINED_CFG = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "input_size": (3, SIDE, SIDE)}


class ConvEmbed(PatchEmbed):
    """Patches of 2 by three convolutions: a small Swin on few steps does not learn stripes otherwise."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        channels, width = self.proj.in_channels, self.proj.out_channels
        assert isinstance(channels, int)
        assert isinstance(width, int)
        self.proj = nn.Sequential(  # pyright: ignore[reportAttributeAccessIssue]
            nn.Conv2d(channels, width // 2, 3, padding=1),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )


def build_demo_teacher(width: int, classes: int, seed: int = 0) -> nn.Module:
    """Build an untrained Swin on grids of 8 and 4, ``width`` and twice that wide."""
    torch.manual_seed(seed)
    model = SwinTransformer(
        img_size=SIDE,
        patch_size=2,
        window_size=4,
        embed_dim=width,
        depths=(2, 2),
        num_heads=(max(1, width // 16), max(1, width // 8)),
        num_classes=classes,
        drop_path_rate=0.0,
        embed_layer=ConvEmbed,  # pyright: ignore[reportArgumentType]
    )
    return _with_name(model, f"swin_demo_{width}")


def build_demo_student(kind: str, classes: int, seed: int) -> nn.Module:
    """Build an untrained student: ``cnn`` (grids 8, 4), ``mlp`` or ``vit`` (grid 4 throughout)."""
    torch.manual_seed(seed)
    build = {"cnn": _build_cnn, "mlp": _build_mlp, "vit": _build_vit}[kind]
    return _with_name(build(classes), f"{kind}_demo")


def _build_cnn(classes: int) -> nn.Module:
    blocks = tuple(
        ByoBlockCfg(type="basic", d=1, c=channels, s=stride, gs=0, br=1.0)
        for channels, stride in ((16, 1), (24, 1), (32, 2))
    )
    cfg = ByoModelCfg(blocks=blocks, stem_chs=12, stem_type="3x3", stem_pool="")
    return ByobNet(cfg, num_classes=classes)


def _build_mlp(classes: int) -> nn.Module:
    return MlpMixer(num_classes=classes, img_size=SIDE, patch_size=4, num_blocks=3, embed_dim=32)


def _build_vit(classes: int) -> nn.Module:
    # The paper's vision transformers have no class token either.
    return VisionTransformer(
        img_size=SIDE,
        patch_size=4,
        num_classes=classes,
        embed_dim=32,
        depth=4,
        num_heads=2,
        mlp_ratio=2.0,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
    )


def _with_name(model: nn.Module, name: str) -> nn.Module:
    target: Any = model
    target.pretrained_cfg = {**PRETRAINED_CFG, "architecture": name}
    return model
