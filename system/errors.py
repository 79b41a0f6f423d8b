"""Errors that a user can correct, as one line without a traceback."""

import os
import sys
from collections.abc import Callable

from config import UserError


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main and exit. An error that the user can correct is one line on stderr and
    status 2: a UserError, a file that cannot be read or written, too little memory."""
    try:
        status = main()
        sys.stdout.flush()
        sys.exit(status)
    except BrokenPipeError:  # the reader of the output has ended, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if not (reason := error_reason(error)):
            raise
        rank = int(os.environ.get("RANK", 0))  # set by torchrun
        print(f"error{f' in process {rank}' * (rank > 0)}: {reason}", file=sys.stderr)
        sys.exit(2)


def error_reason(error: Exception) -> str:
    """What a user can be told about an error; empty if it is a defect of the program."""
    if isinstance(error, UserError):
        return str(error).replace("\n", " ")
    if isinstance(error, OSError):
        return f"{error.filename or 'input or output'}: {error.strerror or error}"
    words = ("out of memory", "DefaultCPUAllocator")  # in PyTorch's errors, on a GPU and on a CPU
    if isinstance(error, MemoryError) or any(text in str(error) for text in words):
        return "not enough memory: use a smaller model, batch, window or number of samples"
    return ""
