"""Files for llama.cpp: names, row order and metadata of three families, one tensor at a time.

Source: the converter of llama.cpp. What it does to the weights of these families: Llama's queries and
keys are turned in pairs of neighbours instead of halves, so their rows are reordered; Gemma's norms
multiply by (1 + weight), and the file holds that sum.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from effml_common.errors import InputError
from effml_common.files import fsync_path
from sliderquant.adapters.gguf_blocks import BLOCK, BLOCK_BYTES, GgufWeight, gguf_kind, gguf_weight
from sliderquant.adapters.gguf_tokenizer import add_tokenizer
from sliderquant.method.quantizer import QuantizedWeight, WeightFormat

FILE_NAME = "model.gguf"
GEMMA_PERIOD = 6  # llama.cpp lets every sixth block of Gemma 3 see the whole text
QUANTIZATION_VERSION = 2  # of the blocks, see ggml


@dataclass(frozen=True, kw_only=True)
class GgufFamily:
    """How llama.cpp has a family.

    Attributes:
        arch: Its name there.
        activation: The function in its MLP, by the name of transformers.
        pairs_neighbours: The rotary embedding turns neighbours of a head's features, not halves.
        gain_offset: What is added to the weights of norms.
        biases: Whether linear layers may have biases.
    """

    arch: str
    activation: str = "silu"
    pairs_neighbours: bool = False
    gain_offset: float = 0.0
    biases: bool = False


GGUF_FAMILIES = {
    "llama": GgufFamily(arch="llama", pairs_neighbours=True, biases=True),
    "qwen3": GgufFamily(arch="qwen3"),
    "gemma3_text": GgufFamily(arch="gemma3", activation="gelu_pytorch_tanh", gain_offset=1.0),
}


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of a model folder.

    Attributes:
        shape: Of the weight, not packed.
        fmt: Storage format; ``None`` if it is not quantized.
        dtype: Type in the files.
        read: Returns it.
    """

    shape: tuple[int, ...]
    fmt: WeightFormat | None
    dtype: torch.dtype
    read: Callable[[], QuantizedWeight | Tensor]


