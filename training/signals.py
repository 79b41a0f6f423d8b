"""Stopping a run by SIGINT (Ctrl-C) or SIGTERM, at the end of a step."""

import contextlib
import os
import signal
from types import FrameType

from training.distributed import all_reduce_max


class StopSignal:
    """Inside this context, the first SIGINT or SIGTERM only sets `number`; a second one ends the
    process immediately."""

    def __init__(self) -> None:
        self.number = 0

    def requested(self) -> bool:
        """Whether any of the processes has received a signal; then all of them stop."""
        agreed = all_reduce_max(self.number)
        self.number = agreed or self.number  # a signal may have arrived meanwhile
        return agreed > 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        text = "\nstopping after this step; press Ctrl-C again to stop now, without saving\n"
        # print raises RuntimeError if the signal has interrupted another print
        with contextlib.suppress(OSError):
            os.write(2, text.encode())  # to standard error
        for s in self.handlers:
            signal.signal(s, signal.SIG_DFL)

    def __enter__(self) -> "StopSignal":
        self.handlers = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for s, handler in self.handlers.items():
            signal.signal(s, handler)
