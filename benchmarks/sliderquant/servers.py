"""What vLLM and llama.cpp make of the files that sliderquant writes.

    python3.11 scripts/serve_env.py                            once: builds the servers
    uv run python -m benchmarks.sliderquant.servers --plan     lists the cases
    uv run python -m benchmarks.sliderquant.servers            runs those that have no result yet

Three models: Gemma 3 270M (dequantized from a file of 4 to 6 bits, see ``gemma_data``), the small
Llama of the study, and a Qwen3 with that Llama's weights, whose gains per head are 1. All are in
bfloat16. Each is quantized in a format, then measured twice on the same token ids, with the
tokenizer's BOS in front of each chunk and every position behind it scored: by this package, and by
the server in an environment of its own. One thread each. llama.cpp also tokenizes a text and times
a greedy continuation; the packed model of this package continues the same prompt.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from benchmarks.script import run_script
from benchmarks.sliderquant.gemma_measure import Subject, subject_of
from effml_common.files import atomic_write
from effml_common.folders import cache_folder
from effml_common.logging import say
from effml_common.parsing import require, setting
from sliderquant import QuantizeConfig, export, quantize
from sliderquant.adapters.loading import load_any
from sliderquant.adapters.simulation import model_logits
from sliderquant.config import ExportConfig
from sliderquant.method.metrics import perplexity

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from serve_env import python_of  # pyright: ignore[reportMissingImports]

PROG = "python -m benchmarks.sliderquant.servers"
RESULTS = "benchmarks/sliderquant/results/sliderquant-servers.json"
SERVERS = {"llama.cpp": "servers_llama_cpp.py", "vllm": "servers_vllm.py"}
CHUNKS = {"gemma": 8, "llama": 64, "qwen3": 64}  # of a text
PROMPT_TOKENS, NEW_TOKENS = 32, 32
CALIBRATION_TOKENS = 100_000
TEXT = 3000  # characters that llama.cpp tokenizes
GGUF = {"for_": "gguf", "format": "native"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model in one format, on one server.

    Attributes:
        model: "gemma", "llama" or "qwen3".
        label: What it is, in a few words.
        server: "vllm" or "llama.cpp".
        settings: Of ``quantize``, where they differ from the defaults.
        target: Format that a native folder is exported to; ``None`` if ``quantize`` writes what is
            served.
    """

    model: str
    label: str
    server: str
    settings: Mapping[str, Any]
    target: str | None = None

    @property
    def name(self) -> str:
        """Name of its result and of its folder."""
        return f"{self.server} {self.model} {self.label}"