def check_gguf(config: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the config of a model that llama.cpp computes as transformers does.

    Raises:
        InputError: Naming what it has no counterpart for.
    """
    if config["model_type"] not in GGUF_FAMILIES:
        raise InputError(
            f"GGUF files are written for {', '.join(GGUF_FAMILIES)}, and this model is "
            f"{config['model_type']!r}; export it to another format"
        )
    parsed = AutoConfig.for_model(**config)
    problem = _difference(parsed)
    if problem:
        raise InputError(f"llama.cpp computes this model otherwise: {problem}; use another format")
    return parsed


def _difference(config: Any) -> str | None:
    """Return what llama.cpp would compute otherwise, if anything."""
    if getattr(config, "use_sliding_window", False):
        return "use_sliding_window is set"
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != GGUF_FAMILIES[config.model_type].activation:
        return f"its MLP has {activation}"
    if config.model_type != "gemma3_text":
        kind = config.rope_parameters["rope_type"]
        return None if kind in ("default", "linear", "llama3") else f"rope_type is {kind}"

    # Gemma 3: what its entry in llama.cpp takes for granted.
    period = ["full_attention" if (i + 1) % GEMMA_PERIOD == 0 else "sliding_attention"
              for i in range(config.num_hidden_layers)]  # fmt: skip
    scaling = config.rope_parameters["full_attention"]["rope_type"]
    if config.layer_types != period:
        return f"not every {GEMMA_PERIOD}th of its blocks has full attention"
    if config.query_pre_attn_scalar != config.head_dim:
        return (
            f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, head_dim {config.head_dim}"
        )
    if config.attn_logit_softcapping is not None:
        return f"attn_logit_softcapping is {config.attn_logit_softcapping}"
    if config.rope_parameters["sliding_attention"]["rope_theta"] != 10_000:
        return "rope_theta of its local attention is not 10000"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention sees later tokens"
    return None if scaling in ("default", "linear") else f"rope_type is {scaling}"


def write_gguf(
    path: Path,
    config: PreTrainedConfig,
    folder: Path,
    parameters: Mapping[str, Parameter],
    advance: Callable[[], None],
) -> Iterable[tuple[str, GgufWeight, QuantizedWeight]]:
    """Write a model, one tensor at a time, and yield each quantized one as it is in the file.

    The file gets its name when the last one was taken.

    Args:
        path: File to write.
        config: From ``check_gguf``.
        folder: Where tokenizer and chat template are.
        parameters: All parameters, by their names in transformers.
        advance: Called after each tensor.

    Raises:
        InputError: If the file cannot hold something.
    """
    from gguf import MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map

    # Names first: a parameter that llama.cpp has no name for must not be lost.
    family = GGUF_FAMILIES[config.model_type]
    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == family.arch)
    table = get_tensor_name_map(arch, config.num_hidden_layers)
    names = {name: table.get_name(name, (".weight", ".bias")) or "" for name in parameters}
    for name, of_file in names.items():
        if not of_file or (name.endswith(".bias") and not family.biases):
            raise InputError(f"llama.cpp has no {name} in a {family.arch}; use another format")

    # Metadata, then where each tensor will lie.
    temporary = path.with_name(f".{path.name}.tmp")
    writer = GGUFWriter(temporary, family.arch)
    try:
        _add_metadata(writer, config, folder, parameters)
        frequencies = _frequency_factors(config)
        if frequencies is not None:
            _add_info(writer, "rope_freqs.weight", tuple(frequencies.shape), "F32")
        for name, parameter in parameters.items():
            _add_info(writer, names[name], parameter.shape, _kind(parameter))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()

        # The tensors in the same order.
        if frequencies is not None:
            writer.write_tensor_data(frequencies.numpy())
        for name, parameter in parameters.items():
            value = _reordered(parameter.read(), _row_order(config, family, name))
            if isinstance(value, QuantizedWeight):
                stored = gguf_weight(value)
                writer.write_tensor_data(stored.blocks.numpy())
                yield name, stored, value
            else:
                offset = family.gain_offset if name.endswith("norm.weight") else 0.0
                writer.write_tensor_data(_plain_bytes(value, _kind(parameter), offset))
            advance()

        # Complete: it may be seen.
        writer.close()
        fsync_path(temporary)
        os.replace(temporary, path)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)


def _add_metadata(
    writer: Any, config: Any, folder: Path, parameters: Mapping[str, Parameter]
) -> None:
    """Write sizes, rotary embedding, kind of file and tokenizer."""
    # Sizes.
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_type("model")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)

    # Rotary embedding; Gemma has one for its local attention, which llama.cpp knows.
    rope = config.rope_parameters
    if config.model_type == "gemma3_text":
        rope = rope["full_attention"]
        writer.add_sliding_window(config.sliding_window)
        if config.final_logit_softcapping is not None:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    else:
        writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])

    # What most of its weights are, and the tokenizer.
    from gguf import LlamaFileType

    kinds = [_kind(parameter) for parameter in parameters.values() if parameter.fmt]
    most = max(set(kinds), key=kinds.count) if kinds else "F32"
    label = f"MOSTLY_{most}" if kinds else "ALL_F32"
    writer.add_file_type(LlamaFileType[label])
    writer.add_quantization_version(QUANTIZATION_VERSION)
    add_tokenizer(writer, folder, config.vocab_size)


def _frequency_factors(config: Any) -> Tensor | None:
    """Return by what Llama 3 divides each rotary frequency, float32 [head_dim / 2], or ``None``."""
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    features = 2 * len(scaled)
    plain = rope["rope_theta"] ** (-torch.arange(0, features, 2).float() / features)
    return plain / scaled.float()


def _kind(parameter: Parameter) -> str:
    """Return the type of a tensor in the file: norms and biases are always float32."""
    if parameter.fmt is not None:
        return gguf_kind(parameter.fmt, parameter.shape[-1])
    if len(parameter.shape) == 1:
        return "F32"
    kinds = {torch.bfloat16: "BF16", torch.float16: "F16"}
    return kinds.get(parameter.dtype, "F32")


def _add_info(writer: Any, name: str, shape: tuple[int, ...], kind: str) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType

    # Sizes are given in bytes, from which the library computes the shape.
    widths = {"F32": 4, "F16": 2, "BF16": 2}
    row = shape[-1] * widths[kind] if kind in widths else shape[-1] // BLOCK * BLOCK_BYTES[kind]
    bytes_shape = (*shape[:-1], row)
    size = int(np.prod(bytes_shape))
    dtype = np.dtype(np.uint8)
    writer.add_tensor_info(name, bytes_shape, dtype, size, GGMLQuantizationType[kind])


def _row_order(config: Any, family: GgufFamily, name: str) -> Int[Tensor, " rows"] | None:
    """Return which row of a parameter comes where, if the order differs."""
    projection = name.split(".")[-2]
    if not family.pairs_neighbours or projection not in ("q_proj", "k_proj"):
        return None
    is_query = projection == "q_proj"
    heads = config.num_attention_heads if is_query else config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    halves = torch.arange(heads * head_dim).view(heads, 2, head_dim // 2)
    return halves.transpose(1, 2).flatten()


def _reordered(
    value: QuantizedWeight | Tensor, order: Int[Tensor, " rows"] | None
) -> QuantizedWeight | Tensor:
    if order is None:
        return value
    if isinstance(value, Tensor):
        return value[order]
    zero = None if value.zero is None else value.zero[order]
    return QuantizedWeight(
        codes=value.codes[order], scale=value.scale[order], zero=zero, fmt=value.fmt
    )


def _plain_bytes(value: Tensor, kind: str, offset: float) -> Any:
    """Return the bytes of a tensor that is not quantized, as numpy."""
    if kind == "F32":
        value = value.float() + offset
    return value.contiguous().view(torch.uint8).numpy()
