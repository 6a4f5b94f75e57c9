"""A model folder: checked as a whole, opened for reading block by block."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from effml_common.errors import InputError
from effml_common.logging import warn
from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.families import family_of
from sliderquant.adapters.files import load_config, load_tokenizer, read_raw_config
from sliderquant.adapters.reasons import input_errors
from sliderquant.adapters.streaming import CheckpointParameters, empty_model
from sliderquant.adapters.weights import language_tensors
from sliderquant.method.rotation import random_rotation
from sliderquant.method.sampling import seeded

# Keys of a config that belong to the source alone: how it was computed, and that it was not quantized.
NOT_OF_THE_RESULT = ("quantization_config", "_attn_implementation", "attn_implementation")


@dataclass(frozen=True, kw_only=True)
class StreamedModel:
    """A checked model directory whose weights are read when they are needed.

    Attributes:
        decoder: Its blocks.
        source: Its parameters, in the basis that the result will have.
        tokenizer: Its tokenizer.
        directory: Where it was read from.
        config: Of the language model; a rotation or a different head unties the embeddings.
        base_type: Model type of the whole, where only its language part is read, else ``None``.
        context: Longest sequence the model supports, in tokens.
    """

    decoder: TransformersDecoder
    source: CheckpointParameters
    tokenizer: PreTrainedTokenizerBase
    directory: Path
    config: PreTrainedConfig
    base_type: str | None
    context: int

    @property
    def written_config(self) -> dict[str, Any]:
        """What the result's ``config.json`` says, apart from its quantization."""
        # The language part is a model of its own; any other config stays as the user wrote it.
        raw = read_raw_config(self.directory)
        if self.base_type is not None:
            raw = self.config.to_dict()
        known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(self.config.model_type)
        if known and "auto_map" not in raw:  # a base model names another class
            raw["architectures"] = [known]
        raw["tie_word_embeddings"] = self.config.tie_word_embeddings
        return {key: value for key, value in raw.items() if key not in NOT_OF_THE_RESULT}

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights on disk."""
        return self.source.dtype


def open_model(
    directory: str | Path,
    *,
    device: torch.device | str = "cpu",
    rotate: str = "none",
    seed: int = 0,
    trust_remote_code: bool = False,
) -> StreamedModel:
    """Check a model directory and open it for reading block by block.

    Args:
        directory: Local Hugging Face directory.
        device: Torch device.
        rotate: "none", "r1", "r2" or "both", see ``rotation``.
        seed: Of the rotations.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        InputError: If something is missing, damaged or does not fit, or R1 is not possible.
    """
    # Names and shapes are checked, no weight of a block is read.
    directory = Path(directory)
    config = load_config(directory, trust_remote_code)
    tensors = language_tensors(directory)
    tokenizer = load_tokenizer(directory, trust_remote_code)
    with input_errors(f"{directory} cannot be built from its config", "restore its files"):
        model = empty_model(config, trust_remote_code)
    source = CheckpointParameters(directory, tensors, model, family_of(config.model_type), device)
    config.tie_word_embeddings = source.tied
    decoder = TransformersDecoder(model, source)
    whole = read_raw_config(directory).get("model_type")
    if rotate != "none":
        _rotate(decoder, source, config, rotate, seed)
    return StreamedModel(
        decoder=decoder,
        source=source,
        tokenizer=tokenizer,
        directory=directory,
        config=config,
        base_type=None if whole == config.model_type else whole,
        context=config.max_position_embeddings,
    )


def _rotate(
    decoder: TransformersDecoder,
    source: CheckpointParameters,
    config: PreTrainedConfig,
    rotate: str,
    seed: int,
) -> None:
    """Let the parameters be read in another basis, see ``rotation``.

    Raises:
        InputError: If R1 is not possible.
    """
    # A generator for the residual stream, and one for the value heads of each block.
    of_stream = seeded((seed, 0))
    of_heads = [seeded((seed, 1, block)) for block in range(decoder.depth)]

    # The residual stream has one basis; a norm between a writer and the stream has its own.
    layout = decoder.layout(0)
    if rotate in ("r1", "both"):
        if layout.output_norms:
            raise InputError(
                f"rotate r1 does not fit {config.model_type}: {layout.output_norms[0]} stands between "
                "its blocks and the residual stream; use --rotate r2"
            )
        source.r1 = random_rotation(config.hidden_size, of_stream).to(source.device)
        if source.tied:
            warn("r1 unties the embeddings: the result holds a head of its own")
            config.tie_word_embeddings = False

    # The value heads of each block have a basis of their own.
    if rotate in ("r2", "both"):
        source.r2 = [
            random_rotation(layout.head_dim, generator).to(source.device) for generator in of_heads
        ]
