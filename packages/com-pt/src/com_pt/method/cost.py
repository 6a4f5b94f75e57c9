"""What a chain costs, in multiply-accumulates (MACs).

Per sample, training is 3 F (forward, and twice that backward) and the frozen predecessor F, with F
the forward pass. Formulas equal torch's counter on the meta device; on the CPU in eval mode that
counter misses part of ``nn.MultiheadAttention``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def transformer_macs(width: int, tokens: int, layers: int, mlp_ratio: float = 4.0) -> int:
    """Return the MACs of plain blocks: layers * ((4 + 2 ratio) w^2 n + 2 n^2 w)."""
    hidden = int(width * mlp_ratio)
    return layers * (
        4 * width * width * tokens + 2 * width * hidden * tokens + 2 * tokens**2 * width
    )


def image_tower_macs(vision: Mapping[str, Any], embed_dim: int) -> int:
    """Return the MACs of open_clip's vision transformer for one image."""
    width, patch = vision["width"], vision.get("patch_size", 16)
    size = vision.get("image_size", 224)
    height, length = (size, size) if isinstance(size, int) else size
    patches = (height // patch) * (length // patch)
    blocks = transformer_macs(width, patches + 1, vision["layers"], vision.get("mlp_ratio", 4.0))
    return patches * 3 * patch**2 * width + blocks + width * embed_dim


def text_tower_macs(text: Mapping[str, Any], embed_dim: int) -> int:
    """Return the MACs of open_clip's text transformer for one caption."""
    width, tokens = text["width"], text.get("context_length", 77)
    blocks = transformer_macs(width, tokens, text["layers"], text.get("mlp_ratio", 4.0))
    return blocks + width * embed_dim


def clip_macs(config: Mapping[str, Any], captions: int) -> int:
    """Return the MACs of one image with K captions: vision + K text."""
    dim = config["embed_dim"]
    return image_tower_macs(config["vision_cfg"], dim) + captions * text_tower_macs(
        config["text_cfg"], dim
    )


def llama_macs(config: Any, tokens: int) -> int:
    """Return the MACs of a Llama on one sequence.

    Attention is full, not halved for causality, as the counter counts it.
    """
    width, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    query_width, key_width = heads * head_dim, config.num_key_value_heads * head_dim
    projections = 2 * width * (query_width + key_width) + 3 * width * config.intermediate_size
    attention = 2 * tokens * query_width
    blocks = config.num_hidden_layers * (projections + attention)
    return tokens * (blocks + width * config.vocab_size)


@dataclass(frozen=True)
class StageCost:
    """One stage: forward MACs per sample of the member and its predecessor (0 for none)."""

    name: str
    forward: int
    predecessor: int
    epochs: float

    @property
    def per_sample(self) -> int:
        """MACs of training on one sample: three forward passes, and one of the predecessor."""
        return 3 * self.forward + self.predecessor


@dataclass(frozen=True)
class ChainCost:
    """Cost of a whole chain, in MACs per sample of the data set (times epochs).

    Attributes:
        stages: The stages, from small to large.
        individual_epochs: Epochs of every member when it is trained alone.
    """

    stages: Sequence[StageCost]
    individual_epochs: float

    @property
    def chain(self) -> float:
        """MACs of all stages."""
        return sum(stage.per_sample * stage.epochs for stage in self.stages)

    @property
    def individual(self) -> float:
        """MACs of every member alone."""
        return sum(3 * stage.forward * self.individual_epochs for stage in self.stages)

    @property
    def ratio(self) -> float:
        """How many times cheaper the chain trains the family."""
        return self.individual / self.chain

    @property
    def share_of_largest(self) -> float:
        """The chain's cost as a share of training its largest member alone."""
        return self.chain / (3 * self.stages[-1].forward * self.individual_epochs)

    def to_json(self) -> dict[str, Any]:
        """Return the cost as plain data."""
        return {
            "stages": [{**vars(stage), "per_sample": stage.per_sample} for stage in self.stages],
            "individual_epochs": self.individual_epochs,
            "chain_macs_per_sample": self.chain,
            "individual_macs_per_sample": self.individual,
            "ratio": self.ratio,
            "share_of_largest": self.share_of_largest,
        }


def steps_of(epochs: float, samples: int, batch: int) -> int:
    """Return the updates of a stage; the last, incomplete batch of an epoch is left out."""
    return max(1, math.ceil(epochs * (samples // batch) - 1e-9))
