"""A member on disk as its library loads it: settings in JSON beside weights in safetensors."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from effml_common.errors import InputError
from effml_common.parsing import one_line


@dataclass(frozen=True)
class FolderFormat:
    """File names of a library's model folders.

    Args:
        library: For messages.
        config: JSON of the settings.
        weights: Tensors under the model's own names.
    """

    library: str
    config: str
    weights: str

    def write(self, model: nn.Module, document: Mapping[str, Any], folder: Path) -> None:
        """Write settings and weights; the folder is created."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.config).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        tensors = {name: v.detach().cpu().contiguous() for name, v in model.state_dict().items()}
        save_file(tensors, folder / self.weights, metadata={"format": "pt"})

    def read(self, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Read settings and weights.

        Raises:
            InputError: If the folder has none, or damaged ones.
        """
        try:
            document = json.loads((folder / self.config).read_text(encoding="utf-8"))
            return document, load_file(folder / self.weights)
        except Exception as error:  # safetensors has errors of its own for damaged files
            raise self.refusal(folder, str(error)) from error

    def refusal(self, folder: Path, why: str) -> InputError:
        """Return the error for a folder that is none of this library's."""
        return InputError(
            f"{folder} is no {self.library} folder: {one_line(why)}; it needs {self.config} and "
            f"{self.weights}"
        )


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> nn.Module:
    """Return the model with these weights.

    Raises:
        InputError: If they are of another model.
    """
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(
            f"{folder}: weights and settings differ: {one_line(str(error))[:300]}; export it again"
        ) from error
    return model