W4, W8A8 = "W4 g128", "W8A8 per row"
CASES = [
    *(
        Case(model=model, label=label, server="vllm", settings=settings)
        for model in ("llama", "qwen3", "gemma")
        for label, settings in ((W4, {}), (W8A8, {"wbits": 8, "abits": 8}))
    ),
    *(
        Case(model=model, label=label, server="llama.cpp", settings={**GGUF, **settings}, target="gguf")
        for model in ("llama", "qwen3", "gemma")
        for label, settings in (
            ("Q4_0", {}),
            ("Q4_1", {"sym": False}),
            ("Q8_0", {"wbits": 8}),
        )
        if model != "gemma" or label != "Q8_0"
    ),
    *(
        Case(model="llama", label=label, server="vllm", settings=settings)
        for label, settings in (
            ("W4 g128 asymmetric", {"sym": False}),
            ("W8 g128", {"wbits": 8}),
            ("W3 g128", {"wbits": 3}),
            ("W2 g64 asymmetric in 4 bits", {"wbits": 2, "group_size": 64, "sym": False,
                                             "container_bits": 4}),
            ("W4A8", {"abits": 8}),
            ("W4A4", {"abits": 4}),
        )
    ),
    *(
        Case(model="llama", label=label, server="vllm", settings=settings, target="gptq")
        for label, settings in (
            ("gptq W4 g128", {"format": "native"}),
            ("gptq W4 g128 asymmetric", {"format": "native", "sym": False}),
        )
    ),
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ServersConfig:
    """What servers make of quantized models."""

    server: Literal["all", "vllm", "llama.cpp"] = setting("all", "servers to run")
    model: Literal["all", "gemma", "llama", "qwen3"] = setting("all", "models to run")
    plan: bool = setting(False, "list the cases and stop")
    again: bool = setting(False, "run cases that have a result once more")
    out: str = setting(RESULTS, "file of the results")


def main(config: ServersConfig) -> None:
    """Run the cases that have no result yet; each is written when it is finished."""
    path = Path(config.out)
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for case in CASES:
        chosen = config.server in ("all", case.server) and config.model in ("all", case.model)
        if not chosen or (case.name in results and not config.again):
            continue
        say(case.name)
        if not config.plan:
            results[case.name] = measure(case)
            atomic_write(path, json.dumps(results, indent=1, sort_keys=True) + "\n")


def measure(case: Case) -> dict[str, Any]:
    """Return what a server and this package make of a case."""
    require(
        python_of(case.server) is not None,
        f"there is no environment of {case.server}",
        "build it with python3.11 scripts/serve_env.py",
    )
    torch.set_num_threads(1)
    subject = subject_of("gemma" if case.model == "gemma" else "llama")
    source = bfloat16_model(case.model, subject)
    folder = quantized_folder(case, source, subject)

    # The same token ids for both.
    name, chunks = next(iter(subject.texts.items()))
    chunks = chunks[: CHUNKS[case.model]]
    tokenizer = AutoTokenizer.from_pretrained(source)
    text = tokenizer.decode(chunks[0], skip_special_tokens=True)[:TEXT]
    request = {
        "chunks": chunks.tolist(),
        "text": text,
        "prompt": chunks[0, :PROMPT_TOKENS].tolist(),
        "new_tokens": NEW_TOKENS,
        "dtype": "bfloat16",
    }
    ours = measure_here(case, folder, chunks)
    answer = ask_server(case, folder, request)

    # What is written down: figures, not the texts.
    row = {"settings": dict(case.settings), "text": name, "chunks": list(chunks.shape), **ours}
    row["full_precision"] = perplexity(model_logits(load_any(source).model), chunks.split(1))
    row["server"] = {
        k: answer.get(k) for k in ("version", "perplexity", "error", "tokens_per_second")
    }
    row["server"]["loads"] = answer.get("loads", "perplexity" in answer)
    row["server"]["same_continuation"] = answer.get("generated") == ours.pop("generated")
    row.pop("generated", None)
    if case.server == "llama.cpp":
        own_tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        row["server"]["same_tokens"] = answer.get("tokens") == own_tokens
    return row


def bfloat16_model(model: str, subject: Subject) -> Path:
    """Return a folder with the model in bfloat16, made on the first call."""
    folder = cache_folder("sliderquant") / "serve" / f"{subject.folder.name}-{model}"
    if (folder / "config.json").exists():
        return folder
    original: Any = AutoModelForCausalLM.from_pretrained(subject.folder, dtype=torch.bfloat16)
    if model == "qwen3":
        names = ("architectures", "model_type", "transformers_version")
        shared = {k: v for k, v in original.config.to_dict().items() if k not in names}
        qwen = AutoModelForCausalLM.from_config(Qwen3Config(**shared)).to(torch.bfloat16)
        missing, _ = qwen.load_state_dict(original.state_dict(), strict=False)
        assert all(name.endswith(("q_norm.weight", "k_norm.weight")) for name in missing)
        original = qwen
    AutoTokenizer.from_pretrained(subject.folder).save_pretrained(folder)
    original.save_pretrained(folder)
    return folder


def quantized_folder(case: Case, source: Path, subject: Subject) -> Path:
    """Return the folder that the server is given, made on the first call."""
    folder = source.parent / f"{source.name}-{case.label}".replace(" ", "-")
    native = folder.with_name(folder.name + "-native") if case.target else folder
    if not (native / "config.json").exists():
        shutil.rmtree(native, ignore_errors=True)
        text = source.parent / f"{source.name}.txt"
        tokenizer = AutoTokenizer.from_pretrained(source)
        text.write_text(
            tokenizer.decode(subject.calibration[:CALIBRATION_TOKENS]), encoding="utf-8"
        )
        quantize(
            QuantizeConfig(
                model=str(source),
                calib=(str(text),),
                out=str(native),
                nsamples=16,
                seqlen=512,
                **case.settings,
            )
        )
    if case.target and not (folder / "README.md").exists():  # the last file of an export
        shutil.rmtree(folder, ignore_errors=True)
        target: Any = case.target
        result = export(ExportConfig(model=str(native), format=target, out=str(folder)))
        assert result.cost is None or result.cost.changed == 0
    return folder


@torch.no_grad()
def measure_here(case: Case, folder: Path, chunks: Tensor) -> dict[str, Any]:
    """Return perplexity, continuation and its speed by this package."""
    native = folder.with_name(folder.name + "-native")
    loaded = load_any(native if case.target else folder, upcast=False)
    model: Any = loaded.model
    begin = time.perf_counter()
    ids = model.generate(
        chunks[:1, :PROMPT_TOKENS],
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    seconds = time.perf_counter() - begin

    # In float32 where the server computes with more than bfloat16.
    if case.server == "llama.cpp":
        loaded = load_any(native)
    return {
        "perplexity": perplexity(model_logits(loaded.model), chunks.split(1)),
        "generated": ids[0, PROMPT_TOKENS:].tolist(),
        "tokens_per_second": NEW_TOKENS / seconds,
    }


def ask_server(case: Case, folder: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """Run a server's script in its environment; return its answer."""
    file = folder / "model.gguf" if case.server == "llama.cpp" else folder
    question = folder.with_name(folder.name + ".json")
    question.write_text(json.dumps(request), encoding="utf-8")
    script = Path(__file__).with_name(SERVERS[case.server])
    done = subprocess.run(
        [python_of(case.server), "-P", script, file, question],  # this folder shadows modules
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not answers:
        said = " ".join(done.stderr.split())[-300:]
        return {"error": f"exit code {done.returncode}: {said}"}
    return json.loads(answers[-1].removeprefix("RESULT "))


if __name__ == "__main__":
    sys.exit(run_script(ServersConfig, PROG, main))
