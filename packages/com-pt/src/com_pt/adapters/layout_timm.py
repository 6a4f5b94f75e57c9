"""Layouts of timm's vision transformers and Swin transformers."""

from typing import Any

from torch import nn

from com_pt.errors import GrowthError, LayoutError
from com_pt.method.layout import Layout, Tower, rules

BLOCK = {
    "attn.qkv.weight": "QKV <WIDTH",
    "attn.qkv.bias": "QKV",
    "attn.proj.weight": "+WIDTH <HEAD",
    "attn.proj.bias": "+WIDTH",
    "mlp.fc1.weight": "MLP <WIDTH",
    "mlp.fc1.bias": "MLP",
    "mlp.fc2.weight": "+WIDTH <MLP",
    "mlp.fc2.bias": "+WIDTH",
}
NORMS = {"norm[12].weight": "WIDTH", "norm[12].bias": "WIDTH"}
HEAD_NORMS = {"attn.[qk]_norm.weight": "FIXED", "attn.[qk]_norm.bias": "FIXED"}
OUTER_NORM = {"(norm|fc_norm|norm_pre).weight": "WIDTH", "(norm|fc_norm|norm_pre).bias": "WIDTH"}
STEM = {
    "patch_embed.proj.weight": "+WIDTH FIXED FIXED FIXED",
    "patch_embed.proj.bias": "+WIDTH",
}


def is_timm(model: nn.Module) -> bool:
    """Whether this is a model of timm."""
    return type(model).__module__.startswith("timm.")


def timm_layout(model: Any) -> Layout:
    """Describe a timm ``VisionTransformer`` or ``SwinTransformer``.

    Raises:
        LayoutError: If the class is another.
    """
    kind = type(model).__name__
    if kind == "VisionTransformer":
        return _describe_vit(model)
    if kind == "SwinTransformer":
        return _describe_swin(model)
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise GrowthError(f"{kind} has BatchNorm and cannot be grown; use a transformer of timm")
    raise LayoutError(f"timm's {kind} has no layout yet; register one with register_layout")


def _describe_vit(model: Any) -> Layout:
    # Sizes and kind of the one tower.
    block = model.blocks[0]
    heads = block.attn.num_heads
    width = model.embed_dim
    tower = Tower(
        width=width,
        heads=heads,
        head_dim=width // heads,
        early_norm=not isinstance(model.norm_pre, nn.Identity),
        post_norm=type(block).__name__ == "ResPostBlock",
        eps=block.norm1.eps,
    )

    # Roles of the axes of every parameter.
    table = (
        *rules(
            {
                **STEM,
                "(cls_token|reg_token|dist_token)": "FIXED FIXED +WIDTH",
                "pos_embed": "FIXED POS +WIDTH",
                "head.weight": "CLASS <WIDTH",
                "head.bias": "CLASS",
                **_in_blocks(BLOCK),
                **_in_blocks(HEAD_NORMS),
            }
        ),
        *rules({**OUTER_NORM, **_in_blocks(NORMS)}, kind="norm"),
        *rules(_in_blocks({"ls[12].gamma": "WIDTH"}), kind="scale"),
    )
    return Layout("timm ViT", table, {"": tower}, _fixed_facts(model, pooling=model.global_pool))


def _describe_swin(model: Any) -> Layout:
    # Sizes of the first stage; the others are multiples of it.
    attention = model.layers[0].blocks[0].attn
    width = model.embed_dim
    tower = Tower(
        width=width,
        heads=attention.num_heads,
        head_dim=width // attention.num_heads,
        early_norm=True,
        eps=model.layers[0].blocks[0].norm1.eps,
    )

    # Roles of the axes of every parameter; merging reads four neighbours of WIDTH each.
    stages = "layers.[0-9]+.blocks.N."
    table = (
        *rules(
            {
                **STEM,
                "layers.[0-9]+.downsample.reduction.weight": "+WIDTH <CAT4",
                "head.fc.weight": "CLASS <WIDTH",
                "head.fc.bias": "CLASS",
                f"{stages}attn.relative_position_bias_table": "FIXED HEADS",
                **{stages + name: roles for name, roles in BLOCK.items()},
            }
        ),
        *rules(
            {
                "patch_embed.norm.weight": "WIDTH",
                "patch_embed.norm.bias": "WIDTH",
                "layers.[0-9]+.downsample.norm.weight": "CAT4",
                "layers.[0-9]+.downsample.norm.bias": "CAT4",
                **OUTER_NORM,
                **{stages + name: roles for name, roles in NORMS.items()},
            },
            kind="norm",
        ),
    )

    # The attention window stays the same too.
    window = {"window": tuple(attention.window_size), "stages": len(model.layers)}
    return Layout("timm Swin", table, {"": tower}, {**_fixed_facts(model), **window})


def _in_blocks(table: dict[str, str]) -> dict[str, str]:
    return {f"blocks.N.{name}": roles for name, roles in table.items()}


def _fixed_facts(model: Any, **more: Any) -> dict[str, Any]:
    stem = model.patch_embed
    return {
        "patch size": tuple(stem.patch_size),
        "image size": tuple(stem.img_size),
        "channels": stem.proj.in_channels,
        "classes": model.num_classes,
        **more,
    }
