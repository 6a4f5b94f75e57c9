"""The ``inspect`` command: what a setting would cost on a model, without one weight."""

from dataclasses import dataclass, replace

from effml_common.report import Summary
from fis_dit.adapters.clips import latent_geometry
from fis_dit.adapters.model_configs import ModelConfig, read_model_config
from fis_dit.config import FISConfig, InspectConfig, read_setting
from fis_dit.method.anchors import choose_anchors
from fis_dit.method.cost import Cost, flops

STEPS = 4  # denoising steps of a run
ACTIVATION_WIDTHS = 16  # numbers that a block keeps for each token, in model widths; an estimate
BF16_BYTES, GIB = 2, 2**30


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a setting computes on a clip, and what that costs.

    Attributes:
        setting: The setting.
        frames: Latent frames F.
        tokens: Tokens per frame P.
        width: Model width D.
        cost: Of a run of four steps.
        anchor_sets: Anchors of every residue.
    """

    setting: FISConfig
    frames: int
    tokens: int
    width: int
    cost: Cost
    anchor_sets: tuple[tuple[int, ...], ...]


def inspect(config: InspectConfig) -> Summary:
    """Predict cost and memory of a model at a clip size; builds the model on the meta device.

    Args:
        config: Model, clip size and setting.

    Returns:
        Named values; prints as a table.

    Raises:
        InputError: If the config cannot be read or the class has no adapter.
        ConfigError: If the plan does not fit the model.
    """
    # Read: the model's config and the setting, which a stride may change.
    model = read_model_config(config.model)
    setting = read_setting(config.plan, config.preset)
    if config.stride is not None:
        setting = replace(setting, stride=config.stride)

    # Predict: anchors and FLOPs.
    clip = (config.num_frames, config.height, config.width)
    prediction = _predict(model, setting, clip)

    # Show.
    return _summarise(model, prediction)


def _predict(model: ModelConfig, setting: FISConfig, clip: tuple[int, int, int]) -> Prediction:
    """Predict anchors and cost of a clip of (frames, height, width) in pixels."""
    geometry = latent_geometry(model.adapter, model.values, clip, model.compression)
    frames, tokens = geometry[0], geometry[1] * geometry[2]
    shape = model.adapter.shape(model.values)
    rules = {"boundaries": setting.boundaries, "equalize": setting.equalize}
    residues = range(min(setting.stride, frames))
    return Prediction(
        setting=setting,
        frames=frames,
        tokens=tokens,
        width=shape.width,
        cost=flops(shape, setting, model.depth, frames, tokens, STEPS),
        anchor_sets=tuple(choose_anchors(frames, setting.stride, r, **rules) for r in residues),
    )


def _summarise(model: ModelConfig, prediction: Prediction) -> Summary:
    cost, parameters = prediction.cost, model.parameters
    sparse_blocks = list(prediction.setting.sparse_blocks(model.depth))
    anchors = [list(anchors) for anchors in prediction.anchor_sets]
    values = {
        "model_class": model.model_class,
        "parameters": parameters,
        "frames": prediction.frames,
        "tokens_per_frame": prediction.tokens,
        "depth": model.depth,
        "sparse_blocks": sparse_blocks,
        "anchors": anchors,
        "dense_pflop": cost.dense / STEPS / 1e15,
        "sparse_pflop": cost.sparse / STEPS / 1e15,
        "speedup_per_block": cost.per_block,
        "speedup": cost.speedup,
        "memory_gib": _memory_gib(parameters, prediction),
    }

    # What a plain value would not tell a reader.
    by_residue = (f"residue {r}: {' '.join(map(str, a))}" for r, a in enumerate(anchors))
    shown = {
        "parameters": f"{parameters / 1e9:.2f} billion",
        "sparse_blocks": f"{len(sparse_blocks)} of {model.depth}",
        "anchors": "\n".join(by_residue),
        "dense_pflop": f"{values['dense_pflop']:.4g} per forward",
        "sparse_pflop": f"{values['sparse_pflop']:.4g} per forward",
        "speedup_per_block": f"{cost.per_block:.2f}x",
        "speedup": f"{cost.speedup:.2f}x of the transformer (by FLOPs)",
    }
    title = f"{model.model_class}, stride {prediction.setting.stride}"
    note = (
        "Memory is for bfloat16: the weights, and the activations of one block, dense and sparse."
    )
    return Summary(values, title=title, note=note, shown=shown)


def _memory_gib(parameters: int, prediction: Prediction) -> dict[str, float]:
    """Estimate GiB in bfloat16: weights, and one block's activations dense and sparse."""
    # A sparse block keeps its anchors' activations, and input and output of all frames.
    per_width = prediction.frames * prediction.tokens * prediction.width * BF16_BYTES / GIB
    share = max(prediction.cost.counts) / prediction.frames
    share = share if prediction.setting.sites == "block" else 1.0
    dense = ACTIVATION_WIDTHS * per_width
    return {
        "weights": parameters * BF16_BYTES / GIB,
        "activations_dense": dense,
        "activations_sparse": dense * share + 2 * per_width,
    }
