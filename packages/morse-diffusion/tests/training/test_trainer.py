"""Training: that it learns, repeats itself after an interruption, and equals itself over processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from morse_tiny import SCHEDULE, ddim, tiny_conditional_unet, tiny_unet

from effml_common.errors import ConfigError, Interrupted, NonFiniteError
from morse_diffusion.adapters.dot import MorseDot
from morse_diffusion.adapters.estimate import GuidedDash
from morse_diffusion.adapters.schedulers import process_of
from morse_diffusion.method.objective import draw, make_pair, min_snr_weight, residual_losses
from morse_diffusion.training.data import TrainingData
from morse_diffusion.training.trainer import DotTrainer, LoopConfig

HERE = Path(__file__).parent


def trainer(steps: int = 8, dtype=torch.float32, **settings) -> DotTrainer:
    unet = tiny_unet(side=8).to(dtype)
    process = process_of(ddim())
    torch.manual_seed(0)
    dot = MorseDot.build(unet, m=1, channels=(4,), lora_rank=2).to(dtype)
    images = torch.randn((32, 3, 8, 8), generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    loop = LoopConfig(**{"steps": steps, "batch": 8, "lr": 1e-3, "save_every": 3, **settings})
    dash = GuidedDash(unet, process, "epsilon")
    return DotTrainer(dash, dot, process, TrainingData(clean=images.to(dtype)), loop)


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def weights(made: DotTrainer) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in made.dot.state_dict().items()}


def test_a_pair_is_algorithm_one_of_the_paper() -> None:
    # Written out again from the paper with diffusers' own add_noise and step.
    unet, scheduler = tiny_unet(side=8), ddim()
    process, generator = process_of(scheduler), torch.Generator().manual_seed(4)
    clean = torch.randn(3, 3, 8, 8)
    dash = GuidedDash(unet, process, "epsilon")
    pair = make_pair(dash, process, clean, draw(process, clean.shape, seeded(4)))
    t_s, t_o = process.draw_pair(3, generator)
    noise = torch.randn(clean.shape, generator=generator)
    x_s = scheduler.add_noise(clean, noise, t_s.long())
    with torch.no_grad():
        z_s = unet(x_s, t_s).sample
    level = scheduler.alphas_cumprod
    x_o = torch.stack([
        level[int(o)].sqrt() * (x - (1 - level[int(s)]).sqrt() * z) / level[int(s)].sqrt()
        + (1 - level[int(o)]).sqrt() * z
        for x, z, s, o in zip(x_s, z_s, t_s, t_o, strict=True)
    ])  # fmt: skip
    with torch.no_grad():
        z_o = unet(x_o, t_o).sample
    for ours, theirs in ((pair.x_s, x_s), (pair.z_s, z_s), (pair.x_o, x_o), (pair.z_o, z_o)):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    loss, repeated = residual_losses(lambda *_: z_o - z_s, pair)
    assert float(loss.max()) < 1e-9
    torch.testing.assert_close(repeated, (z_o - z_s).square().mean(dim=(1, 2, 3)))


def test_guidance_is_one_scale_per_sample_on_the_guided_estimate() -> None:
    unet, process = tiny_conditional_unet(), process_of(ddim())
    text, empty = torch.randn(4, 7, 32), torch.randn(1, 7, 32)
    dash = GuidedDash(unet, process, "epsilon", {"encoder_hidden_states": empty})
    clean = torch.randn(4, 4, 16, 16)
    draws = draw(process, clean.shape, seeded(0), guidance=(2.0, 10.0))
    pair = make_pair(dash, process, clean, draws, cond={"encoder_hidden_states": text})
    w = pair.cond["w"]
    assert bool(((w >= 2) & (w <= 10)).all())
    assert len(set(w.tolist())) == 4
    with torch.no_grad():
        c = unet(pair.x_s, pair.t_s, text).sample
        u = unet(pair.x_s, pair.t_s, empty.expand(4, -1, -1)).sample
    torch.testing.assert_close(pair.z_s, u + w.view(-1, 1, 1, 1) * (c - u), atol=1e-4, rtol=1e-4)


def test_a_rolled_out_pair_lands_where_a_dot_step_in_the_middle_leads() -> None:
    unet, process = tiny_unet(side=8), process_of(ddim())
    dash, clean = GuidedDash(unet, process, "epsilon"), torch.randn(4, 3, 8, 8)
    called = []

    def middle(x_s, x_i, z_s, t_s, t_i, cond=None):
        called.append((t_s, t_i))
        return torch.zeros_like(z_s)

    draws = draw(process, clean.shape, seeded(0))
    plain = make_pair(dash, process, clean, draws)
    rolled = make_pair(dash, process, clean, draws, middle=middle)
    # A Dot that returns zero does not leave the straight jump.
    torch.testing.assert_close(rolled.x_o, plain.x_o, atol=1e-3, rtol=1e-3)
    t_s, t_m = called[0]
    assert bool(((t_m <= t_s) & (t_m > plain.t_o)).all())


@pytest.mark.slow
def test_training_learns_and_leaves_the_average_of_the_weights(tmp_path) -> None:
    made = trainer(steps=40, lr=3e-3, rollout=0.1)
    left = made.run(tmp_path / "run")
    assert left < 0.9
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 40
    assert lines[-1]["residual left"] == pytest.approx(left)
    assert all(torch.equal(v, made.average[k]) for k, v in made.dot.named_parameters())


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, monkeypatch) -> None:
    whole = trainer()
    whole.run(tmp_path / "whole")
    first = trainer()
    step = first._step

    def stopping(number, root, stop):
        if number == 6:
            raise Interrupted(2)
        return step(number, root, stop)

    monkeypatch.setattr(first, "_step", stopping)
    with pytest.raises(Interrupted):
        first.run(tmp_path / "run")
    again = trainer()
    again.run(tmp_path / "run", resume=True)
    assert {k for k, v in weights(again).items() if not torch.equal(v, weights(whole)[k])} == set()
    assert again.unexplained == whole.unexplained
    read = [(tmp_path / n / "metrics.jsonl").read_text() for n in ("whole", "run")]
    assert read[0] == read[1]


def test_a_run_that_does_not_learn_warns(capsys) -> None:
    trainer(lr=1e-9).run()
    assert "the Dot is not learning" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    made = trainer()
    made.data.clean[:] = float("nan")
    with pytest.raises(NonFiniteError, match=r"squared residual is nan .* at step 1"):
        made.run()


def test_min_snr_weighs_errors_down_where_the_signal_is_strong() -> None:
    process, t = process_of(ddim()), torch.tensor([5.0, 900.0])
    level = process.levels[t.long()]
    snr = level / (1 - level)
    ours = min_snr_weight(process, t).double()
    torch.testing.assert_close(
        ours, torch.minimum(snr, torch.tensor(5.0)) / snr, atol=1e-6, rtol=1e-4
    )
    assert float(ours[0]) < 0.1
    assert float(ours[1]) == 1


def test_too_little_data_or_an_uneven_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match="32 training samples are fewer than one batch of 64"):
        trainer(batch=64)


CHILD = """
import sys; sys.path[:0] = [{helpers!r}, {here!r}]
import torch; torch.set_num_threads(1)
from safetensors.torch import save_file
from test_trainer import trainer
made = trainer(steps=3, dtype=torch.float64)
made.run()
if made.accelerator.is_main_process:
    save_file(dict(made.dot.state_dict()), {out!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2])
def test_two_processes_train_the_same_dot_as_one(processes, tmp_path) -> None:
    alone = trainer(steps=3, dtype=torch.float64)
    alone.run()
    out, script = tmp_path / "dot.safetensors", tmp_path / "child.py"
    script.write_text(CHILD.format(helpers=str(HERE.parent), here=str(HERE), out=str(out)))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, f"--nproc-per-node={processes}", str(script)],
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    from safetensors.torch import load_file

    together = load_file(out)
    for name, value in weights(alone).items():
        torch.testing.assert_close(together[name], value, atol=1e-6, rtol=0)


def test_the_schedule_of_the_demo_is_the_one_of_its_tests() -> None:
    from morse_diffusion.demo.models import SCHEDULE as DEMO

    assert DEMO["num_train_timesteps"] == 1000
    assert set(SCHEDULE) <= set(DEMO)
