"""The trainer: bad numbers on a device that is not waited for, fp16's scaler, memory, compiling."""

import gc
import math
from types import SimpleNamespace

import pytest
import torch
from com_pt_tiny import clip, clip_chain, llama, task_of
from torch import nn

from com_pt.adapters.accelerator import make_accelerator
from com_pt.training import prepare, trainer
from com_pt.training.chain import parse_chain
from com_pt.training.optimizer import is_fused, make_optimizer, with_own_settings
from com_pt.training.overflow import OverflowCounter
from com_pt.training.run import run_chain
from com_pt.training.stage_model import StageModel
from com_pt.training.step import train_step
from com_pt.training.trainer import StageTrainer
from effml_common.errors import NonFiniteError
from effml_common.stopping import StepMonitor

CPU = torch.device("cpu")


class Scaler:
    """fp16's scaler as the counter sees it: the scale halves with every skipped update."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def get_scale(self) -> float:
        return self.scale


def test_fp16_stops_only_when_a_lower_scale_cannot_help(tmp_path) -> None:
    scaler = Scaler(65536.0)
    counter = OverflowCounter(scaler, CPU)
    # Sixteen skips in a row bring the scale from 65536 to 1: that is how it finds its scale.
    for step in range(1, 17):
        counter.count(torch.tensor(math.inf))
        scaler.scale /= 2
        assert counter.read(step, tmp_path) == step
    counter.count(torch.tensor(3.0))
    assert counter.read(17, tmp_path) == 16
    counter.count(torch.tensor(math.nan))
    scaler.scale /= 2
    with pytest.raises(NonFiniteError, match=r"fp16 at step 18, and their scale is down to 0\.5"):
        counter.read(18, tmp_path)


class Broken(nn.Module):
    """A loss that is NaN from the third update on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.calls = 0


def step_of(module: Broken, optimizer, monitor: StepMonitor, step: int) -> None:
    """An update of the real step, of a task that is as small as can be."""
    bad = math.nan if step == 3 else 1.0
    task = SimpleNamespace(
        streams=(),
        couples_samples=False,
        features=lambda model, batch: {"out": model.layer(batch)},
        loss=lambda outputs: {"good": outputs["out"].sum() * 0, "bad": outputs["out"].sum() * bad},
        after_step=lambda model: None,
    )
    stage = StageModel(task, module, None)  # pyright: ignore
    accelerator = make_accelerator("fp32", CPU)
    train_step(stage, stage, None, torch.ones(2, 4), optimizer, accelerator, monitor=monitor,
               step=step)  # fmt: skip


def optimizer_of(module: nn.Module, fused: bool) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), lr=0.1, fused=fused or None)


@pytest.mark.parametrize("fused", [False, True])
def test_weights_stay_as_they_were_before_the_first_bad_update(fused, tmp_path) -> None:
    module, monitor = Broken(), StepMonitor(CPU, last_good=tmp_path)
    optimizer, before = optimizer_of(module, fused), []

    def train() -> None:
        for step in range(1, 7):
            if step == 3:
                before.append({name: p.clone() for name, p in module.state_dict().items()})
            step_of(module, optimizer, monitor, step)
        # Only a fused optimizer, which leaves the update out on its own device, comes here.
        assert fused
        monitor.read()

    with pytest.raises(NonFiniteError, match=r"loss term bad is nan at step 3 .*last good"):
        train()
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[0][name])
    # The moments and their count are those of two updates, too.
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}
    assert all(state["exp_avg"].isfinite().all() for state in optimizer.state.values())


def test_a_fused_run_is_an_unfused_one_where_all_is_finite() -> None:
    weights = []
    for fused in (False, True):
        torch.manual_seed(0)
        module, monitor = Broken(), StepMonitor(CPU)
        optimizer = optimizer_of(module, fused)
        for step in (1, 2, 4, 5):
            step_of(module, optimizer, monitor, step)
        weights.append(module.layer.weight.detach())
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=0)
    assert not torch.equal(weights[0], nn.Linear(4, 4).weight)


def test_a_checkpoint_of_another_device_does_not_bring_its_kernels_along(pictures) -> None:
    chain = parse_chain(clip_chain(pictures, 32))
    module = StageModel(task_of(pictures), clip(32), None)
    states = {}
    for fused in (False, True):
        optimizer = make_optimizer(module, chain, chain.stages[0], fused=fused)
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        states[fused] = optimizer.state_dict()
        assert is_fused(optimizer) == fused
    for fused in (False, True):
        optimizer = make_optimizer(module, chain, chain.stages[0], fused=fused)
        optimizer.load_state_dict(with_own_settings(states[not fused], optimizer))
        assert is_fused(optimizer) == fused
        optimizer.step()
    assert not is_fused(make_optimizer(module, chain, chain.stages[0]))  # on a CPU


