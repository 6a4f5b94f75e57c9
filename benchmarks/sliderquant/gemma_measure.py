"""One cell of the study on Gemma 3 270M: load, quantize, check, measure."""

import importlib
import json
import math
import os
import platform
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.sliderquant.cell_processes import result_or_error, write_result
from benchmarks.sliderquant.gemma_cells import (
    FULL,
    FUNCTIONS,
    GRIDS,
    LLAMA,
    Cell,
    GemmaConfig,
    is_own,
    library_of,
    source_hash,
    texts_of,
)
from benchmarks.sliderquant.gemma_data import fetch, token_hashes
from benchmarks.sliderquant.peers_methods import METHODS, Task, check_rounded, columns_of
from benchmarks.sliderquant.peers_models import prepare, read_material
from effml_common.folders import cache_folder
from sliderquant.adapters.files import load_model, load_tokenizer
from sliderquant.adapters.text import begin_tokens, calibration_samples, chunks

SAME_WEIGHT = 1e-5  # difference, absolute and relative, of tensors that are to stay as they are
VOCABULARY_BLOCK = 2048  # tokens whose logits are computed at once
GEMMA_BATCH = 4  # chunks per forward pass
LLAMA_CHUNKS = 128  # of every text
LLAMA_BATCH = 32  # chunks per forward pass
# What the functions of ``peers_methods`` import when they are called; here before the clock starts.
IMPORTS = {
    "rtn": (),
    "hqq": ("hqq.core.quantize", "hqq.models.hf.base"),
    "gptq": ("datasets", "llmcompressor", "llmcompressor.modifiers.gptq"),
    "smoothquant-gptq": (
        *("datasets", "llmcompressor", "llmcompressor.modifiers.gptq"),
        "llmcompressor.modifiers.transform.smoothquant",
    ),
    "awq": (
        *("datasets", "llmcompressor", "llmcompressor.modifiers.quantization"),
        *("llmcompressor.modifiers.transform.awq", "llmcompressor.pipelines.cache"),
    ),
    "autoround": ("auto_round",),
    "slider": (),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A model and the tokens that go with it.

    Attributes:
        folder: Of the model.
        calibration: Stream to cut samples from, without special tokens.
        begin: Token ids in front of every sample.
        texts: Chunks to measure on, by name; all of one length, with the tokens in front.
        batch: Chunks per forward pass.
    """

    folder: Path
    calibration: Int[Tensor, " n"]
    begin: Sequence[int]
    texts: dict[str, Int[Tensor, "chunks t"]]
    batch: int


def subject_of(model: str) -> Subject:
    """Return a model and its tokens, made on the first call."""
    if model == "gemma":
        folder, tokens = fetch()
        calibration = tokens.pop("calibration")
        begin = begin_tokens(load_tokenizer(folder))
        return Subject(
            folder=folder, calibration=calibration, begin=begin, texts=tokens, batch=GEMMA_BATCH
        )

    # The Llama of the comparison of peers: trained once, on the standard library's source.
    key = sha256(json.dumps(asdict(LLAMA), sort_keys=True).encode()).hexdigest()[:8]
    path = cache_folder("sliderquant") / f"llama-text-{key}.safetensors"
    material = read_material(path)
    if material is None:
        prepare("llama", LLAMA, path)
        material = read_material(path)
        assert material is not None
    length = LLAMA.context
    texts = {
        name: next(iter(chunks(stream, length, LLAMA_CHUNKS, material.begin)))
        for name, stream in material.tokens.items()
        if name != "train"
    }
    return Subject(
        folder=material.folder,
        calibration=material.tokens["train"],
        begin=material.begin,
        texts=texts,
        batch=LLAMA_BATCH,
    )


def work(config: GemmaConfig, cell: Cell, path: Path) -> None:
    """Run a cell in this process and write its result, or its error."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(cell.seed)
    result = result_or_error(lambda: measure_cell(config, cell))
    write_result(path, cell, {**result, "cell_cpu_seconds": cpu_seconds()})


def measure_cell(config: GemmaConfig, cell: Cell) -> dict[str, Any]:
    """Quantize and measure one model."""
    subject = subject_of(cell.model)
    loaded = load_model(subject.folder)
    model, facts = loaded.model, {}
    if cell.arm != FULL:
        samples = calibration_samples(
            subject.calibration, config.nsamples, config.seqlen, cell.seed, subject.begin
        )
        task = Task(
            model=loaded.model,
            tokenizer=loaded.tokenizer,
            samples=samples,
            grid=GRIDS[cell.setting],
            options=cell.options,
        )
        model, facts = quantize(task, cell)
        facts["samples"] = token_hashes({"samples": samples})["samples"]
        check_outside(model, subject.folder)

    # The mean over chunks, so that chunks weigh alike.
    losses = {
        name: chunk_losses(model, subject.texts[name], subject.batch)
        for name in texts_of(config, cell)
    }
    return {
        "ppl": {name: math.exp(sum(each) / len(each)) for name, each in losses.items()},
        **facts,
        "losses": {name: [round(loss, 5) for loss in each] for name, each in losses.items()},
        "tokens": token_hashes({"calibration": subject.calibration, **subject.texts}),
        "nsamples": config.nsamples,
        "machine": machine(config),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def quantize(task: Task, cell: Cell) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Quantize, and return the model with its seconds, memory (MiB), library and settings."""
    # Imports are no part of the time.
    function = FUNCTIONS[cell.arm]
    for module in IMPORTS[function]:
        importlib.import_module(module)
    columns = columns_of(task.model)

    # Wall time, CPU time and peak memory of the quantization alone.
    before = peak_mib()
    begin = time.perf_counter(), cpu_seconds()
    model, how = METHODS[function](task)
    end = time.perf_counter(), cpu_seconds()
    peak = peak_mib()

    check_rounded(model, columns, task.grid)
    facts = {
        "seconds": end[0] - begin[0],
        "cpu_seconds": end[1] - begin[1],
        "peak_mib": peak,
        "added_mib": peak - before,
        "library": library_of(cell),
        "how": how,
    }
    return model, facts | ({"source": source_hash(cell.arm)} if is_own(cell.arm) else {})


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def peak_mib() -> float:
    """Return the largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def check_outside(model: PreTrainedModel, folder: Path) -> None:
    """Refuse a model whose embedding, head or final norm is not what the folder holds.

    Raises:
        ValueError: Naming the tensor.
    """
    with safe_open(folder / "model.safetensors", "pt") as file:
        embedding = file.get_tensor("model.embed_tokens.weight")
        tied = "lm_head.weight" not in file.keys()  # noqa: SIM118
        expected = {
            "model.embed_tokens": embedding,
            "lm_head": embedding if tied else file.get_tensor("lm_head.weight"),
            "model.norm": file.get_tensor("model.norm.weight"),
        }
    for name, weight in expected.items():
        now = model.get_submodule(name).weight
        assert isinstance(now, Tensor)
        # A library may have stored 1 + w and gone back to w, which rounds in float32.
        if not torch.allclose(now, weight, rtol=SAME_WEIGHT, atol=SAME_WEIGHT):
            raise ValueError(f"{name} was changed, though only blocks are to be quantized")


@torch.no_grad()
def chunk_losses(model: PreTrainedModel, text: Int[Tensor, "n t"], batch: int) -> list[float]:
    """Return the mean cross-entropy of tokens 2..t of every chunk, in nats.

    Logits come in blocks of the vocabulary, of which Gemma has 262,144 tokens: laid out at once, they
    take longer to sum than to compute. The head is a plain matrix, see ``check_outside``.
    """
    head = model.get_submodule("lm_head").weight
    assert isinstance(head, Tensor)
    losses: list[float] = []
    for tokens in text.split(batch):
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
        hidden = hidden.flatten(0, 1)
        target = (hidden * head[tokens[:, 1:].flatten()]).sum(dim=-1)

        # Sums of exponentials relative to the largest logit so far.
        largest, total = target.clone(), torch.zeros_like(target)
        for rows in head.split(VOCABULARY_BLOCK):
            logits = hidden @ rows.T
            before, largest = largest, torch.maximum(largest, logits.amax(dim=-1))
            total *= torch.exp(before - largest)
            total += logits.sub_(largest[:, None]).exp_().sum(dim=-1)
        each = largest + total.log() - target
        losses += each.view(len(tokens), -1).mean(dim=1).tolist()
    if not all(map(math.isfinite, losses)):
        raise ValueError("cross-entropies are not finite; the weights are damaged")
    return losses


def machine(config: GemmaConfig) -> dict[str, Any]:
    """Return processor, threads and versions of what every cell uses."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": config.threads,
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "compressed-tensors": version("compressed-tensors"),
    }
