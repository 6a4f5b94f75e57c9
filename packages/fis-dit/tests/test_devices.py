"""Where tensors are: blocks on several devices, models that move, the commands' --device, real cards.

Two cards are stood in for by fake tensors, which compute nothing and refuse to mix devices.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from fis_dit_pipelines import call
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fis_dit.adapters.apply import FISHandle, apply_fis
from fis_dit.adapters.block_scores import score_blocks
from fis_dit.adapters.registry import find_adapter
from fis_dit.commands import bench
from fis_dit.config import BenchConfig, DemoConfig, FISConfig, GenerateConfig, PlanConfig
from fis_dit.method.neighbours import find_neighbours, make_frame_index
from fis_dit.method.skipped_frames import fill_skipped_attention, fill_skipped_frames, gather_frames

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
    blocks = getattr(model, find_adapter(model).blocks)
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
    return handle._attachments[0].geometry.sparse_hooks


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
        found = [hook.frame_index.anchors.device for hook in sparse_hooks(handle)]
    assert found == [FIRST, SECOND]


def test_a_model_that_moves_takes_its_index_tensors_along(tiny_wan, mode) -> None:
    move(tiny_wan.model, FIRST, mode)
    with apply_fis(tiny_wan.model, CONFIG) as handle:
        for device in (FIRST, SECOND):
            move(tiny_wan.model, device, mode)
            for _ in range(2):
                assert forward(tiny_wan, mode, device).device == device
            assert {hook.frame_index.order.device for hook in sparse_hooks(handle)} == {device}


def test_a_plan_is_not_copied_where_it_is_used_on_its_device(tiny_wan) -> None:
    with apply_fis(tiny_wan.model, CONFIG) as handle:
        tiny_wan()
        plan = sparse_hooks(handle)[0].frame_index
        tiny_wan()
        assert sparse_hooks(handle)[0].frame_index is plan
    assert plan.to(torch.device("cpu")) is plan


def test_frames_are_gathered_where_the_tokens_are_and_lifted_where_the_output_is(mode) -> None:
    plan = make_frame_index(find_neighbours(7, (0, 2, 4, 6)), FIRST)
    hidden = torch.empty(1, 28, 8, device=SECOND)
    assert gather_frames(hidden, plan).device == SECOND
    computed = torch.empty(1, 16, 8, device=FIRST)
    for lift in ("residual", "hold", "carry", "state"):
        assert fill_skipped_frames(hidden, computed, plan, lift).device == FIRST
    assert fill_skipped_attention(torch.empty(1, 16, 8, device=SECOND), plan).device == SECOND


def test_block_scores_of_blocks_on_two_devices(tiny, monkeypatch) -> None:
    family = tiny("wan")
    # A score is a number, which fake tensors do not have.
    monkeypatch.setattr(FakeTensor, "__float__", lambda value: 0.5, raising=False)
    with FakeTensorMode() as mode:
        move(family.model, FIRST, mode)
        split_over_two_devices(family.model, mode)
        run = lambda: forward(family, mode, FIRST)  # noqa: E731
        scores = score_blocks(family.model, run, FISConfig()).scores
    assert scores == (0.5,) * 4


@pytest.mark.parametrize("applied", ["before", "after"])
@pytest.mark.parametrize("changes", [{}, {"kv": "full"}, {"kv": "full", "sites": "attn"}])
def test_weights_may_be_offloaded_one_by_one_before_or_after_and_removal_keeps_it_so(
    tiny_wan, changes: dict[str, Any], applied: str
) -> None:
    config, dense = dataclasses.replace(CONFIG, **changes), tiny_wan()
    with apply_fis(tiny_wan.model, config):
        plain = tiny_wan()
    if applied == "after":
        accelerate.cpu_offload(tiny_wan.model, torch.device("cpu"))
    with apply_fis(tiny_wan.model, config):
        if applied == "before":
            accelerate.cpu_offload(tiny_wan.model, torch.device("cpu"))
        assert tiny_wan.model.blocks[1].scale_shift_table.is_meta  # outside of its forward
        torch.testing.assert_close(tiny_wan(), plain)
    assert torch.equal(tiny_wan(), dense)
    accelerate.hooks.remove_hook_from_submodules(tiny_wan.model)
    assert torch.equal(tiny_wan(), dense)


def test_bench_reads_peak_memory_of_its_own_device_anew_for_every_forward(
    tiny_wan, monkeypatch
) -> None:
    asked: list[tuple[str, torch.device]] = []
    peaks = iter([5, 4, 3, 2])

    def peak(device: torch.device) -> int:
        asked.append(("read", device))
        return next(peaks) * 2**30

    monkeypatch.setattr(bench, "synchronize", lambda device: None)
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda device: asked.append(("reset", device))
    )
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peak)
    arms = {"dense": FISConfig(stride=1), "block-n2": CONFIG}
    config = BenchConfig(repeats=2, warmup=1)
    measured = bench._time_forwards(config, tiny_wan.model, tiny_wan.inputs(1, 7), arms, SECOND)
    warm_up, timed = len(arms) * config.warmup, len(arms) * config.repeats
    assert [word for word, _ in asked] == ["reset"] * warm_up + ["reset", "read"] * timed
    assert {device for _, device in asked} == {SECOND}
    assert measured["dense"].peak_gib == [5, 3]
    assert measured["block-n2"].peak_gib == [4, 2]


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


@pytest.mark.cuda
@pytest.mark.parametrize("sites", ["block", "attn"])
def test_a_model_on_a_card_gives_what_it_gives_on_the_cpu(family, sites: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    inputs = family.inputs(1, 7)
    with (
        apply_fis(family.model, dataclasses.replace(CONFIG, sites=sites)) as handle,
        torch.no_grad(),
    ):
        expected = family()
        family.model.to("cuda")  # moved after it was made sparse
        placed = {name: to_card(value) for name, value in inputs.items()}
        for _ in range(2):
            found = family.model(**placed, return_dict=False)[0]
            torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
        assert {hook.frame_index.order.device.type for hook in sparse_hooks(handle)} == {"cuda"}
    family.model.to("cpu")


def to_card(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(to_card(item) for item in value)
    return value.to("cuda") if isinstance(value, Tensor) else value


@pytest.mark.cuda
def test_bench_on_a_card_reports_the_memory_of_its_forwards(tmp_path, capsys) -> None:
    words = ("--repeats", "2", "--warmup", "1", "--settings", "block-n2", "--out", str(tmp_path))
    assert call("bench", *words, "--device", "cuda", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert "cuda" in told["environment"]["device"]
    peaks = [row["metrics"]["peak GiB"]["mean"] for row in told["rows"]]

    # At least the weights of 5 million parameters; far less than a card has.
    weights = 2 * 5e6 / 2**30
    assert all(0.5 * weights < peak < 2 for peak in peaks)
    assert peaks[1] < peaks[0] * 1.1


@pytest.mark.cuda
def test_the_demos_models_on_a_card_give_the_clips_of_the_cpu() -> None:
    from fis_dit.demo.arms import make_fis_arm, run_arm
    from fis_dit.demo.data import draw_noise
    from fis_dit.demo.models import load_model

    noise, prompt = draw_noise("shapes", 4, seed=1)
    arm = make_fis_arm("FIS")
    clips = [
        run_arm(load_model("shapes", "student").to(device), arm, noise, prompt).clips
        for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(clips[1], clips[0], rtol=1e-2, atol=1e-2)
