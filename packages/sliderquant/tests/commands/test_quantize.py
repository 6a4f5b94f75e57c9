"""What a user does, through the command line."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from effml_common.cli import main
from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.files import load_model
from sliderquant.adapters.simulation import fresh_learnables, simulated_logits, simulated_weights
from sliderquant.adapters.text import calibration_samples, chunks, encode, read_documents
from sliderquant.cli import COMMANDS
from sliderquant.config import SliderConfig
from sliderquant.method.calibration import calibrate
from sliderquant.method.metrics import perplexity
from sliderquant.method.quantizer import WeightFormat, quantize_weight
from sliderquant.method.windows import make_windows

FAST = ["--nsamples", "8", "--seqlen", "64", "--epochs", "2", "--batch-size", "4"]
FAST += ["--method", "slider", "--lr-lora", "3e-3", "--lr-lwc", "3e-2", "--format", "dense"]


def run(*words: object, check: int | None = 0) -> SimpleNamespace:
    """Run a command line in this process: importing torch and transformers takes seconds."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main("sliderquant", "sliderquant", COMMANDS, list(map(str, words)))
    assert check is None or code == check, err.getvalue()
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


class Launcher:
    """Starts command lines in processes that a test may kill.

    They are forked from one process that has imported everything and computed nothing: torch refuses
    to differentiate in a fork of a process that has used autograd with a device.
    """

    def __init__(self) -> None:
        script = Path(__file__).parents[1] / "sliderquant_processes.py"
        self._server = subprocess.Popen(
            [sys.executable, script, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def _ask(self, *request: object) -> int | None:
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, *words: object, err: Path = Path(os.devnull)) -> int:
        """Run a command line; returns the number of its process."""
        return self._ask("start", list(map(str, words)), str(err))

    def wait_for(self, child: int, path: Path) -> None:
        """Wait until a path exists or the process has ended by itself."""
        self._ask("wait_for", child, str(path))

    def wait(self, child: int) -> int:
        """Exit code of a process."""
        return self._ask("wait", child)

    def kill_at(self, path: Path, delay: float, *words: object) -> None:
        """Resume a run, kill it so many seconds after a path exists, and tell how it ended.

        A path may be there from the beginning, and a run may end before it is killed.
        """
        with tempfile.NamedTemporaryFile("r") as err:
            child = self.start(*words, "--resume", "auto", err=Path(err.name))
            self.wait_for(child, path)
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            code = self.wait(child)
            # Shown if the test fails, also later.
            print(f"killed {delay:.4f} s after {path.name}: exit code {code}\n{err.read()}")
        assert code in (0, -signal.SIGKILL), f"a run ended by itself, with {code}"

    def close(self) -> None:
        self._server.communicate()


def differences(out: Path, whole: Path) -> list[str]:
    """What a run that was killed left that one that was not did not, and the other way round."""
    found = [
        f"{folder.name} alone has {path.name}"
        for folder, other in ((out, whole), (whole, out))
        for path in folder.iterdir()
        if not (other / path.name).exists()
    ]
    for name in ("model.safetensors", "config.json", "run/metrics.jsonl"):
        first, second = ((folder / name).read_bytes() for folder in (out, whole))
        if first != second:
            found.append(f"{name} differs")
            print(name, first[-5_000:], second[-5_000:], sep="\n")
    return found


@pytest.fixture(scope="module")
def launcher():
    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture(scope="module")
def quantized(model_directory, text_file, held_out_file, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("stories") / "w2"
    done = run(
        "quantize", model_directory, "--wbits", 2, "--group-size", 32, "--no-sym", "--calib",
        text_file, "--eval-text", held_out_file, "--out", out, *FAST, "--json",
    )  # fmt: skip
    return out, json.loads(done.stdout)


def test_result_loads_in_transformers_and_writes_text(quantized) -> None:
    out, _ = quantized
    model, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(told.values())
    words = AutoTokenizer.from_pretrained(out)("def ", return_tensors="pt")
    assert model.generate(**words, max_new_tokens=4, do_sample=False).shape[1] > 4


@pytest.mark.slow
def test_result_loads_in_transformers_without_us(quantized) -> None:
    out, _ = quantized
    code = (
        "import sys, transformers as t\n"
        f"m, i = t.AutoModelForCausalLM.from_pretrained({str(out)!r}, output_loading_info=True)\n"
        "print(len(i['missing_keys']), len(i['unexpected_keys']))\n"
        f"k = t.AutoTokenizer.from_pretrained({str(out)!r})\n"
        "ids = m.generate(**k('def ', return_tensors='pt'), max_new_tokens=4, do_sample=False)\n"
        "print(ids.shape[1] > 4, 'sliderquant' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "0 0\nTrue False\n"), done.stderr


def test_every_quantized_row_has_at_most_four_values_per_group(quantized) -> None:
    out, _ = quantized
    model = AutoModelForCausalLM.from_pretrained(out)
    for name, weight in model.model.layers.named_parameters():
        if weight.ndim == 2:
            for group in weight.detach().unflatten(1, (-1, 32)).flatten(0, 1):
                assert len(group.unique()) <= 4, name


def test_embeddings_norms_and_head_are_untouched(quantized, model_directory) -> None:
    before = load_file(model_directory / "model.safetensors")
    after = load_file(quantized[0] / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        kept = "proj" not in name
        assert torch.equal(before[name], after[name]) == kept, name


def test_eval_of_the_result_equals_the_simulated_model(
    quantized, model_directory, text_file, held_out_file
) -> None:
    out, report = quantized
    done = run("eval", out, "--text", held_out_file, "--json", "--out", out.with_name("eval"))
    row = json.loads(done.stdout)["rows"][0]["metrics"]
    reloaded = row[f"perplexity {held_out_file.name}"]["mean"]
    by_quantize = report["rows"][-1]["metrics"][f"perplexity {held_out_file.name}"]["mean"]
    # Simulated again, from scratch, through functional_call on the full-precision model.
    loaded = load_model(model_directory)
    decoder = TransformersDecoder(loaded.model)
    config = SliderConfig(
        method="slider", wbits=2, group_size=32, sym=False, nsamples=8, seqlen=64, epochs=2,
        batch_size=4, lr_lora=3e-3, lr_lwc=3e-2,
    )  # fmt: skip
    stream = encode(read_documents([str(text_file)], loaded.tokenizer), loaded.tokenizer)
    samples = calibration_samples(stream, 8, 64, config.seed)
    learnables = fresh_learnables(decoder, config, loaded.dtype)
    calibrate(decoder, samples, make_windows(decoder.depth, config), learnables, config)
    text = encode(read_documents([str(held_out_file)], loaded.tokenizer), loaded.tokenizer)
    logits = simulated_logits(decoder, simulated_weights(decoder, learnables))
    simulated = perplexity(logits, chunks(text, 64))
    assert reloaded == pytest.approx(simulated, rel=1e-3)
    assert by_quantize == pytest.approx(simulated, rel=1e-3)


def test_report_stands_beside_rounding_and_full_precision(quantized) -> None:
    out, report = quantized
    names = [row["name"] for row in report["rows"]]
    assert names == ["full precision", "round-to-nearest", "SliderQuant (slider)"]
    full, rounded, ours = (
        next(m["mean"] for name, m in row["metrics"].items() if name.startswith("perplexity"))
        for row in report["rows"]
    )
    assert full < ours < rounded
    assert report["rows"][-1]["metrics"]["bits per weight"]["mean"] == 2 + (32 + 2) / 32
    assert json.loads((out / "run" / "report.json").read_text()) == report
    assert (out / "run" / "report.html").exists()
    text = (out / "run" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))  # 6 windows, 2 stages


def test_tokenizer_comes_along(quantized, model_directory) -> None:
    text = "class Window:\n    pass"
    before, after = (
        AutoTokenizer.from_pretrained(path)(text)["input_ids"]
        for path in (model_directory, quantized[0])
    )
    assert before == after


def test_bfloat16_checkpoint_stays_bfloat16(model_directory, tmp_path, text_file) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    AutoTokenizer.from_pretrained(model_directory).save_pretrained(tmp_path / "bf16")
    out = tmp_path / "out"
    run("quantize", tmp_path / "bf16", "--wbits", 3, "--group-size", "none", "--calib", text_file,
        "--out", out, *FAST)  # fmt: skip
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


@pytest.mark.timeout(1200)  # nine runs: on a busy machine more than the usual 300 s
@pytest.mark.parametrize(
    ("order", "trial"),
    [
        pytest.param(order, trial, marks=pytest.mark.slow)
        for trial in range(20)
        for order in ("network", "window")
    ],
)
def test_runs_killed_again_and_again_end_with_the_same_bytes(
    order, trial, save, launcher, tmp_path
) -> None:
    """Killed at windows, while blocks are written, and when the files get their names."""
    model, text = save("qwen3_moe"), tmp_path / "text.txt"
    words = [
        "quantize", model, "--calib", text, "--group-size", 8, "--nsamples", 4, "--seqlen", 16,
        "--method", "slider", "--epochs", 2, "--intra-order", order, "--cache", "disk",
        "--min-expert-tokens", 8,
    ]  # fmt: skip
    run(*words, "--out", tmp_path / "whole")
    out = tmp_path / "killed"
    draw = random.Random(trial)
    moments = [f"run/checkpoints/step-{k}" for k in sorted(draw.sample(range(1, 9), 3))]
    moments += [".export/piece-00000.safetensors", ".export/piece-00002.safetensors"]
    moments += ["model.safetensors", "config.json"]
    for moment in moments:
        launcher.kill_at(out / moment, draw.uniform(0, 0.01), *words, "--out", out)
    run(*words, "--out", out, "--resume", "auto")
    assert differences(out, tmp_path / "whole") == []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["compensated", "combined"])
def test_rounded_run_killed_while_it_writes_ends_with_the_same_bytes(
    method, save, launcher, tmp_path
) -> None:
    model, text = save("qwen3"), tmp_path / "text.txt"
    words = [
        "quantize", model, "--calib", text, "--group-size", 8, "--nsamples", 4, "--seqlen", 16,
        "--method", method,
    ]  # fmt: skip
    run(*words, "--out", tmp_path / "whole")
    out = tmp_path / "killed"
    moments = [".export/piece-00000.safetensors", ".export/piece-00002.safetensors"]
    if method == "combined":
        moments = ["run/checkpoints/step-2", *moments]
    for moment in moments:
        launcher.kill_at(out / moment, 0, *words, "--out", out)
    run(*words, "--out", out, "--resume", "auto")
    assert differences(out, tmp_path / "whole") == []


def test_terminated_run_exits_143_with_its_windows_saved(
    model_directory, text_file, launcher, tmp_path
) -> None:
    out = tmp_path / "w4"
    words = [
        "quantize", model_directory, "--calib", text_file, "--group-size", 32, "--out", out,
        *FAST, "--epochs", 60,
    ]  # fmt: skip
    child = launcher.start(*words, err=tmp_path / "err")
    launcher.wait_for(child, out / "run" / "checkpoints")
    os.kill(child, signal.SIGTERM)
    err = (tmp_path / "err").read_text()
    assert launcher.wait(child) == 143, err
    assert "Traceback" not in err
    assert not (out / "config.json").exists()


def test_resume_refuses_other_settings(quantized, model_directory, text_file, tmp_path) -> None:
    out, _ = quantized
    done = run("quantize", model_directory, "--wbits", 3, "--group-size", 32, "--calib", text_file,
               "--out", out, "--resume", "auto", *FAST, check=2)  # fmt: skip
    assert "was made with wbits 2, not 3; resume with the same settings" in done.stderr


def test_filled_folder_is_not_overwritten(quantized, model_directory, text_file) -> None:
    out, _ = quantized
    before = (out / "model.safetensors").read_bytes()
    done = run("quantize", model_directory, "--calib", text_file, "--out", out, check=2)
    assert "is not empty" in done.stderr
    assert (out / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "nowhere"}, "model directory nowhere does not exist"),
        ({"model": "."}, "no model directory"),
        ({"--group-size": "48"}, "group_size 48 does not divide"),
        ({"--wbits": "0"}, "wbits is 0; give 2 to 8, or 16"),
        ({"--wbits": "9"}, "wbits is 9; give 2 to 8, or 16"),
        ({"--wbits": "1"}, "wbits is 1; give 2 to 8, or 16"),
        ({"--abits": "5"}, "abits is 5; give 4, 6 or 8"),
        (
            {"--quantize-attention": "--quiet"},
            "quantize_attention rounds to abits, and abits is 16",
        ),
        ({"--rotate": "r3"}, "rotate"),
        ({"--intra-order": "inside"}, "intra"),
        ({"--min-expert-tokens": "-1"}, "min_expert_tokens is -1; give 0 or more"),
        ({"--lr-scale": "-1"}, "lr_scale is -1.0; give 0 or more"),
        ({"--batch-size": "0"}, "batch_size is 0; give 1 or more"),
        ({"--calib": "empty.txt"}, "no text"),
        ({"--calib": "ids.txt", "model": "small-vocabulary"}, "the model knows 300"),
        ({"--gamma": "0.3"}, "gamma is 0.3; give 1, 1/2, 1/3"),
        ({"--epochs": "1"}, "epochs (1) are fewer than the 2 intra-layer stages"),
        ({"--schedule": "spiral"}, "schedule 'spiral' is not known"),
        ({"--schedule": "0-2"}, "no window holds block 3"),
        (
            {"--method": "compensated"},
            "epochs, lr_lora, lr_lwc: not a setting of the method compensated; add --method slider",
        ),
        ({"--calib": "short.txt"}, "calibration text has"),
        ({"--calib": "missing.txt"}, "missing.txt cannot be read"),
        ({"--device": "warp"}, "device 'warp' is unknown"),
        ({"--eval-text": "short.txt"}, "evaluation text short.txt has"),
        ({"--wbit-width": "4"}, "wbit"),
    ],
)
def test_bad_input_is_one_line_exit_2_and_nothing_written(
    change, message, model_directory, text_file, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("def f(): pass\n")
    Path("empty.txt").write_text("  \n")
    Path("ids.txt").write_text(text_file.read_text())
    if change.get("model") == "small-vocabulary":
        shutil.copytree(model_directory, "small-vocabulary")
        state = load_file("small-vocabulary/model.safetensors")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            state[name] = state[name][:300].clone()
        save_file(state, "small-vocabulary/model.safetensors")
        config = json.loads(Path("small-vocabulary/config.json").read_text())
        Path("small-vocabulary/config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    words = {"model": model_directory, "--calib": text_file, "--out": "out", "--group-size": 32}
    words |= dict(zip(FAST[::2], FAST[1::2], strict=True)) | change
    model = words.pop("model")
    done = run("quantize", model, *(word for pair in words.items() for word in pair), check=2)
    told = ("warning:", "device:")
    errors = [line for line in done.stderr.splitlines() if not line.startswith(told)]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("error: ")
    assert "; " in errors[0]
    assert message in errors[0]
    assert not Path("out").exists()


def test_inspect_prints_the_papers_windows_as_json() -> None:
    plan = json.loads(run("inspect", "--layers", 32, "--method", "slider", "--json").stdout)
    assert len(plan["windows"]) == 33
    assert plan["block_visits"] == 70
    assert plan["windows"][:2] == [[0], [0, 1]]


def test_inspect_of_a_model_reads_no_weight(model_copy) -> None:
    (model_copy / "model.safetensors").unlink()
    done = run("inspect", "--model", model_copy, "--group-size", 32, "--wbits", 2,
               "--method", "slider", "--json")  # fmt: skip
    plan = json.loads(done.stdout)
    assert plan["windows"] == [[0], [0, 1], [0, 1, 2], [2, 3], [3, 4], [4]]
    assert plan["bits_per_weight"] == 2.5
    assert set(plan["memory_gib"]) == {
        "embedding, as it is and as it is written", "weights of the window", "simulation of the window",
        "activation caches",
    }  # fmt: skip


def test_inspect_of_both_phases_counts_blocks_and_windows(model_copy) -> None:
    words = ["inspect", "--model", model_copy, "--group-size", 32, "--wbits", 2, "--json"]
    plans = {
        method: json.loads(run(*words, "--method", method).stdout)
        for method in ("compensated", "combined", "slider")
    }
    assert [plan["rounded_blocks"] for plan in plans.values()] == [5, 5, 0]
    assert plans["combined"]["windows"] == plans["slider"]["windows"]
    assert plans["combined"]["updates"] == 128 * 6  # one pass over the samples, batches of one
    assert plans["combined"]["stages"] == 1

    # A block to round counts as the updates that read every sample once in one block.
    assert plans["compensated"]["rounding_steps"] == 1
    assert plans["combined"]["rounding_steps"] == 128 * 6 // plans["combined"]["block_visits"]

    # The larger phase, and the codes that the second one needs.
    memory = {method: sum(plan["memory_gib"].values()) for method, plan in plans.items()}
    assert memory["combined"] >= max(memory["compensated"], memory["slider"])
    table = run(*words[:-1]).stdout
    assert f"{memory['compensated']:.2f} GiB" in table.splitlines()[-2]
    assert "optimizer updates" not in table  # there are no windows


def model_with_scaled_inputs(save, value: float) -> list[object]:
    """Write a tiny model whose first attention reads its inputs times ``value``; words to round it."""
    directory = save("llama")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"] *= value
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    text = directory.parent / "text.txt"
    out = directory.parent / "out"
    words = ["--calib", text, "--group-size", 8, "--nsamples", 4, "--seqlen", 16]
    return ["quantize", directory, *words, "--format", "dense", "--out", out]


def test_layers_that_read_nothing_are_rounded_to_nearest_and_named(save, tmp_path) -> None:
    done = run(*model_with_scaled_inputs(save, 0.0))
    names = ", ".join(f"self_attn.{name}_proj.weight" for name in "qkv")
    assert f"block 0: the inputs of {names} are zero in all calibration text" in done.stderr

    # Nothing else is named, and the weight is not zero but the nearest one.
    assert done.stderr.count("are zero in all calibration text") == 1
    name = "model.layers.0.self_attn.q_proj.weight"
    before = load_file(tmp_path / "source" / "model.safetensors")[name]
    after = load_file(tmp_path / "out" / "model.safetensors")[name]
    fmt = WeightFormat(bits=4, group_size=8, sym=True, dtype=before.dtype)
    assert torch.equal(after, quantize_weight(before.float(), fmt).dequantize())


def test_inputs_that_are_not_finite_end_the_run_with_3(save) -> None:
    done = run(*model_with_scaled_inputs(save, 1e30), check=3)
    assert "block 0: the inputs of self_attn" in done.stderr
    assert "not finite" in done.stderr
