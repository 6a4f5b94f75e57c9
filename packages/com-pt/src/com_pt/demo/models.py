"""The demo's models: open_clip models for pictures of two digits."""

from typing import Any

from com_pt.demo.data import CONTEXT_LENGTH, VOCABULARY


def pair_model(
    vision_width: int, text_width: int, layers: int = 2, text_layers: int = 2, embed: int = 64
) -> dict[str, Any]:
    """Return the settings of an open_clip model for these pictures: patch 4, heads of 16.

    Args:
        vision_width: Channels of the image tower.
        text_width: Channels of the text tower.
        layers: Layers of the image tower.
        text_layers: Layers of the text tower.
        embed: Channels of the joint embedding.
    """
    vision: dict[str, Any] = {"image_size": [8, 16], "layers": layers, "width": vision_width}
    text = {"context_length": CONTEXT_LENGTH, "vocab_size": VOCABULARY, "width": text_width}
    return {
        "embed_dim": embed,
        "vision_cfg": {**vision, "patch_size": 4, "head_width": 16},
        "text_cfg": {**text, "heads": text_width // 16, "layers": text_layers},
    }


# From small to large; the text tower stays as it is.
MEMBERS = {"T": pair_model(64, 64), "S": pair_model(128, 64), "B": pair_model(128, 64, 4)}
