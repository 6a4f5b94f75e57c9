"""Layouts of open_clip's ``CLIP`` and ``CustomTextCLIP``."""

from typing import Any

from torch import nn

from com_pt.adapters.layout_timm import timm_layout
from com_pt.errors import GrowthError, LayoutError
from com_pt.layout import Layout, Rule, Tower, renamed, rules

BLOCK = {
    "resblocks.N.attn.in_proj_weight": "QKV <WIDTH",
    "resblocks.N.attn.in_proj_bias": "QKV",
    "resblocks.N.attn.out_proj.weight": "+WIDTH <HEAD",
    "resblocks.N.attn.out_proj.bias": "+WIDTH",
    "resblocks.N.mlp.c_fc.weight": "MLP <WIDTH",
    "resblocks.N.mlp.c_fc.bias": "MLP",
    "resblocks.N.mlp.c_proj.weight": "+WIDTH <MLP",
    "resblocks.N.mlp.c_proj.bias": "+WIDTH",
}
NORMS = {
    "resblocks.N.ln_[12].weight": "WIDTH",
    "resblocks.N.ln_[12].bias": "WIDTH",
}
SCALES = {"resblocks.N.ls_[12].gamma": "WIDTH"}


def is_open_clip(model: nn.Module) -> bool:
    """Whether this is a CLIP of open_clip."""
    return type(model).__module__.startswith("open_clip.") and hasattr(model, "visual")


def open_clip_layout(model: Any) -> Layout:
    """Layout of a ``CLIP`` or ``CustomTextCLIP``.

    Raises:
        GrowthError: If the image tower is a ResNet, whose batch norms and shapes do not grow.
        LayoutError: If a tower is of another library.
    """
    custom = hasattr(model, "text")
    text = model.text if custom else model
    prefix = "text." if custom else ""
    image_rules, image_tower, fixed = _image(model.visual)
    text_rules, text_tower, more = _text(text, prefix)
    head = (
        *rules({"logit_scale": ""}, tower="text"),
        *rules({"logit_bias": ""}, tower="text", optional=True),
    )
    return Layout(
        "CLIP",
        (*image_rules, *text_rules, *head),
        {"image": image_tower, "text": text_tower},
        {**fixed, **more},
    )


def custom_text_names(name: str, *, custom: bool) -> str:
    """The name of a CLIP parameter in the form with, or without, a text module of its own."""
    if name.startswith("visual.") or name in ("logit_scale", "logit_bias"):
        return name
    bare = name.removeprefix("text.")
    return f"text.{bare}" if custom else bare


def _image(visual: Any) -> tuple[tuple[Rule, ...], Tower, dict[str, Any]]:
    kind = type(visual).__name__
    if kind == "ModifiedResNet":
        raise GrowthError("an image tower with BatchNorm cannot be grown; use a vision transformer")
    if kind == "TimmModel":
        trunk = timm_layout(visual.trunk)
        head = rules({"head.proj.weight": "EMBED <WIDTH"}, prefix="visual.", tower="image")
        below = renamed(trunk.rules, prefix="visual.trunk.", tower="image")
        fixed = {f"image {name}": value for name, value in trunk.fixed.items() if name != "classes"}
        return (*below, *head), trunk.towers[""], fixed
    if kind != "VisionTransformer":
        raise LayoutError(f"an image tower of class {kind} is not known; register a layout for it")
    attention = visual.transformer.resblocks[0].attn
    prefix, tower = "visual.", "image"
    early = not isinstance(visual.ln_pre, nn.Identity)
    return (
        (
            *_blocks("visual.transformer.", tower),
            *rules(
                {
                    "class_embedding": "+WIDTH",
                    "positional_embedding": "POS +WIDTH",
                    "conv1.weight": "+WIDTH FIXED FIXED FIXED",
                    "proj": "<WIDTH EMBED",
                },
                prefix=prefix,
                tower=tower,
            ),
            *rules(
                {"ln_(pre|post).weight": "WIDTH", "ln_(pre|post).bias": "WIDTH"},
                prefix=prefix,
                tower=tower,
                kind="norm",
            ),
        ),
        _tower(attention, visual.conv1.out_channels, visual.ln_post, early),
        {
            "image patch size": tuple(visual.conv1.kernel_size),
            "image size": tuple(visual.image_size),
            "image channels": visual.conv1.in_channels,
        },
    )


def _text(text: Any, prefix: str) -> tuple[tuple[Rule, ...], Tower, dict[str, Any]]:
    if not hasattr(text, "transformer") or not hasattr(text.transformer, "resblocks"):
        raise LayoutError(
            f"a text tower of class {type(text).__name__} is not known; register a layout for it"
        )
    attention = text.transformer.resblocks[0].attn
    return (
        (
            *_blocks(f"{prefix}transformer.", "text"),
            *rules(
                {
                    "token_embedding.weight": "VOCAB +WIDTH",
                    "positional_embedding": "POS +WIDTH",
                    "cls_emb": "+WIDTH",
                    "text_projection": "<WIDTH EMBED",
                    "text_projection.weight": "EMBED <WIDTH",
                    "text_projection.bias": "EMBED",
                },
                prefix=prefix,
                tower="text",
            ),
            *rules(
                {"ln_final.weight": "WIDTH", "ln_final.bias": "WIDTH"},
                prefix=prefix,
                tower="text",
                kind="norm",
            ),
        ),
        _tower(attention, text.token_embedding.embedding_dim, text.ln_final, False),
        {
            "vocabulary": text.token_embedding.num_embeddings,
            "context length": text.positional_embedding.shape[0],
            "text pooling": getattr(text, "pool_type", getattr(text, "text_pool_type", None)),
        },
    )


def _blocks(prefix: str, tower: str) -> tuple[Rule, ...]:
    return (
        *rules(BLOCK, prefix=prefix, tower=tower),
        *rules(NORMS, prefix=prefix, tower=tower, kind="norm"),
        *rules(SCALES, prefix=prefix, tower=tower, kind="scale"),
    )


def _tower(attention: Any, width: int, norm: Any, early: bool) -> Tower:
    heads = attention.num_heads
    if width % heads:
        raise GrowthError(f"{width} channels are no multiple of {heads} heads; correct the config")
    return Tower(width=width, heads=heads, head_dim=width // heads, early_norm=early, eps=norm.eps)
