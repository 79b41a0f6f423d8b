"""Errors that a user can correct, as one line without a traceback."""

import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from system.settings import UserError


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main and exit. An error that the user can correct is one line on stderr and
    status 2: a UserError, a file that cannot be read or written, too little memory."""
    status: Any
    accept_any_text()
    try:
        status = main()
        sys.stdout.flush()
    except SystemExit as exit:  # after --help
        status = exit.code
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # the reader of the output has ended, such as `head`
        status = 1
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if not (reason := error_reason(error)):
            raise
        status = 2
        rank = int(os.environ.get("RANK", 0))  # set by torchrun
        print(f"error{f' in process {rank}' * (rank > 0)}: {reason}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # what is left cannot be written: do not try again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def accept_any_text() -> None:
    """Print characters that the terminal cannot show as escapes such as \\u2423, and read invalid
    input as U+FFFD, where Python would stop and a run or a generated text would be lost."""
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


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
