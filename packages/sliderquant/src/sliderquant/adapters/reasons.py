"""Errors of libraries, in one line that names what was read and what to do about it."""

from collections.abc import Iterator
from contextlib import contextmanager

from effml_common.errors import InputError, NonFiniteError, is_out_of_memory
from effml_common.parsing import one_line

REASON_LENGTH = 300  # characters of a library's own message that are repeated


def reason_of(error: BaseException) -> str:
    """Return what an exception says on one line, and what the error says that caused it.

    The class is added where the text is a word or less.

    Errors of several lines often begin with a heading and name the cause further down.

    >>> reason_of(KeyError()), reason_of(KeyError("answer"))
    ('KeyError', "KeyError 'answer'")
    >>> reason_of(ValueError("cannot read:" + chr(10) + "  no such key"))
    'cannot read: no such key'
    """
    text = one_line(error).rstrip(".;: ")
    if " " not in text:
        text = f"{type(error).__name__} {text}".rstrip()
    cause = reason_of(error.__cause__) if error.__cause__ else ""
    text = text if cause in text else f"{text}: {cause}"
    return text if len(text) <= REASON_LENGTH else f"{text[:REASON_LENGTH]} ..."


@contextmanager
def input_errors(what: str, remedy: str) -> Iterator[None]:
    """Turn any error of a library into ``what (reason); remedy``.

    Our own errors, interruptions and a lack of memory pass through as they are.

    Args:
        what: What cannot be used, such as "config.json cannot be read".
        remedy: What to do about it.

    Raises:
        InputError: If the body raises an error of a library.
    """
    try:
        yield
    except (InputError, NonFiniteError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"{what} ({reason_of(error)}); {remedy}") from None
