"""Peak memory of ``sliderquant quantize`` must not grow with the depth of the model.

Run from the workspace root; it needs 8 GB of disk in the folder for temporary files:

    uv run python -m benchmarks.sliderquant.memory

A random Llama is written to disk twice, with few and with many blocks, and quantized with the default
schedule, one update a window, every time in a process of its own. Reported is the peak of the resident
set above what the process held after its imports.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.script import run_script
from effml_common.files import atomic_write
from effml_common.logging import say
from effml_common.parsing import setting

LARGEST_GROWTH = 0.10  # from few to many blocks
LARGEST_SHARE = 0.60  # of the float32 size of the model with few blocks


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Peak memory at two depths."""

    layers: tuple[int, ...] = setting((16, 32), "decoder blocks of the models")
    hidden_size: int = setting(2048, "width")
    vocab_size: int = setting(32_000, "rows of the embedding")
    nsamples: int = setting(2, "calibration samples")
    seqlen: int = setting(64, "tokens per sample")
    schedule: str = setting("slider", "windows, as of sliderquant quantize")
    cache: str = setting("memory", "memory or disk")
    child: str = setting("", "used by the benchmark itself: folder of the model to quantize")
    out: str = setting("benchmarks/sliderquant/results/sliderquant-memory.json", "file to write")


def write_model(folder: Path, layers: int, config: MemoryConfig) -> int:
    """Write a random Llama in bfloat16, one shard per block; returns its number of weights."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    from sliderquant.adapters.streaming import empty_model

    folder.mkdir()
    llama = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.hidden_size * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    llama.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    files: dict[str, dict[str, Any]] = {}
    for name, parameter in empty_model(llama).named_parameters():
        block = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        weight = torch.ones(parameter.shape, dtype=torch.bfloat16)
        if parameter.ndim == 2:
            weight.normal_(std=0.02, generator=generator)
        files.setdefault(block, {})[name] = weight
        if name.endswith("post_attention_layernorm.weight"):  # the last of its block
            save_file(files.pop(block), folder / f"model-{int(block):03d}.safetensors")
    for block, tensors in files.items():
        save_file(tensors, folder / f"model-{block}.safetensors")
    words = {chr(i): i for i in range(33, 127)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="!").save_pretrained(folder)
    (folder / "text.txt").write_text("".join(chr(33 + i * i % 94) for i in range(5000)))
    return sum(parameter.numel() for parameter in empty_model(llama).parameters())


def resident_mib(kind: str) -> float:
    """Resident set of this process in MiB: VmRSS now, VmHWM at its peak.

    Not getrusage: its ru_maxrss begins with the peak of the process that started this one.
    """
    line = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert line is not None
    return int(line[1]) / 1024


def quantize_here(config: MemoryConfig) -> dict[str, float]:
    """Quantize in this process and return its memory in MiB."""
    import torch

    from sliderquant.commands.quantize import quantize
    from sliderquant.config import QuantizeConfig

    torch.set_num_threads(1)
    baseline = resident_mib("VmRSS")
    started = time.monotonic()
    source = Path(config.child)
    quantize(
        QuantizeConfig(
            model=str(source),
            calib=(str(source / "text.txt"),),
            out=str(source.with_name(f"{source.name}-w4")),
            nsamples=config.nsamples,
            seqlen=config.seqlen,
            batch_size=config.nsamples,
            method="slider",
            epochs=1,
            gamma=1.0,
            schedule=config.schedule,
            cache="disk" if config.cache == "disk" else "memory",
        )
    )
    return {
        "baseline_mib": round(baseline, 1),
        "peak_above_baseline_mib": round(resident_mib("VmHWM") - baseline, 1),
        "seconds": round(time.monotonic() - started, 1),
    }


def measure(config: MemoryConfig) -> dict[str, Any]:
    """Quantize a model of every depth in a process of its own and compare the peaks."""
    # Memory is that of a process which does nothing else.
    rows = []
    for layers in config.layers:
        with tempfile.TemporaryDirectory(prefix="sliderquant-memory-") as folder:
            source = Path(folder) / "model"
            weights = write_model(source, layers, config)
            flags = {
                "child": source, "nsamples": config.nsamples, "seqlen": config.seqlen,
                "cache": config.cache, "schedule": config.schedule,
            }  # fmt: skip
            words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
            child = subprocess.run(
                [sys.executable, "-m", "benchmarks.sliderquant.memory", *words],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            row = json.loads(child.stdout.splitlines()[-1])

        # The peak beside the size of the model in float32.
        row |= {"layers": layers, "float32_model_mib": round(4 * weights / 2**20, 1)}
        row["share_of_float32_model"] = round(
            row["peak_above_baseline_mib"] / row["float32_model_mib"], 3
        )
        say(json.dumps(row))
        rows.append(row)

    # Depth must not matter.
    first, last = rows[0], rows[-1]
    growth = last["peak_above_baseline_mib"] / first["peak_above_baseline_mib"] - 1
    return {
        "command": sys.argv[1:],
        "rows": rows,
        "growth": round(growth, 4),
        "holds": {
            f"growth within {LARGEST_GROWTH:.0%}": abs(growth) <= LARGEST_GROWTH,
            f"below {LARGEST_SHARE:.0%} of the float32 model": first["share_of_float32_model"]
            < LARGEST_SHARE,
        },
    }


def run(config: MemoryConfig) -> int:
    """Measure and write; 1 if a claim does not hold. A child measures one model and prints it."""
    if config.child:
        print(json.dumps(quantize_here(config)), flush=True)
        return 0
    result = measure(config)
    atomic_write(Path(config.out), json.dumps(result, indent=1) + "\n")
    say(json.dumps(result["holds"]))
    return 0 if all(result["holds"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(run_script(MemoryConfig, "python -m benchmarks.sliderquant.memory", run))
