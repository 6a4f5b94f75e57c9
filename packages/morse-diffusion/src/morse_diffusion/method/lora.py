"""Low-rank residuals on frozen weights, folded in functionally.

The shared blocks of the Dash serve two networks at once. A residual is therefore never switched on in
the module: the weights ``W + scale * B A`` are an argument of the call (``torch.func.functional_call``),
so the Dash stays as it is, and a block that gradient checkpointing runs again sees the same weights.
"""

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn


def is_target(module: nn.Module) -> bool:
    """Return whether a layer gets a low-rank residual: every Linear, every Conv2d without groups."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def low_rank_delta(
    down: Float[Tensor, "r *inner"], up: Float[Tensor, "o *inner2"]
) -> Float[Tensor, "o *inner"]:
    """Return the residual of one weight, ``B A``.

    Args:
        down: A, [r, in] for a Linear, [r, in, k, k] for a convolution (PEFT's form).
        up: B, [out, r], or [out, r, 1, 1]: the 1x1 convolution that follows A.

    Returns:
        Same shape as the weight.
    """
    return (up.flatten(1) @ down.flatten(1)).view(up.shape[0], *down.shape[1:])


class LowRankResiduals(nn.Module):
    """A and B for every target layer of some named modules.

    Args:
        roots: Modules by the name they have in the Dash, such as ``down_blocks.0``.
        rank: Inner dimension, capped at the smaller side of each weight.
        alpha: Scale is alpha / rank; default alpha = rank.
    """

    def __init__(
        self, roots: Mapping[str, nn.Module], rank: int, alpha: float | None = None
    ) -> None:
        super().__init__()
        self.rank = rank
        self.alpha = float(rank if alpha is None else alpha)
        self.paths = [path for path, _, _ in iterate_targets(roots)]

        # A is random and B zero, so that the residual starts at zero.
        down, up = {}, {}
        for path, _, layer in iterate_targets(roots):
            weight, key = layer.weight, parameter_key(path)
            ones = (1,) * (weight.ndim - 2)
            shape = (rank, *weight.shape[1:])
            down[key] = nn.Parameter(weight.new_empty(shape, dtype=torch.float32))
            up[key] = nn.Parameter(
                weight.new_zeros((weight.shape[0], rank, *ones), dtype=torch.float32)
            )
            nn.init.kaiming_uniform_(down[key], a=5**0.5)
        self.down, self.up = nn.ParameterDict(down), nn.ParameterDict(up)

    @property
    def scale(self) -> float:
        """Factor on ``B A``."""
        return self.alpha / self.rank

    def folded_weights(self, root: str, module: nn.Module) -> dict[str, Tensor]:
        """Return the weights of one root with the residual added, by their name inside that root."""
        weights = {}
        for path, name, layer in iterate_targets({root: module}):
            key = parameter_key(path)
            delta = low_rank_delta(self.down[key], self.up[key]) * self.scale
            weights[f"{name}.weight" if name else "weight"] = layer.weight + delta.to(layer.weight)
        return weights

    def peft_state(self) -> dict[str, Tensor]:
        """Return A and B of every layer under the names that PEFT gives them."""
        state = {}
        for path in self.paths:
            key = parameter_key(path)
            state[f"base_model.model.{path}.lora_A.weight"] = self.down[key].detach()
            state[f"base_model.model.{path}.lora_B.weight"] = self.up[key].detach()
        return state

    def load_peft_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what ``peft_state`` returned.

        Raises:
            KeyError: If a layer is missing.
            RuntimeError: If a shape differs.
        """
        with torch.no_grad():
            for path in self.paths:
                key = parameter_key(path)
                self.down[key].copy_(state[f"base_model.model.{path}.lora_A.weight"])
                self.up[key].copy_(state[f"base_model.model.{path}.lora_B.weight"])


def iterate_targets(
    roots: Mapping[str, nn.Module],
) -> Iterator[tuple[str, str, nn.Linear | nn.Conv2d]]:
    """Yield every layer below ``roots`` that gets a residual.

    A LoRA of the user's own, as PEFT puts it in, changes names but not paths.

    Args:
        roots: See ``LowRankResiduals``.

    Yields:
        The layer's full path, its name inside the root, and the layer.
    """
    for root, module in roots.items():
        for name, layer in module.named_modules():
            path = path_without_adapters(name)
            if path is not None and isinstance(layer, nn.Linear | nn.Conv2d) and is_target(layer):
                yield (f"{root}.{path}" if path else root), name, layer


def parameter_key(path: str) -> str:
    """Return a layer's path as a name that ``ParameterDict`` takes: it refuses dots."""
    return path.replace(".", "/")


def path_without_adapters(name: str) -> str | None:
    """Return the name that PEFT found before it wrapped a layer; None for the layers it added."""
    parts = name.split(".")
    if any(part.startswith("lora_") for part in parts):
        return None
    return ".".join(part for part in parts if part != "base_layer")
