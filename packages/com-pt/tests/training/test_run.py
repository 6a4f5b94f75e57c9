"""Chains: repeated to the bit after a stop, the same over processes, exported, accounted for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from com_pt_tiny import clip_chain, llama_settings, spec, task_of
from safetensors.torch import load_file

from com_pt.training import run_folder
from com_pt.training.chain import parse_chain
from com_pt.training.plan import plan_chain
from com_pt.training.run import run_chain
from com_pt.training.trainer import StageTrainer
from effml_common import checkpoint
from effml_common.errors import InputError, Interrupted, NonFiniteError

HERE = Path(__file__).parent
TESTS = HERE.parent  # conftest.py and the helpers


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Interrupt at the given update of the whole process, as a signal would, after a checkpoint."""
    step, seen = StageTrainer._step, []

    def stopping(self, *args):
        seen.append(1)
        if len(seen) == number:
            raise Interrupted(15)
        return step(self, *args)

    monkeypatch.setattr(StageTrainer, "_step", stopping)


SLOW_UPDATES = [pytest.param(update, marks=pytest.mark.slow) for update in (7, 18)]


@pytest.mark.parametrize("update", [13, *SLOW_UPDATES])
def test_an_interrupted_chain_resumes_to_the_same_bits(
    pictures, tmp_path, monkeypatch, update
) -> None:
    chain = parse_chain(clip_chain(pictures, 32, 64, save_every=5))  # 2 stages of 12 updates
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_chain(chain, whole)
    with monkeypatch.context() as patch:
        stop_at(patch, update)
        with pytest.raises(Interrupted):
            run_chain(chain, broken)
    run_chain(chain, broken, resume=True)
    assert same(whole / "W32", broken / "W32")
    assert same(whole / "W64", broken / "W64")
    for stage in ("stage-1-W32", "stage-2-W64"):
        lines = [(out / "run" / stage / "metrics.jsonl").read_text() for out in (whole, broken)]
        assert lines[0] == lines[1]


def test_leaving_the_optimizer_out_of_a_resumed_run_changes_it(
    pictures, tmp_path, monkeypatch
) -> None:
    chain = parse_chain(clip_chain(pictures, 32, save_every=5))
    run_chain(chain, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(Interrupted):
            run_chain(chain, tmp_path / "broken")
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda self, state: None)
    run_chain(chain, tmp_path / "broken", resume=True)
    assert not same(tmp_path / "whole" / "W32", tmp_path / "broken" / "W32")


def test_a_finished_chain_is_not_trained_again_and_a_changed_one_is_refused(
    pictures, tmp_path
) -> None:
    chain = parse_chain(clip_chain(pictures, 32))
    first = run_chain(chain, tmp_path / "out")
    assert run_chain(chain, tmp_path / "out", resume=True) == first
    with pytest.raises(ValueError, match=r"holds run/chain\.json of an earlier run"):
        run_chain(chain, tmp_path / "out")
    other = parse_chain(clip_chain(pictures, 32, lr=2e-3))
    with pytest.raises(ValueError, match=r"made with lr of W32 0\.001, not 0\.002; .*--force"):
        run_chain(other, tmp_path / "out", resume=True)
    member = next((tmp_path / "out" / "W32").glob("*.safetensors"))
    member.write_bytes(member.read_bytes()[:-1] + b"\1")
    with pytest.raises(ValueError, match="is not what was written"):
        run_chain(chain, tmp_path / "out", resume=True)


def test_weights_are_read_to_be_hashed_once(pictures, tmp_path, monkeypatch) -> None:
    """A resumed stage reads its checkpoint once, and a finished member is hashed once a run."""
    loads, hashes = [], []
    load, hash_weights = checkpoint.load, run_folder._hash_weights
    monkeypatch.setattr(checkpoint, "load", lambda path: loads.append(path.name) or load(path))
    monkeypatch.setattr(
        run_folder, "_hash_weights", lambda path: hashes.append(path.name) or hash_weights(path)
    )
    chain = parse_chain(clip_chain(pictures, 32, 48, 64, epochs=0.5, save_every=2))
    with monkeypatch.context() as patch:
        stop_at(patch, 6)  # the last update of the second stage
        with pytest.raises(Interrupted):
            run_chain(chain, tmp_path / "out")
    assert (loads, hashes) == ([], ["W32"])
    hashes.clear()
    run_chain(chain, tmp_path / "out", resume=True)
    assert loads == ["step-2"]
    assert hashes == ["W32", "W48", "W64"]


