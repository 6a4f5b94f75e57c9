"""The demo's model: a small Llama trained on the text of Python's own standard library, once."""

import math
import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from effml_common.folders import cache_folder, cache_key
from effml_common.logging import Progress, say
from effml_common.stopping import check_finite
from sliderquant.config import DemoModelConfig
from sliderquant.demo.data import Corpus


def train_tokenizer(corpus: Corpus, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the training text.

    Args:
        corpus: Text; only ``train`` is read.
        vocab_size: Number of tokens, the end-of-text token included.

    Returns:
        A tokenizer that ``AutoTokenizer`` can load once it is saved.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.train, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    )


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: tuple[str, ...]) -> torch.Tensor:
    """Encode documents one after the other, each closed by the end-of-text token.

    Returns:
        Token ids, int64 [n].
    """
    ids: list[Any] = []
    for encoding in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        ids.extend(encoding)
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids)


def train_llama(
    config: DemoModelConfig,
    tokens: torch.Tensor,
    vocab_size: int,
    device: torch.device | str = "cpu",
) -> LlamaForCausalLM:
    """Train a Llama from scratch on a token stream.

    Args:
        config: Shape and training budget.
        tokens: Training stream, int64 [n].
        vocab_size: Number of token ids.
        device: Where it is trained and left.

    Returns:
        The trained model in float32, eval mode.

    Raises:
        NonFiniteError: If the loss becomes NaN or infinite.
    """
    # The seed decides the initial weights.
    torch.manual_seed(config.model_seed)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=3 * config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=config.context,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=False,
        )
    )

    train_language_model_(model.to(device), config, tokens)
    return model


def train_language_model_(
    model: PreTrainedModel, config: DemoModelConfig, tokens: torch.Tensor
) -> None:
    """Train a fresh model with AdamW and a warm-up-then-cosine schedule; leaves it in eval mode.

    It is trained where it is.

    Args:
        model: Changed in place.
        config: Training budget.
        tokens: Training stream, int64 [n].

    Raises:
        NonFiniteError: If the loss becomes NaN or infinite.
    """
    # AdamW; the rate rises over a twentieth of the steps and falls as a cosine.
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.train_lr, weight_decay=0.1)
    warmup = max(1, config.train_steps // 20)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (config.train_steps - warmup + 1)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    # Random crops of the stream.
    generator = torch.Generator().manual_seed(config.model_seed)
    offsets = torch.arange(config.context)
    with Progress("training the demo model", config.train_steps) as bar:
        for step in range(config.train_steps):
            starts = torch.randint(
                len(tokens) - config.context, (config.train_batch, 1), generator=generator
            )
            batch = tokens[starts + offsets].to(model.device)

            # Nothing is changed when a value is not finite.
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            check_finite(loss, norm, step=step, term="language-model loss")
            optimizer.step()
            schedule.step()
            bar.advance(loss=f"{loss.item():.3f}")
    model.eval()


def demo_model(config: DemoModelConfig, corpus: Corpus, device: torch.device | str = "cpu") -> Path:
    """Return the directory of the trained demo model, training it on the first call.

    Args:
        config: Shape and training budget; part of the cache key, as are the text and the versions
            of torch, transformers and tokenizers.
        corpus: The text.
        device: Where it is trained.

    Returns:
        A directory that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load.

    Raises:
        NonFiniteError: If training diverges.
    """
    # The name of the folder says what the model depends on.
    settings = {field.name: getattr(config, field.name) for field in fields(DemoModelConfig)}
    key = cache_key(
        {"config": settings, "data": corpus.digest()}, ("torch", "transformers", "tokenizers")
    )
    target = cache_folder("sliderquant") / f"llama-{key}"
    if (target / "config.json").exists():
        return target

    say(f"training a {config.layers}-block Llama once; it is kept in the user cache folder")
    tokenizer = train_tokenizer(corpus, config.vocab_size)
    stream = encode_documents(tokenizer, corpus.train)
    model = train_llama(config, stream, len(tokenizer), device)

    # Written beside its place and renamed, so that a folder of that name is complete.
    staging = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    AutoTokenizer.from_pretrained(staging)
    try:
        staging.rename(target)
    except OSError:  # another process trained the same model meanwhile: theirs is as good
        shutil.rmtree(staging)
    return target
