"""The tokenizer of a model folder in the words of llama.cpp.

llama.cpp splits and merges text with code of its own. Two kinds of ``tokenizer.json`` have an exact
counterpart there: byte-level BPE ("gpt2") with one of the splitting rules below, and BPE over characters
with bytes as a last resort ("llama"), as made from SentencePiece files.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effml_common.errors import InputError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How text is split before merging, and what llama.cpp calls it.
SPLITTING_RULES = {
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_OTHERS}": "llama-bpe",
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_OTHERS}": "qwen2",
}
_GPT2_RULE = "gpt-2"  # the rule that the tokenizers library calls ByteLevel
# Kinds of tokens, as the file numbers them.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_WORST_SCORE = -1e9  # of a token that no merge makes


def add_tokenizer(writer: Any, folder: Path, rows: int) -> None:
    """Write a folder's tokenizer into the metadata of a GGUF file.

    Args:
        writer: ``gguf.GGUFWriter``.
        folder: Model folder with ``tokenizer.json``.
        rows: Rows of the embedding; those without a token get a name of their own.

    Raises:
        InputError: If the tokenizer has no exact counterpart in llama.cpp.
    """
    from gguf import SpecialVocab

    # The tokenizers library's own file says everything.
    tokenizer = _read(folder / "tokenizer.json")
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise InputError(
            f"{folder}/tokenizer.json is of the type {model.get('type')}, and only BPE is written to "
            "GGUF; serve this model in another format"
        )
    tokens, kinds = _tokens(tokenizer, rows)

    # Characters with bytes as a last resort merge by scores, byte-level BPE by a list of merges.
    by_characters = bool(model.get("byte_fallback"))
    _check_normalizers(folder, tokenizer, by_characters)
    if by_characters:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, model["merges"]))
        writer.add_add_space_prefix(_prepends_space(tokenizer))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitting_rule(folder, tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)

    # Special tokens, chat template, and whether BOS stands in front.
    special = SpecialVocab(folder, load_merges=not by_characters, n_vocab=rows)
    special.add_special_token["bos"] = _begins_with_bos(tokenizer)
    special.add_to_gguf(writer, quiet=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); GGUF needs this file") from None


def _tokens(tokenizer: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Return the token and its kind for every row of the embedding."""
    # Rows without a token come from padding.
    tokens = [f"[PAD{row}]" for row in range(rows)]
    kinds = [_UNUSED] * rows
    by_characters = tokenizer["model"].get("byte_fallback")
    for token, row in tokenizer["model"]["vocab"].items():
        if row < rows:
            is_byte = by_characters and len(token) == 6 and token.startswith("<0x")
            tokens[row], kinds[row] = token, _BYTE if is_byte else _NORMAL

    # Special tokens and those that were added are taken out of a text before it is split.
    unknown = tokenizer["model"].get("unk_token")
    for added in tokenizer.get("added_tokens", []):
        if added["id"] < rows:
            tokens[added["id"]] = added["content"]
            kinds[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    if unknown in tokens:
        kinds[tokens.index(unknown)] = _UNKNOWN
    return tokens, kinds


def _scores(tokens: Sequence[str], merges: Sequence[Any]) -> list[float]:
    """Return a score for each token: the earlier it is merged, the higher."""
    first_merge: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        first_merge.setdefault(left + right, rank)
    return [-float(first_merge[t]) if t in first_merge else _WORST_SCORE for t in tokens]


def _steps(part: Mapping[str, Any] | None, plural: str) -> list[Mapping[str, Any]]:
    """Return the steps of a part of the tokenizer, which may be one step or a sequence of them."""
    if part is None:
        return []
    return part.get(plural, [part])


def _check_normalizers(folder: Path, tokenizer: Mapping[str, Any], by_characters: bool) -> None:
    """Refuse what changes a text before it is split and has no counterpart in llama.cpp.

    It replaces spaces by "▁" and puts one in front, in tokenizers of characters. NFC, which most texts
    are in already, is left out there as in llama.cpp's own converter.
    """
    known = ("Prepend", "Replace", "NFC") if by_characters else ("NFC",)
    steps = _steps(tokenizer.get("normalizer"), "normalizers")
    others = [step["type"] for step in steps if step["type"] not in known]
    others += [
        "Replace"
        for step in steps
        if step["type"] == "Replace"
        and (step["pattern"], step["content"]) != ({"String": " "}, "▁")
    ]
    splitters = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if any(step["type"] == "ByteLevel" and step.get("add_prefix_space") for step in splitters):
        others.append("add_prefix_space")
    if others:
        raise InputError(
            f"{folder}/tokenizer.json changes text by {', '.join(dict.fromkeys(others))}, which "
            "llama.cpp does not; serve this model in another format"
        )


def _prepends_space(tokenizer: Mapping[str, Any]) -> bool:
    normalizers = _steps(tokenizer.get("normalizer"), "normalizers")
    splitters = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    prepends = any(step["type"] == "Prepend" for step in normalizers)
    return prepends or any(step.get("prepend_scheme") in ("always", "first") for step in splitters)


def _splitting_rule(folder: Path, tokenizer: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of the rule by which text is split before merging."""
    steps = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    rules = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    byte_level = any(step["type"] == "ByteLevel" and step.get("use_regex") for step in steps)
    if byte_level and not rules:
        return _GPT2_RULE
    if len(rules) == 1 and rules[0] in SPLITTING_RULES:
        return SPLITTING_RULES[rules[0]]
    raise InputError(
        f"{folder}/tokenizer.json splits text by {rules or 'no rule'}, which is no rule of Llama 3, "
        "Qwen or GPT-2 in llama.cpp; serve this model in another format"
    )


def _begins_with_bos(tokenizer: Mapping[str, Any]) -> bool:
    """Whether the tokenizer puts a special token in front of a text."""
    for step in _steps(tokenizer.get("post_processor"), "processors"):
        template = step.get("single") or []
        if step["type"] == "TemplateProcessing" and template and "SpecialToken" in template[0]:
            return True
    return False