def test_a_device_is_looked_at_only_where_something_is_written(pictures, tmp_path) -> None:
    """On a CPU at every update, on a card at lines of the log and at checkpoints."""
    chain = parse_chain(clip_chain(pictures, 32, log_every=4, save_every=6))
    due = {"cpu": [], "cuda": []}
    for kind, steps in due.items():
        one = StageTrainer.__new__(StageTrainer)
        one.chain, one.steps = chain, 11
        one.accelerator = SimpleNamespace(device=torch.device(kind))
        for step in range(1, 12):
            if one._is_due(step, SimpleNamespace(requested=False)):  # pyright: ignore
                steps.append(step)
    assert due == {"cpu": [*range(1, 12)], "cuda": [4, 6, 8, 11]}


def live_bytes() -> int:
    """Bytes of every tensor that is reachable, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):  # isinstance would wake old names of torch
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_a_stage_holds_itself_and_its_predecessor_and_nothing_older(
    pictures, tmp_path, monkeypatch
) -> None:
    """Right after an update the third of a chain of three holds what the second of two does."""
    held: dict[str, int] = {}
    step, evaluate = StageTrainer._step, type(task_of(pictures)).evaluate

    def measured(self, number, *args):
        rate = step(self, number, *args)
        if number == self.steps:
            held[f"training {self.stage.name}"] = live_bytes() - before
        return rate

    def judged(self, model):
        held[f"judging {model.visual.conv1.out_channels}"] = live_bytes() - before
        return evaluate(self, model)

    monkeypatch.setattr(StageTrainer, "_step", measured)
    monkeypatch.setattr(type(task_of(pictures)), "evaluate", judged)
    document = clip_chain(pictures, 32, 48, 64, epochs=0.5)
    before = live_bytes()
    run_chain(parse_chain(document), tmp_path / "three")
    of_three, held = held, {}
    two = {**document, "stages": document["stages"][1:]}
    two["stages"][0]["init_from"] = str(tmp_path / "three" / "W48")
    before = live_bytes()
    run_chain(parse_chain(two), tmp_path / "two")
    weights = sum(4 * p.numel() for p in clip(64).parameters())
    for moment in ("training W64", "judging 64"):
        assert of_three[moment] == pytest.approx(held[moment], abs=0.02 * weights), moment
    # A finished model is judged without its moments, gradients and predecessor.
    assert held["judging 64"] < 1.1 * weights


@pytest.mark.slow
def test_compiling_changes_neither_names_nor_numbers(pictures, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(prepare, "COMPILER", "aot_eager")
    compiled = []
    monkeypatch.setattr(
        prepare, "compile_forward", lambda m, f=prepare.compile_forward: compiled.append(m) or f(m)
    )
    finals = {}
    for compile_ in (False, True):
        out = tmp_path / str(compile_)
        run_chain(parse_chain(clip_chain(pictures, 32, 48, epochs=0.5, compile=compile_)), out)
        step = next((out / "run/stage-2-W48/checkpoints").glob("step-*"))
        finals[compile_] = trainer.checkpoint.load(step).tensors
    # The first member, and in the second stage both.
    assert len(compiled) == 3
    assert finals[True].keys() == finals[False].keys()
    for name, value in finals[True].items():
        torch.testing.assert_close(value, finals[False][name], atol=1e-5, rtol=1e-4)


def test_the_predecessor_is_held_in_the_type_of_its_products(pictures) -> None:
    """Norms stay in float32; outputs are close to those of autocast on float32 weights."""
    from com_pt.training.frozen import freeze, hold_in_autocast_type

    task, model = task_of(pictures), clip(32)
    batch = task.collate([task[i] for i in range(8)])
    accelerator = make_accelerator("bf16", CPU)
    outputs = []
    for hold in (False, True):
        freeze(model, CPU)
        if hold:
            hold_in_autocast_type(model, accelerator)
        with torch.no_grad(), accelerator.autocast():
            outputs.append(task.features(model, batch))
    types = {name: p.dtype for name, p in model.named_parameters()}
    assert types["visual.transformer.resblocks.0.mlp.c_fc.weight"] == torch.bfloat16
    assert types["visual.transformer.resblocks.0.attn.in_proj_weight"] == torch.bfloat16
    assert types["visual.ln_pre.weight"] == types["positional_embedding"] == torch.float32
    for stream in ("image", "text"):
        one, other = (out[stream].float() for out in outputs)
        assert torch.cosine_similarity(one, other, dim=-1).min() > 0.999
    model = clip(32)
    hold_in_autocast_type(model, make_accelerator("fp32", CPU))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_head_that_is_tied_to_an_embedding_stays_as_exact_as_the_embedding() -> None:
    from com_pt.training.frozen import freeze, hold_in_autocast_type

    for is_tied, expected in ((False, torch.bfloat16), (True, torch.float32)):
        model = freeze(llama(tie_word_embeddings=is_tied), CPU)
        hold_in_autocast_type(model, make_accelerator("bf16", CPU))
        types = {name: p.dtype for name, p in model.named_parameters()}
        assert types["model.embed_tokens.weight"] == torch.float32
        assert types["model.layers.0.mlp.up_proj.weight"] == torch.bfloat16
        assert model.lm_head.weight.dtype == expected  # pyright: ignore
