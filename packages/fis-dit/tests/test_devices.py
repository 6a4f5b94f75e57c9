"""Where tensors are: blocks on several devices, models that move, the commands' --device, real cards.

Two cards are stood in for by fake tensors, which compute nothing and refuse to mix devices.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fis_dit.adapters.apply import FISHandle, apply_fis
from fis_dit.adapters.table import adapter_of
from fis_dit.cli import COMMANDS
from fis_dit.config import BenchConfig, DemoConfig, FISConfig, GenerateConfig, PlanConfig
from fis_dit.frames import frame_tensors, gather_frames, lift_attention, lift_block, neighbours

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")
SPLIT = 2  # the first block on the second device
CONFIG = FISConfig(dense_head=1, dense_tail=1)


@pytest.fixture
def mode() -> Iterator[FakeTensorMode]:
    with FakeTensorMode() as fake, torch.no_grad():
        yield fake


def on(device: torch.device, mode: FakeTensorMode, value: Any) -> Any:
    """The tensors of a value as fake ones on a device."""
    if isinstance(value, tuple):
        return tuple(on(device, mode, item) for item in value)
    if not isinstance(value, Tensor):
        return value
    shape = torch.empty(value.shape, dtype=value.dtype, device="meta")
    return FakeTensor(mode, shape, device)


def move(module: nn.Module, device: torch.device, mode: FakeTensorMode) -> None:
    """What ``module.to(device)`` does, which fake tensors refuse."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                fake = on(device, mode, value)
                part._parameters[name] = nn.Parameter(fake, requires_grad=False)
        for name, value in part._buffers.items():
            part._buffers[name] = on(device, mode, value)


class Align(AlignDevicesHook):
    """accelerate's hook on weights that are in place already."""

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module


def split_over_two_devices(model: nn.Module, mode: FakeTensorMode) -> None:
    """As ``device_map`` does: the last blocks, and what follows them, on the second device."""
    blocks = getattr(model, adapter_of(model).blocks)
    late = [module for name, module in model.named_children() if name in ("norm_out", "proj_out")]
    late += [model.norm_final] if hasattr(model, "norm_final") else []
    for part in (*blocks[SPLIT:], *late):
        move(part, SECOND, mode)
    for part in (*blocks, *late):
        second = any(part is other for other in (*blocks[SPLIT:], *late))
        for module in part.modules():
            add_hook_to_module(module, Align(SECOND if second else FIRST), append=True)
    add_hook_to_module(model, Align(FIRST, io_same_device=True))


def forward(family: Any, mode: FakeTensorMode, device: torch.device) -> Tensor:
    inputs = {name: on(device, mode, value) for name, value in family.inputs(1, 7).items()}
    return family.model(**inputs, return_dict=False)[0]


def sparse_hooks(handle: FISHandle) -> list[Any]:
    return handle._attached[0].geometry._sparse


# Forwards of HunyuanVideo 1.5 and Mochi depend on values, which fake tensors do not have.
@pytest.mark.parametrize(
    ("name", "changes", "applied"),
    [
        ("wan", {}, "before"),
        ("wan", {}, "after"),
        ("wan", {"sites": "attn"}, "after"),
        ("wan", {"kv": "full"}, "before"),
        ("wan", {"kv": "full"}, "after"),
        ("wan", {"kv": "full", "sites": "attn"}, "after"),
        ("wan-per-token", {"kv": "full"}, "after"),
        ("cogvideox", {}, "after"),
    ],
)
def test_blocks_on_two_devices_run(
    name: str, changes: dict[str, Any], applied: str, tiny: Callable[..., Any], mode
) -> None:
    family = tiny(name)
    move(family.model, FIRST, mode)
    if applied == "after":
        split_over_two_devices(family.model, mode)
    with apply_fis(family.model, dataclasses.replace(CONFIG, **changes)) as handle:
        if applied == "before":
            split_over_two_devices(family.model, mode)
        for _ in range(2):
            assert forward(family, mode, FIRST).device == FIRST
        found = [hook.plan.anchors.device for hook in sparse_hooks(handle)]
    assert found == [FIRST, SECOND]


def test_a_model_that_moves_takes_its_index_tensors_along(tiny_wan, mode) -> None:
    move(tiny_wan.model, FIRST, mode)
    with apply_fis(tiny_wan.model, CONFIG) as handle:
        for device in (FIRST, SECOND):
            move(tiny_wan.model, device, mode)
            for _ in range(2):
                assert forward(tiny_wan, mode, device).device == device
            assert {hook.plan.order.device for hook in sparse_hooks(handle)} == {device}


def test_a_plan_is_not_copied_where_it_is_used_on_its_device(tiny_wan) -> None:
    with apply_fis(tiny_wan.model, CONFIG) as handle:
        tiny_wan()
        plan = sparse_hooks(handle)[0].plan
        tiny_wan()
        assert sparse_hooks(handle)[0].plan is plan
    assert plan.to(torch.device("cpu")) is plan


def test_frames_are_gathered_where_the_tokens_are_and_lifted_where_the_output_is(mode) -> None:
    plan = frame_tensors(neighbours(7, (0, 2, 4, 6)), FIRST)
    hidden = torch.empty(1, 28, 8, device=SECOND)
    assert gather_frames(hidden, plan).device == SECOND
    computed = torch.empty(1, 16, 8, device=FIRST)
    for lift in ("residual", "hold", "carry", "state"):
        assert lift_block(hidden, computed, plan, lift).device == FIRST
    assert lift_attention(torch.empty(1, 16, 8, device=SECOND), plan).device == SECOND


def test_block_scores_of_blocks_on_two_devices(tiny, monkeypatch) -> None:
    from fis_dit import planning

    family = tiny("wan")
    # A score is a number, which fake tensors do not have.
    monkeypatch.setattr(FakeTensor, "__float__", lambda value: 0.5, raising=False)
    with FakeTensorMode() as mode:
        move(family.model, FIRST, mode)
        split_over_two_devices(family.model, mode)
        scores, _ = planning.block_scores(
            family.model, lambda: forward(family, mode, FIRST), FISConfig()
        )
    assert scores == [0.5] * 4


def call(*words: str) -> int:
    from effml_common.cli import main

    return main("fis-dit", "fis-dit", COMMANDS, list(words))


COMPUTE = {
    "demo": (),
    "plan": ("nowhere", "--prompts", "nothing.txt"),
    "generate": ("nowhere",),
    "bench": (),
}


@pytest.mark.parametrize("command", COMPUTE)
@pytest.mark.parametrize(("device", "told"), [("tpu", "unknown"), ("cuda:99", "not there")])
def test_a_device_that_is_not_there_is_one_line(
    command: str, device: str, told: str, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(command, *COMPUTE[command], "--device", device) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: device {device}" if told != "unknown" else "error: device ")
    assert told in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", [BenchConfig, DemoConfig, GenerateConfig, PlanConfig])
def test_a_command_that_computes_chooses_its_device(config: Any) -> None:
    assert config.__dataclass_fields__["device"].default == "auto"
