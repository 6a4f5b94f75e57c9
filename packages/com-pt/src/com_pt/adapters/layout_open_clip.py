"""Layouts of open_clip's ``CLIP`` and ``CustomTextCLIP``."""

from typing import Any

from torch import nn

from com_pt.adapters.layout_timm import timm_layout
from com_pt.errors import GrowthError, LayoutError
from com_pt.method.layout import Layout, Rule, Tower, prefix_rules, rules

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
    """Describe a ``CLIP`` or ``CustomTextCLIP``.

    Raises:
        GrowthError: If the image tower is a ResNet, whose batch norms and shapes do not grow.
        LayoutError: If a tower is of another library.
    """
    # Both towers; ``CustomTextCLIP`` holds the text tower as a module of its own.
    custom = hasattr(model, "text")
    text = model.text if custom else model
    prefix = "text." if custom else ""
    image_rules, image_tower, image_facts = _describe_image(model.visual)
    text_rules, text_tower, text_facts = _describe_text(text, prefix)

    # The scale and bias of the logits belong to neither.
    head = (
        *rules({"logit_scale": ""}, tower="text"),
        *rules({"logit_bias": ""}, tower="text", optional=True),
    )
    return Layout(
        "CLIP",
        (*image_rules, *text_rules, *head),
        {"image": image_tower, "text": text_tower},
        {**image_facts, **text_facts},
        deepened=("visual.transformer.resblocks",),
    )


def custom_text_names(name: str, *, custom: bool) -> str:
    """Return the name of a CLIP parameter in the form with, or without, a text module of its own."""
    if name.startswith("visual.") or name in ("logit_scale", "logit_bias"):
        return name
    bare = name.removeprefix("text.")
    return f"text.{bare}" if custom else bare


def _describe_image(visual: Any) -> tuple[tuple[Rule, ...], Tower, dict[str, Any]]:
    """Return rules, tower and fixed facts of an image tower."""
    # A tower of timm is described where timm is, below other names.
    kind = type(visual).__name__
    if kind == "ModifiedResNet":
        raise GrowthError("an image tower with BatchNorm cannot be grown; use a vision transformer")
    if kind == "TimmModel":
        trunk = timm_layout(visual.trunk)
        head = rules({"head.proj.weight": "EMBED <WIDTH"}, prefix="visual.", tower="image")
        trunk_rules = prefix_rules(trunk.rules, prefix="visual.trunk.", tower="image")
        facts = {f"image {name}": value for name, value in trunk.fixed.items() if name != "classes"}
        return (*trunk_rules, *head), trunk.towers[""], facts
    if kind != "VisionTransformer":
        raise LayoutError(f"an image tower of class {kind} is not known; register a layout for it")

    # A vision transformer of open_clip itself.
    attention = visual.transformer.resblocks[0].attn
    prefix, tower = "visual.", "image"
    early = not isinstance(visual.ln_pre, nn.Identity)
    table = (
        *_block_rules("visual.transformer.", tower),
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
    )
    facts = {
        "image patch size": tuple(visual.conv1.kernel_size),
        "image size": tuple(visual.image_size),
        "image channels": visual.conv1.in_channels,
    }
    return table, _tower_of(attention, visual.conv1.out_channels, visual.ln_post, early), facts


def _describe_text(text: Any, prefix: str) -> tuple[tuple[Rule, ...], Tower, dict[str, Any]]:
    """Return rules, tower and fixed facts of a text tower."""
    if not hasattr(text, "transformer") or not hasattr(text.transformer, "resblocks"):
        raise LayoutError(
            f"a text tower of class {type(text).__name__} is not known; register a layout for it"
        )

    # Roles of the axes; the projection is a parameter or a layer.
    table = (
        *_block_rules(f"{prefix}transformer.", "text"),
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
    )

    # What must not change along a chain.
    attention = text.transformer.resblocks[0].attn
    facts = {
        "vocabulary": text.token_embedding.num_embeddings,
        "context length": text.positional_embedding.shape[0],
        "text pooling": getattr(text, "pool_type", getattr(text, "text_pool_type", None)),
    }
    return table, _tower_of(attention, text.token_embedding.embedding_dim, text.ln_final), facts


def _block_rules(prefix: str, tower: str) -> tuple[Rule, ...]:
    return (
        *rules(BLOCK, prefix=prefix, tower=tower),
        *rules(NORMS, prefix=prefix, tower=tower, kind="norm"),
        *rules(SCALES, prefix=prefix, tower=tower, kind="scale"),
    )


def _tower_of(attention: Any, width: int, norm: Any, early: bool = False) -> Tower:
    heads = attention.num_heads
    if width % heads:
        raise GrowthError(f"{width} channels are no multiple of {heads} heads; correct the config")
    return Tower(width=width, heads=heads, head_dim=width // heads, early_norm=early, eps=norm.eps)
