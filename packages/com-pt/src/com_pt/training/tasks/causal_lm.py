"""Causal language modelling with transformers' Llama."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset

from com_pt.adapters.llama_models import llama_config
from com_pt.method.cost import llama_macs
from com_pt.method.metrics import perplexity
from com_pt.training.data.counts import check_settings, read_count
from com_pt.training.data.texts import BYTE_TOKENS, TextBlocks, load_tokenizer
from com_pt.training.embedding import stream_losses
from com_pt.training.streaming import Reading
from com_pt.training.tasks.base import Task
from effml_common.errors import ConfigError, InputError

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
    headline_is_better: ClassVar[Literal["higher", "lower"]] = "lower"

    def __init__(self, data: Mapping[str, Any]) -> None:
        super().__init__(data)
        check_settings(data)
        self.length = read_count(data, "length", 512)
        if self.length < 2:
            raise ConfigError(
                f"length is {self.length}, and a block's first token is not predicted; give 2 or more"
            )
        self._blocks: dict[str, TextBlocks] = {}

    def build(self, spec: Any) -> nn.Module:
        """Build a fresh Llama from the settings of its config, or a folder with a ``config.json``."""
        from transformers import LlamaForCausalLM

        return LlamaForCausalLM(llama_config(spec))

    def adopt(self, specs: Mapping[str, Any]) -> None:
        """Refuse models without an embedding for every token.

        Raises:
            ConfigError: If one has fewer.
            InputError: If there is no such tokenizer.
        """
        tokenizer = self.data.get("tokenizer", "bytes")
        tokens = BYTE_TOKENS if tokenizer == "bytes" else len(load_tokenizer(tokenizer))
        owner = "bytes need" if tokenizer == "bytes" else f"the tokenizer {tokenizer} has"
        for name, spec in specs.items():
            size = llama_config(spec).vocab_size
            if size < tokens:
                raise ConfigError(f"vocab_size of {name} is {size} and {owner} {tokens}; raise it")

    def check_data(self) -> None:
        """Read the held-out text.

        Raises:
            InputError: If there is none.
        """
        if "val" in self.data:
            self.blocks("val")

    def blocks(self, part: str) -> TextBlocks:
        """Return the blocks of ``data[part]``, by number or slice; they are opened once.

        Raises:
            InputError: If there is no text.
        """
        if part not in self._blocks:
            self._blocks[part] = TextBlocks.open(self.data, part, self.length)
        return self._blocks[part]

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
        blocks: Any = self.blocks("val")
        judged = range(min(len(blocks), read_count(self.data, "val_blocks", len(blocks))))
        reading = Reading.of({"val_batch": VAL_BATCH, **self.data}, model)
        return perplexity(stream_losses(model, Subset(blocks, judged), reading), self.length)

    def macs(self, spec: Any) -> int:
        """Return the forward MACs of one block."""
        return llama_macs(llama_config(spec), self.length)

    def save(self, model: Any, spec: Any, folder: Path) -> None:
        """Write a ``LlamaForCausalLM.from_pretrained`` folder, with the tokenizer if there is one."""
        model.save_pretrained(folder)
        tokenizer = self.data.get("tokenizer", "bytes")
        if tokenizer != "bytes":
            load_tokenizer(tokenizer).save_pretrained(folder)

    def load(self, folder: Path, spec: Any) -> nn.Module:
        """Load the model of such a folder."""
        from transformers import LlamaForCausalLM

        if not (Path(folder) / "config.json").is_file():
            raise InputError(f"{folder} is no transformers folder; give one with a config.json")
        return LlamaForCausalLM.from_pretrained(folder)
