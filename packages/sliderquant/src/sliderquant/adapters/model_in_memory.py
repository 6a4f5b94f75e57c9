"""A transformers model that is in memory, read as if it came from its files.

Blocks compute in an empty model of the same config, with the parameters of the user's model in float32.
So nothing of the user's model is touched, and the results are those of its folder, bit for bit.
"""

import copy
import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from effml_common.errors import InputError
from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.families import family_of
from sliderquant.adapters.files import quiet_transformers
from sliderquant.adapters.formats import MARK
from sliderquant.adapters.streaming import EMBEDDING, HEAD, NORM, empty_model


class MemoryParameters:
    """Parameters of a model in memory, block by block, in float32.

    Args:
        model: Stays as it is; its parameters are on one device.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.device: torch.device = model.get_parameter(EMBEDDING).device

    def block(self, block: int) -> dict[str, Tensor]:
        """Return all parameters of a block, by name inside the block."""
        parameters = self._model.model.layers[block].named_parameters()
        return {name: parameter.detach().float() for name, parameter in parameters}

    def outside(self, head: bool = True) -> dict[str, Tensor]:
        """Return embedding, final norm and (if asked) head, by their names in the model."""
        names = (EMBEDDING, NORM, HEAD) if head else (EMBEDDING, NORM)
        return {name: self._model.get_parameter(name).detach().float() for name in names}


def stored_config(model: PreTrainedModel) -> dict[str, Any]:
    """Return what ``save_pretrained`` would write as ``config.json``."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    return json.loads(config.to_json_string(use_diff=True))


def open_in_memory(model: PreTrainedModel) -> TransformersDecoder:
    """Check a model and return its blocks.

    Args:
        model: A ``*ForCausalLM`` in full precision (any floating type), with all weights on one device.

    Raises:
        InputError: If it is no such model, is quantized already, or a weight is NaN or infinite.
        UnsupportedArchitectureError: If its family is not in the table.
    """
    # A model of a known family that nobody has quantized.
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"model is a {type(model).__name__}, not a transformers model; "
            "give what AutoModelForCausalLM.from_pretrained returns"
        )
    family_of(model.config.model_type)
    mark = getattr(model.config, MARK, None)
    rounded = isinstance(mark, dict) and mark.get("rounded")
    if rounded or getattr(model.config, "quantization_config", None) is not None:
        raise InputError("the model is quantized already; load the full-precision model again")

    # It has the parameters that its config says, no adapters beside them.
    with quiet_transformers():
        shell = empty_model(AutoConfig.for_model(**stored_config(model)))
    _check_parameters(model, shell)
    return TransformersDecoder(shell, MemoryParameters(model))


def _check_parameters(model: PreTrainedModel, shell: PreTrainedModel) -> None:
    """Compare a model with the empty one of its config, and look for values that are no numbers."""
    # A tied head counts twice: the empty model has not tied it.
    parameters = shell.named_parameters(remove_duplicate=False)
    expected = {name: parameter.shape for name, parameter in parameters}
    found = dict(model.named_parameters(remove_duplicate=False))
    others = sorted(expected.keys() ^ found.keys())
    if others or type(model) is not type(shell):
        example = f" ({others[0]})" if others else ""
        raise InputError(
            f"the model is not the {type(shell).__name__} that its config describes{example}; "
            "merge adapters and unwrap it first"
        )

    # All weights are where the first one is.
    device = found[EMBEDDING].device
    if device.type == "mps":
        raise InputError("device mps has no float64, which calibration computes in; use the CPU")
    for name, parameter in found.items():
        if parameter.shape != expected[name]:
            raise InputError(
                f"weight {name} has shape {list(parameter.shape)}, the model's config asks for "
                f"{list(expected[name])}; make them agree"
            )
        if parameter.device != device or device.type == "meta":
            raise InputError(
                f"weight {name} is on {parameter.device} and the embedding on {device}; put the whole "
                "model on one device"
            )
        if not parameter.is_floating_point():
            raise InputError(f"weight {name} is {parameter.dtype}; give a full-precision model")
        if not torch.isfinite(parameter.sum(dtype=torch.float32)):
            raise InputError(f"weight {name} holds NaN or infinity; use an intact checkpoint")


def token_samples(
    tokens: Tensor | Sequence[Tensor], vocabulary: int, context: int
) -> Int[Tensor, "n t"]:
    """Check calibration samples and return them as one int64 tensor on the CPU.

    Args:
        tokens: Token ids [n, t], or n tensors [t] of one length.
        vocabulary: Rows of the embedding.
        context: Longest sample that the model supports, in tokens.

    Raises:
        InputError: Naming what does not fit.
    """
    # One tensor of integers, a sample in each row.
    if not isinstance(tokens, Tensor | Iterable):
        raise InputError(
            f"tokens are a {type(tokens).__name__}; give token ids as one tensor [samples, length]"
        )
    if not isinstance(tokens, Tensor):
        tokens = _stacked(list(tokens))
    if tokens.dtype not in (torch.int64, torch.int32):
        raise InputError(f"tokens are {tokens.dtype}; give token ids as int64")
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise InputError(
            f"tokens have shape {list(tokens.shape)}; give samples in rows, [samples, length]"
        )

    # Every id has a row of the embedding, and no sample is longer than the model can read.
    samples = tokens.to("cpu", torch.int64)
    for wrong in samples[(samples < 0) | (samples >= vocabulary)][:1].tolist():
        raise InputError(
            f"tokens hold {wrong}, the model knows 0 to {vocabulary - 1}; "
            "use the tokenizer that belongs to it"
        )
    if samples.shape[1] > context:
        raise InputError(
            f"samples have {samples.shape[1]} tokens, the model reads {context} at most; cut them"
        )
    return samples


def _stacked(tokens: list[Any]) -> Tensor:
    """Return samples that come one by one as one tensor."""
    if not tokens:
        raise InputError("tokens are an empty list; give one sample or more")
    for number, sample in enumerate(tokens):
        if not isinstance(sample, Tensor) or sample.ndim != 1:
            raise InputError(
                f"sample {number} of tokens is no tensor of one axis; give one tensor [samples, length]"
            )
        if len(sample) != len(tokens[0]):
            raise InputError(
                f"sample {number} of tokens has {len(sample)} ids and sample 0 has {len(tokens[0])}; "
                "cut them to one length"
            )
    return torch.stack(tokens)