def test_a_member_that_a_machine_does_not_see_is_named(pictures, tmp_path) -> None:
    document = clip_chain(pictures, 32, 48)
    document["stages"][0]["init_from"] = str(tmp_path / "elsewhere" / "W32")
    with pytest.raises(InputError, match=r"elsewhere/W32 is not there for process 0; give a path"):
        run_chain(parse_chain(document), tmp_path / "out")


def test_the_ledger_of_a_run_adds_up_to_its_plan(pictures, tmp_path) -> None:
    chain = parse_chain(clip_chain(pictures, 32, 64))
    members = run_chain(chain, tmp_path / "out")
    plan = plan_chain(chain)
    assert sum(m.macs for m in members) == pytest.approx(48 * plan.chain)
    lines = (tmp_path / "out" / "run" / "ledger.jsonl").read_text().splitlines()
    assert [json.loads(line)["samples"] for line in lines] == [96, 96]
    alone = run_chain(chain.individual("W64"), tmp_path / "alone")
    assert sum(m.macs for m in alone) == 48 * 2 * 3 * plan.stages[1].forward


def with_projector(pictures: Path, **more) -> dict:
    # A key bias has no gradient but rounding noise, which a small eps would make an update of.
    document = clip_chain(pictures, 32, 64, epochs=0.5, eps=1e-3, **more)
    document["stages"][1]["model"]["embed_dim"] = 48
    return document


CHILD = """
import sys; sys.path[:0] = [{tests!r}, {here!r}]
import conftest
from pathlib import Path
import torch
from test_run import interrupted_once, with_projector
from com_pt.training import run_folder
from com_pt.training.chain import parse_chain
from com_pt.training.run import run_chain
from com_pt.training.trainer import StageTrainer
from torch.distributed.tensor import DTensor
run = StageTrainer.run
def checked(self, *args, **kwargs):
    kinds = {{isinstance(p, DTensor) for p in self.module.parameters()}}
    assert kinds == {{self.chain.shard}}, kinds
    return run(self, *args, **kwargs)
StageTrainer.run = checked
for shard in (False, True):
    chain = parse_chain(with_projector(Path({data!r}), accum_freq=2, shard=shard, save_every=2))
    run_chain(chain, {out!r} + ("/fsdp2" if shard else "/ddp"), device=torch.device("cpu"))
interrupted_once(chain, {out!r} + "/broken", 5, torch.device("cpu"))
"""


def interrupted_once(chain, out: str, update: int, device: torch.device) -> None:
    """Run a chain that stops in an update, and resume it."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, update)
        with pytest.raises(Interrupted):
            run_chain(chain, out, device=device)
    run_chain(chain, out, resume=True, device=device)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # six runs of two processes, on a busy machine
def test_two_processes_with_micro_batches_train_what_one_trains_with_the_whole_batch(
    pictures, tmp_path
) -> None:
    run_chain(parse_chain(with_projector(pictures)), tmp_path / "one")
    script = tmp_path / "child.py"
    script.write_text(
        CHILD.format(here=str(HERE), tests=str(TESTS), data=str(pictures), out=str(tmp_path))
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(script)], env=env, capture_output=True, text=True,
                          timeout=1100)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "over 2 processes" in done.stderr
    kept = "run/stage-2-W64/checkpoints/*/model.safetensors"
    projectors = {
        out: {k: v for k, v in load_file(next((tmp_path / out).glob(kept))).items() if "proj" in k}
        for out in ("one", "ddp", "fsdp2")
    }
    assert {"feature_loss.projectors.image.weight"} <= projectors["one"].keys()
    for out in ("ddp", "fsdp2"):
        for member in ("W32", "W64"):
            one, two = weights(tmp_path / "one" / member), weights(tmp_path / out / member)
            for name, value in one.items():
                torch.testing.assert_close(two[name], value, atol=1e-5, rtol=0)
        for name, value in projectors["one"].items():
            torch.testing.assert_close(projectors[out][name], value, atol=1e-5, rtol=0)
    # Shards are gathered into a checkpoint and cut again.
    assert same(tmp_path / "fsdp2" / "W64", tmp_path / "broken" / "W64")


HOST = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("com_pt", "effml_common"):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
import torch
{body}
torch.save(out, {path!r})
"""


