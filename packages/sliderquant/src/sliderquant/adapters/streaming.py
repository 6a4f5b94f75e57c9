"""A model whose weights stay in their safetensors files until a block is asked for.

The model itself is an empty shell: its parameters are on the meta device, its buffers (rotary tables,
embedding scales) are real. A block is read, converted to float32, rotated if asked, and returned; it is
not kept here.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from effml_common.errors import InputError
from effml_common.logging import Progress, warn
from sliderquant.adapters.families import (
    DOWN_EXPERTS,
    GATE_UP_EXPERTS,
    ROUTER,
    Family,
    block_layout,
)
from sliderquant.adapters.files import quiet_transformers
from sliderquant.adapters.reasons import input_errors
from sliderquant.adapters.weights import StoredTensor, refuse_missing, refuse_shape, warn_of_unused
from sliderquant.method.rotation import rotate_block, rotate_rows

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Give parameters no memory while models are built; buffers are real."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(self, name, param)
        if param is not None:
            self._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register
    try:
        yield
    finally:
        nn.Module.register_parameter = original


def empty_model(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the model of a config with its parameters on the meta device, in eval mode."""
    with _parameters_on_meta(), quiet_transformers():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model.eval()


class CheckpointParameters:
    """Parameters read from a model directory, block by block, in float32.

    Args:
        directory: Model directory, for messages.
        tensors: Where its tensors lie, by their names in the model, from ``language_tensors``.
        model: Its empty model, from ``empty_model``.
        family: Entry of its family in the table.
        device: Where parameters are put.
        r1: Rotation of the residual stream [hidden, hidden], float64.
        r2: Rotation of the value heads [head_dim, head_dim] of every block.

    Raises:
        InputError: If a file is damaged, a weight is missing or has another shape than the config says.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Mapping[str, StoredTensor],
        model: PreTrainedModel,
        family: Family,
        device: torch.device | str = "cpu",
        r1: Float[Tensor, "h h"] | None = None,
        r2: Sequence[Float[Tensor, "d d"]] | None = None,
    ) -> None:
        self.model, self.family, self.device = model, family, torch.device(device)
        self.r1, self.r2 = r1, r2

        # Which file holds which tensor; nothing but embedding and head is read, to see what is tied.
        self._stored = dict(tensors)
        if EMBEDDING not in self._stored and HEAD in self._stored and self._config_ties:
            self._stored[EMBEDDING] = self._stored[HEAD]
        self._files = {name: tensor.path for name, tensor in self._stored.items()}
        self._shapes = {name: tensor.shape for name, tensor in self._stored.items()}
        self.files = sorted(set(self._files.values()))
        self._check(directory)
        self.dtype = self._open(EMBEDDING).dtype
        self.tied = self._is_tied()

    @property
    def _config_ties(self) -> bool:
        return self.model.config.tie_word_embeddings

    def _open(self, name: str) -> Tensor:
        """Return a tensor as it is stored, mapped from its file."""
        stored = self._stored[name]
        with (
            input_errors(f"{stored.path} is damaged", "copy it again"),
            safe_open(stored.path, framework="pt") as file,
        ):
            return file.get_tensor(stored.name)

    def _is_tied(self) -> bool:
        """Whether the head is the embedding; a different one in the file wins, as in transformers."""
        if HEAD not in self._stored or not self._config_ties:
            return HEAD not in self._stored
        if torch.equal(self._open(EMBEDDING), self._open(HEAD)):
            return True
        warn("config.json ties head and embedding, but the files hold two; the head is kept")
        return False

    def _check(self, directory: Path) -> None:
        """Compare names and shapes with what the config asks for; reads no weight."""
        # Names in the files, and shapes where a parameter is stored as it is.
        expected: dict[str, tuple[int, ...]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if name == HEAD and self._config_ties and HEAD not in self._stored:
                continue
            _, _, rest = name.partition("model.layers.")
            block, _, inner = rest.partition(".")
            stored_names = self._stored_names(int(block), inner) if block else [name]
            for stored_name in stored_names:
                # Pieces of fused experts differ from the fused shape; their count is what matters.
                is_whole = len(stored_names) == 1
                expected[stored_name] = tuple(parameter.shape) if is_whole else ()

        self._expected = frozenset(expected)
        missing = self._expected - self._files.keys()
        if missing == {HEAD}:
            raise InputError(
                f"{directory} holds a model without a head ({HEAD}), and its config does not tie it to "
                "the embedding; save the model for causal language modelling"
            )
        refuse_missing(missing, directory)
        for name, shape in expected.items():
            if shape and shape != self._shapes[name]:
                refuse_shape(directory, name, self._shapes[name], shape)
        warn_of_unused(self._files.keys() - self._expected, directory)

    def _stored_names(self, block: int, name: str) -> list[str]:
        """Return the names in the files of one parameter: itself, or the pieces of fused experts."""
        # Most parameters have the same name in the files, and so may fused experts.
        prefix = f"model.layers.{block}."
        files = self.family.expert_files
        if prefix + name in self._files or files is None:
            return [prefix + name]

        # The experts of most files are stored one by one, gate and up projection apart.
        gate, up, down, router = files
        if name == ROUTER:
            return [prefix + router]
        if name not in (GATE_UP_EXPERTS, DOWN_EXPERTS):
            return [prefix + name]
        experts = range(self.model.get_parameter(f"model.layers.{block}.{name}").shape[0])
        pieces = (gate, up) if name == GATE_UP_EXPERTS else (down,)
        return [prefix + piece.format(expert) for expert in experts for piece in pieces]

    def _read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Read tensors in float32; files are closed again, so that no mapping of them stays."""
        by_file = defaultdict(list)
        for name in names:
            by_file[self._files[name]].append(name)
        tensors = {}
        for path, names_inside in by_file.items():
            with safe_open(path, framework="pt") as file:
                for name in names_inside:
                    # A copy in any case: what safetensors returns may be the mapped file itself.
                    stored = file.get_tensor(self._stored[name].name)
                    tensors[name] = stored.to(self.device, torch.float32, copy=True)
        return tensors

    def block(self, block: int) -> dict[str, Tensor]:
        """Return all parameters of a block, by name inside the block, rotated if asked."""
        tensors = self._block_as_stored(block)
        if self.r1 is None and self.r2 is None:
            return tensors
        layout = block_layout(self.model.config, {n: t.shape for n, t in tensors.items()})
        r2 = None if self.r2 is None else self.r2[block]
        rotated = rotate_block(tensors, layout, self.r1, r2)
        # What is not quantized is stored in the checkpoint's type.
        return {
            name: tensor if name in layout.linears else self._as_stored(tensor)
            for name, tensor in rotated.items()
        }

    def _block_as_stored(self, block: int) -> dict[str, Tensor]:
        """Return all parameters of a block, by name inside the block, with experts fused."""
        # All files are opened once.
        names = [name for name, _ in self.model.model.layers[block].named_parameters()]
        stored_names = {name: self._stored_names(block, name) for name in names}
        pieces = self._read([piece for several in stored_names.values() for piece in several])

        tensors = {}
        for name, several in stored_names.items():
            if len(several) == 1:
                tensors[name] = pieces.pop(several[0])
                continue
            shape = self.model.get_parameter(f"model.layers.{block}.{name}").shape
            tensors[name] = torch.cat([pieces.pop(piece) for piece in several]).view(shape)
        return tensors

    def outside(self, head: bool = True) -> dict[str, Tensor]:
        """Return embedding, final norm and (if asked) head, by their names in the model."""
        tensors = {name: self.outside_tensor(name) for name in (EMBEDDING, NORM)}
        if head and self.tied and self.r1 is None:
            tensors[HEAD] = tensors[EMBEDDING]
        elif head:
            tensors[HEAD] = self.outside_tensor(HEAD)
        return tensors

    def outside_tensor(self, name: str) -> Tensor:
        """Return embedding, final norm or head alone: they are the largest tensors of a model."""
        # A tied head is the embedding.
        stored_name = EMBEDDING if name == HEAD and self.tied else name
        value = self._read([stored_name])[stored_name]
        if self.r1 is None:
            return value

        # R1 turns embedding and head; the gain of the final norm is folded into the head.
        if name == NORM:
            return torch.full_like(value, 1 - self.family.gain_offset)
        gain = self._read([NORM])[NORM] + self.family.gain_offset if name == HEAD else None
        return self._as_stored(rotate_rows(value, self.r1, gain))

    def check_finite(self) -> None:
        """Read every weight once.

        Raises:
            InputError: Naming a weight that holds NaN or infinity.
        """
        names = [name for name in self._files if name in self._expected]
        with Progress("checking weights", len(names)) as bar:
            for name in names:
                # A sum needs no copy of the weight, and one bad entry makes it bad.
                if not torch.isfinite(self._read([name])[name].sum()):
                    raise InputError(
                        f"weight {name} holds NaN or infinity; use an intact checkpoint"
                    )
                bar.advance()

    def _as_stored(self, value: Tensor) -> Tensor:
        """Round to the checkpoint's type, and compute on in float32."""
        return value.to(self.dtype).float()
