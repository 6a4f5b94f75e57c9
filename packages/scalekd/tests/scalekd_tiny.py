"""Small teachers and students, each of timm's own class."""

from collections.abc import Callable

import torch
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.mlp_mixer import MlpMixer
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

CLASSES = 5
PLAIN = {"img_size": 32, "patch_size": 8, "num_classes": CLASSES, "embed_dim": 24, "num_heads": 2}
HIER = {"img_size": 32, "patch_size": 2, "num_classes": CLASSES, "window_size": 4}


def _eva(**options) -> Eva:
    return Eva(**PLAIN, depth=3, use_rot_pos_emb=True, **options)


def make_distilled() -> VisionTransformerDistilled:
    return VisionTransformerDistilled(**PLAIN, depth=3)


TEACHERS: dict[str, Callable[[], nn.Module]] = {
    "swin": lambda: SwinTransformer(**HIER, embed_dim=16, depths=(2, 2), num_heads=(1, 2)),
    "swinv2": lambda: SwinTransformerV2(**HIER, embed_dim=16, depths=(2, 2), num_heads=(1, 2)),
    "vit": lambda: VisionTransformer(**PLAIN, depth=3),
    "clip-vit": lambda: VisionTransformer(**PLAIN, depth=3, pre_norm=True, final_norm=True),
    "siglip": lambda: VisionTransformer(**PLAIN, depth=3, class_token=False, global_pool="map"),
    "deit-distilled": make_distilled,
    "deit3": lambda: VisionTransformer(**PLAIN, depth=3, no_embed_class=True, init_values=1e-2),
    "beit": lambda: Beit(**PLAIN, depth=3, use_abs_pos_emb=False, use_rel_pos_bias=True),
    "beit-shared-bias": lambda: Beit(**PLAIN, depth=3, use_shared_rel_pos_bias=True),
    "eva": lambda: VisionTransformer(**PLAIN, depth=3, global_pool="avg", fc_norm=True),
    "eva02": lambda: _eva(swiglu_mlp=True, scale_mlp=True, qkv_fused=False),
    "dinov3": lambda: _eva(
        num_reg_tokens=4, rope_type="dinov3", use_abs_pos_emb=False, init_values=1e-2
    ),
    "rope-mixed": lambda: _eva(rope_type="mixed"),
    "convnext": lambda: ConvNeXt(
        num_classes=CLASSES, patch_size=2, depths=(1, 1, 1, 2), dims=(8, 8, 16, 24)
    ),
}


def convnext_student() -> ConvNeXt:
    return ConvNeXt(num_classes=CLASSES, patch_size=2, depths=(1, 1, 1, 1), dims=(8, 8, 12, 16))


def _named(name: str, **options) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=CLASSES, **options)


STUDENTS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: ResNet(
        BasicBlock, (1, 1, 1, 1), num_classes=CLASSES, channels=(8, 8, 12, 16)
    ),
    "mobilenetv1": lambda: _named("mobilenetv1_100"),
    "convnext": convnext_student,
    "mixer": lambda: MlpMixer(
        num_classes=CLASSES, img_size=32, patch_size=8, num_blocks=3, embed_dim=16
    ),
    "vit": lambda: VisionTransformer(
        img_size=32, patch_size=8, num_classes=CLASSES, embed_dim=16, depth=4, num_heads=2
    ),
    "swin": lambda: SwinTransformer(**HIER, embed_dim=8, depths=(1, 1), num_heads=(1, 1)),
    "efficientnet": lambda: _named("test_efficientnet"),
}


def tiny_teacher(name: str = "swin") -> nn.Module:
    torch.manual_seed(1)
    return TEACHERS[name]().eval()


class Foreign(nn.Module):
    """A network that knows nothing of timm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))
