"""Errors that a user can correct, as one line without a traceback."""

import re
from pathlib import Path

from system.settings import UserError


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if there is none."""
    if isinstance(error, KeyError):  # its message is only the key
        return f"no {error}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def error_reason(error: Exception) -> str:
    """What a user can be told about an error; empty if it is a defect of the program."""
    if isinstance(error, UserError):
        return str(error).replace("\n", " ")
    if isinstance(error, OSError):
        return f"{error.filename or 'input or output'}: {error.strerror or error}"
    # in PyTorch's errors: on a GPU, on a CPU, and for sizes that no machine has
    words = ("out of memory", "DefaultCPUAllocator", "size calculation overflowed")
    if isinstance(error, MemoryError) or any(text in str(error) for text in words):
        return "not enough memory: use a smaller model, batch, window or number of samples"
    return ""


def quote_path(path: Path) -> str:
    """A path as a word of a command, in double quotes if needed, which all shells have.

    >>> quote_path(Path("runs/best.pt")), quote_path(Path("my runs/best.pt"))
    ('runs/best.pt', '"my runs/best.pt"')
    """
    return str(path) if re.fullmatch(r"[\w./\\:-]+", str(path)) else f'"{path}"'
