"""What the errors of other libraries say, for a message of ours."""

from effml_common.parsing import one_line


def reason_of(error: BaseException) -> str:
    """Return an error's whole text on one line, and that of the error that caused it.

    The kind of an error is added where its text is a word or less.

    >>> reason_of(KeyError("answer")), reason_of(ValueError("no such file"))
    ("KeyError 'answer'", 'no such file')
    """
    text = one_line(error)
    text = text if " " in text else f"{type(error).__name__} {text}".rstrip()
    cause = reason_of(error.__cause__) if error.__cause__ else ""
    return text if cause in text else f"{text}: {cause}"