def in_host_library(body: str, path: Path) -> torch.Tensor:
    code = HOST.format(body=body, path=str(path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(path, weights_only=True)


@pytest.mark.slow
def test_a_clip_member_loads_in_open_clip_without_this_package(pictures, tmp_path) -> None:
    document = clip_chain(pictures, 32, 48, epochs=0.5)
    document["stages"][1]["model"] = spec(
        32, text=48
    )  # lossless there changes the text tower's eps
    chain = parse_chain({**document, "growth": "lossless"})
    run_chain(chain, tmp_path / "out")
    task = task_of(pictures)
    model = task.load(tmp_path / "out" / "W48", None).eval()
    assert model.ln_final.eps == pytest.approx(1e-5 * 32 / 48)
    images, ids = task.collate([task[i] for i in range(4)])
    torch.save([images, ids[:, 0]], tmp_path / "inputs.pt")
    body = (
        "import open_clip\n"
        f"model = open_clip.create_model('local-dir:{tmp_path}/out/W48').eval()\n"
        f"images, ids = torch.load({str(tmp_path / 'inputs.pt')!r}, weights_only=True)\n"
        "with torch.no_grad(): out = torch.cat([model.encode_image(images), model.encode_text(ids)])"
    )
    theirs = in_host_library(body, tmp_path / "out.pt")
    with torch.no_grad():
        ours = torch.cat([model.encode_image(images), model.encode_text(ids[:, 0])])  # pyright: ignore
    torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=0)


def vit_spec(width: int) -> dict:
    return {"name": "vit_tiny_patch16_224", "img_size": 8, "patch_size": 4, "embed_dim": width,
            "depth": 2, "num_heads": width // 16}  # fmt: skip


@pytest.mark.slow
def test_a_timm_chain_trains_and_its_members_load_in_timm(pictures, tmp_path) -> None:
    rows = "\n".join(f"{i}.png,{i % 3}" for i in range(48))
    (pictures / "labels.csv").write_text(f"path,label\n{rows}\n")
    data = {"train": str(pictures / "labels.csv"), "val": str(pictures / "labels.csv"), "classes": 3,
            "image_size": 8, "crop_scale": [0.8, 1.0]}  # fmt: skip
    stages = [{"name": f"W{w}", "model": vit_spec(w)} for w in (32, 48)]
    document = {"task": "classify", "data": data, "stages": stages, "epochs": 6, "batch_size": 16,
                "lr": 2e-3, "warmup_steps": 2, "accum_freq": 2, "grad_checkpointing": True}  # fmt: skip
    members = run_chain(parse_chain(document), tmp_path / "out")
    assert members[-1].metrics["top-1"] > 0.9
    body = (
        "import timm\n"
        f"model = timm.create_model('local-dir:{tmp_path}/out/W48', pretrained=True).eval()\n"
        "with torch.no_grad(): out = model(torch.ones(1, 3, 8, 8))"
    )
    theirs = in_host_library(body, tmp_path / "out.pt")
    from com_pt.adapters.timm_models import load_timm

    with torch.no_grad():
        ours = load_timm(tmp_path / "out" / "W48").eval()(torch.ones(1, 3, 8, 8))
    torch.testing.assert_close(theirs, ours)


@pytest.mark.slow
def test_a_llama_chain_trains_and_its_members_load_in_transformers(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "text.txt").write_text("abcdefgh" * 400)
    data = {"train": str(tmp_path / "*.txt"), "val": str(tmp_path / "*.txt"), "length": 16}
    stages = [{"name": f"W{w}", "model": llama_settings(w)} for w in (32, 48)]
    document = {"task": "causal-lm", "data": data, "stages": stages, "epochs": 2, "batch_size": 8,
                "lr": 5e-3, "warmup_steps": 5, "growth": "lossless"}  # fmt: skip
    members = run_chain(parse_chain(document), tmp_path / "out")
    assert members[0].metrics["loss"] < 1
    assert members[1].start["loss"] == pytest.approx(members[0].metrics["loss"], abs=1e-4)
    assert members[1].metrics["loss"] < members[0].metrics["loss"]
    ids = torch.tensor([[97, 98, 99]])
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out" / "W48")
    body = (
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained('{tmp_path}/out/W48')\n"
        "with torch.no_grad(): out = model(torch.tensor([[97, 98, 99]])).logits"
    )
    with torch.no_grad():
        torch.testing.assert_close(in_host_library(body, tmp_path / "o.pt"), model(ids).logits)
    assert model.config.rms_norm_eps == pytest.approx(1e-6 * 32 / 48)


def test_a_first_member_that_is_finished_already_is_taken_as_it_is(pictures, tmp_path) -> None:
    run_chain(parse_chain(clip_chain(pictures, 32)), tmp_path / "first")
    document = clip_chain(pictures, 32, 64)
    document["stages"][0]["init_from"] = str(tmp_path / "first" / "W32")
    members = run_chain(parse_chain(document), tmp_path / "out")
    assert (members[0].steps, members[0].macs) == (0, 0.0)
    assert same(tmp_path / "first" / "W32", tmp_path / "out" / "W32")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_term(
    pictures, tmp_path, monkeypatch
) -> None:
    from com_pt.training.tasks.clip import ClipTask

    monkeypatch.setattr(
        ClipTask, "loss", lambda self, out: {"contrastive": out["image"].sum() * float("nan")}
    )
    with pytest.raises(NonFiniteError, match="contrastive is nan at step 1"):
        run_chain(parse_chain(clip_chain(pictures, 32)), tmp_path / "out")


def test_half_precision_on_the_cpu_trains_in_bfloat16(pictures, tmp_path) -> None:
    chain = parse_chain(clip_chain(pictures, 32, 64, precision="bf16", epochs=0.5))
    members = run_chain(chain, tmp_path / "out")
    assert members[1].steps == 3
    assert all(v.dtype == torch.float32 for v in weights(tmp_path / "out" / "W64").values())


def test_a_predecessor_at_chance_is_warned_about(tmp_path, capsys) -> None:
    pytest.importorskip("sklearn")
    from com_pt.demo.models import pair_model

    stages = [{"name": n, "model": pair_model(w, w)} for n, w in (("T", 16), ("S", 32))]
    document = {"task": "com_pt.demo.data:DigitPairs", "data": {"pairs": 64, "held_out": 100},
                "stages": stages, "epochs": 1, "batch_size": 32, "lr": 1e-9}  # fmt: skip
    run_chain(parse_chain(document), tmp_path / "out")
    assert "T is at chance" in capsys.readouterr().err
    run_chain(parse_chain({**document, "allow_weak": True}), tmp_path / "quiet")
    assert "at chance" not in capsys.readouterr().err


def test_a_damaged_checkpoint_is_replaced_when_its_update_comes_again(
    pictures, tmp_path, monkeypatch, capsys
) -> None:
    chain = parse_chain(clip_chain(pictures, 32, save_every=5))  # 12 updates
    with monkeypatch.context() as patch:
        stop_at(patch, 12)
        with pytest.raises(Interrupted):
            run_chain(chain, tmp_path / "out")
    root = tmp_path / "out/run/stage-1-W32/checkpoints"
    (root / "step-10" / "trainer.pt").write_bytes(b"")
    with monkeypatch.context() as patch:
        stop_at(patch, 7)  # the second run starts after update 5
        with pytest.raises(Interrupted):
            run_chain(chain, tmp_path / "out", resume=True)
    assert checkpoint.verify(root / "step-10") == 10


def test_a_chain_on_a_single_pair_is_trained(pictures, tmp_path) -> None:
    table = pictures / "captions.tsv"
    table.write_text("\n".join(table.read_text().splitlines()[:2]) + "\n")
    chain = parse_chain(clip_chain(pictures, 32, 48, batch_size=1))
    assert [member.steps for member in run_chain(chain, tmp_path / "out")] == [2, 2]
