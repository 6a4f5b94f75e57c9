"""The demo's text: the source and the documentation of Python's own standard library.

Nothing is downloaded. The training text is the source of the standard library that runs this very
program; a few of its packages are held out as in-domain test text, and the prose of the language
reference (``pydoc_data.topics``) is held out as out-of-domain test text.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_PACKAGES = ("asyncio", "email", "http", "json", "logging")
# Learning rates are chosen on these, never on the held-out text.
DEVELOPMENT_PACKAGES = ("unittest", "xml")
# Generated tables, installed third-party code, tests and the held-out prose are no training text.
LEFT_OUT_FOLDERS = (
    *("__pycache__", "encodings", "ensurepip", "idlelib", "lib-dynload", "pydoc_data"),
    *("site-packages", "dist-packages", "test", "tests", "idle_test", "turtledemo"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Text of the standard library, split by file so that no document is in two parts.

    Attributes:
        train: Documents to train and calibrate on.
        development: Source of ``DEVELOPMENT_PACKAGES``, one string.
        code: Source of ``HELD_OUT_PACKAGES``, one string.
        prose: The language reference, one string.
    """

    train: tuple[str, ...]
    development: str
    code: str
    prose: str

    def digest(self) -> str:
        """Return a sha256 over all of the text."""
        sha = hashlib.sha256()
        for text in (*self.train, self.development, self.code, self.prose):
            sha.update(text.encode())
            sha.update(b"\0")
        return sha.hexdigest()


def library_corpus() -> Corpus:
    """Read the standard library of the running interpreter.

    Returns:
        The corpus; the order of files is fixed by their path.
    """
    from pydoc_data.topics import topics

    # Every file goes into one part, by the package that it belongs to.
    root = Path(sysconfig.get_paths()["stdlib"])
    train: list[str] = []
    development: list[str] = []
    code: list[str] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(part in LEFT_OUT_FOLDERS for part in parts):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if parts[0] in HELD_OUT_PACKAGES:
            code.append(text)
        elif parts[0] in DEVELOPMENT_PACKAGES:
            development.append(text)
        else:
            train.append(text)

    prose = "\n\n".join(topics[key] for key in sorted(topics))
    return Corpus(
        train=tuple(train),
        development="\n\n".join(development),
        code="\n\n".join(code),
        prose=prose,
    )
