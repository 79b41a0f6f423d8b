"""The start of every command. Import this module before torch."""

import io
import os
import sys
from collections.abc import Callable
from typing import Any

from system.settings import UserError, error_reason

# At the end of each operation, threads of GNU's OpenMP spin until the next one begins: by default
# 300,000 times, which takes the core from other threads. Beside another program a training step
# took 20 times as long, with this limit 2 to 3 times (docs/benchmarks.md). Read on loading torch.
if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"}:
    os.environ["GOMP_SPINCOUNT"] = "2000"


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
