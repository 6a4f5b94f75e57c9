"""Weights, gradients and AdamW's moments spread over processes, by PyTorch's FSDP2.

accelerate shards on GPUs only; ``fully_shard`` itself runs on CPUs too, where tests compare it with one
process. Every process grows the whole model first, so that growth never sees a shard.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from effml_common.checkpoint import Checkpoint


def shard(module: nn.Module, device: torch.device) -> None:
    """Shard a module in place over all processes: its repeated blocks one by one, and the rest.

    Parameters without dimensions, which FSDP2 refuses, get one.

    Args:
        module: The same, whole, on every process.
        device: Where it is.
    """
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # A scale such as CLIP's has no dimension.
    for owner in module.modules():
        for name, parameter in [*owner.named_parameters(recurse=False)]:
            if parameter.dim() == 0:
                owner.register_parameter(name, nn.Parameter(parameter.detach().reshape(1)))

    # Blocks first, so that each is gathered by itself; gloo cannot average, a sum divided is the same.
    mesh: Any = init_device_mesh(device.type, (get_world_size(),))
    for unit in (*blocks_of(module), module):
        fully_shard(unit, mesh=mesh).set_force_sum_reduction_for_comms(True)  # pyright: ignore


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Return the members of lists of two or more modules of one composite class, inner ones first."""
    blocks = []
    for owner in [*module.modules()][::-1]:
        if isinstance(owner, nn.ModuleList | nn.Sequential):
            children = [*owner]
            alike = len({type(child) for child in children}) == 1 and len(children) > 1
            if alike and [*children[0].children()]:
                blocks += children
    return blocks


def gather_shards(tree: Any) -> Any:
    """Gather every shard in a nest of dicts, lists and tuples; all processes must call it."""
    if isinstance(tree, DTensor):
        return tree.full_tensor().detach()
    if isinstance(tree, Mapping):
        return {key: gather_shards(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gather_shards(value) for value in tree)
    return tree


def own_shards(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return this process's part of each tensor, without copying; whole tensors are their own part."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def split_checkpoint(checkpoint: Checkpoint, module: nn.Module, optimizer: Any) -> Checkpoint:
    """Split a checkpoint of complete tensors as the module's parameters are."""
    # Weights under the names of the module.
    like = module.state_dict()
    tensors = {name: _split(tensor, like.get(name)) for name, tensor in checkpoint.tensors.items()}

    # Moments are as large as their parameter; a step count is not split.
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = checkpoint.state["optimizer"]
    moments = {
        i: {
            key: _split(value, parameters[i]) if value.shape == parameters[i].shape else value
            for key, value in parameter_state.items()
        }
        for i, parameter_state in state["state"].items()
    }
    changed = {**checkpoint.state, "optimizer": {**state, "state": moments}}
    return replace(checkpoint, tensors=tensors, state=changed)


def _split(tensor: Tensor, like: Any) -> Tensor:
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def load_gathered(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put gathered weights into a model that was never sharded."""
    own = model.state_dict()
    model.load_state_dict({name: value.reshape(own[name].shape) for name, value in tensors.items()})
