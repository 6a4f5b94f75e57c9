"""Causal language modelling with transformers' Llama."""

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from com_pt.adapters.llama_models import llama_config
from com_pt.method.cost import llama_macs
from com_pt.method.metrics import perplexity
from com_pt.training.embedding import stream_losses
from com_pt.training.streaming import Reading
from com_pt.training.tasks.base import Task
from effml_common.errors import ConfigError, InputError

BYTE_TOKENS = 257  # 256 bytes and an end of text
VAL_BATCH = 16  # blocks of a forward pass in evaluation: the logits of a block take much memory


class CausalLMTask(Task):
    """Blocks of equal length from text files, one after the other.

    Data settings: ``train`` and ``val`` (patterns of text files), ``length`` of a block in tokens,
    ``tokenizer`` (``bytes``, or a Hugging Face tokenizer's folder), ``val_blocks``, ``val_batch`` and
    ``val_workers`` of the evaluation.
    """

    settings: ClassVar[frozenset[str]] = frozenset(
        {"train", "val", "length", "tokenizer", "val_blocks", "val_batch", "val_workers"}
    )
    streams: ClassVar[tuple[str, ...]] = ("hidden",)
    headline: ClassVar[str] = "loss"

    def __init__(self, data: Mapping[str, Any]) -> None:
        super().__init__(data)
        self.length = int(data.get("length", 512))
        self._blocks: dict[str, Tensor] = {}

    def build(self, spec: Any) -> nn.Module:
        """Build a fresh Llama from the settings of its config, or a folder with a ``config.json``."""
        from transformers import LlamaForCausalLM

        return LlamaForCausalLM(llama_config(spec))

    def adopt(self, specs: Mapping[str, Any]) -> None:
        """Refuse models without an embedding for every byte and the end of text."""
        for name, spec in specs.items():
            size = llama_config(spec).vocab_size
            if self.data.get("tokenizer", "bytes") == "bytes" and size < BYTE_TOKENS:
                raise ConfigError(
                    f"vocab_size of {name} is {size} and bytes need {BYTE_TOKENS}; raise it"
                )

    def check_data(self) -> None:
        """Read the held-out text.

        Raises:
            InputError: If there is none.
        """
        if "val" in self.data:
            self.blocks("val")

    def blocks(self, part: str) -> Tensor:
        """Return token ids [n, length] of ``data[part]``.

        Raises:
            InputError: If there is no text.
        """
        if part not in self._blocks:
            source = self.data.get(part)
            if not source:
                raise InputError(f"no {part} data are given; name text files under data: {part}")
            self._blocks[part] = self._read([source] if isinstance(source, str) else list(source))
        return self._blocks[part]

    def _read(self, patterns: list[str]) -> Tensor:
        files = sorted({file for pattern in patterns for file in glob.glob(pattern)})
        if not files:
            raise InputError(f"no file matches {patterns[0]}; check the data section")
        encode = _make_encoder(self.data.get("tokenizer", "bytes"))
        ids = torch.cat([encode(Path(file)) for file in files])
        blocks = len(ids) // self.length
        if blocks == 0:
            raise InputError(
                f"the text has {len(ids)} tokens, fewer than a block of {self.length}; add text"
            )
        return ids[: blocks * self.length].reshape(blocks, self.length)

    def __len__(self) -> int:
        return len(self.blocks("train"))

    def __getitem__(self, index: int) -> Tensor:
        return self.blocks("train")[index]

    def features(self, model: Any, batch: Tensor) -> dict[str, Tensor]:
        """Return the last hidden states [b, n, w] after the final norm, logits, and the tokens."""
        hidden = model.model(input_ids=batch).last_hidden_state
        return {"hidden": hidden, "logits": model.lm_head(hidden), "tokens": batch}

    def loss(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the cross-entropy of the next token."""
        logits, target = outputs["logits"][:, :-1].float(), outputs["tokens"][:, 1:]
        return {"next token": F.cross_entropy(logits.flatten(0, 1), target.flatten())}

    def evaluate(self, model: Any) -> dict[str, float]:
        """Measure perplexity and loss on the held-out text."""
        if "val" not in self.data:
            return {}
        blocks = self.blocks("val")[: int(self.data.get("val_blocks", 10**9))]
        reading = Reading.of({"val_batch": VAL_BATCH, **self.data}, model)
        return perplexity(stream_losses(model, blocks, reading), self.length)

    def macs(self, spec: Any) -> int:
        """Return the forward MACs of one block."""
        return llama_macs(llama_config(spec), self.length)

    def save(self, model: Any, spec: Any, folder: Path) -> None:
        """Write a ``LlamaForCausalLM.from_pretrained`` folder, with the tokenizer if there is one."""
        model.save_pretrained(folder)
        tokenizer = self.data.get("tokenizer", "bytes")
        if tokenizer != "bytes":
            from transformers import AutoTokenizer

            AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)

    def load(self, folder: Path, spec: Any) -> nn.Module:
        """Load the model of such a folder."""
        from transformers import LlamaForCausalLM

        if not (Path(folder) / "config.json").is_file():
            raise InputError(f"{folder} is no transformers folder; give one with a config.json")
        return LlamaForCausalLM.from_pretrained(folder)


def _make_encoder(tokenizer: str) -> Any:
    """Return a function from a text file to its token ids, with an end of text."""
    if tokenizer == "bytes":
        return lambda path: torch.tensor([*path.read_bytes(), BYTE_TOKENS - 1])
    from transformers import AutoTokenizer

    if not Path(tokenizer).is_dir():
        raise InputError(f"there is no tokenizer {tokenizer}; use bytes or a tokenizer's folder")
    loaded = AutoTokenizer.from_pretrained(tokenizer)

    def encode(path: Path) -> Tensor:
        ids = loaded(path.read_text(encoding="utf-8", errors="replace"))["input_ids"]
        return torch.tensor([*ids, loaded.eos_token_id])

    return encode
