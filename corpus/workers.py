"""Work on batches of text, divided among processes."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from corpus.clean import Chunk
from system.settings import UserError

Result = TypeVar("Result")


def init_worker() -> None:
    """Let only the parent process handle Ctrl-C, and exit when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def parallel_map(
    function: Callable[[list[Chunk]], Result], batches: Iterable[list[Chunk]], workers: int
) -> Iterator[Result]:
    """Yield function(batch) of each batch, in order, computed in several processes. Only as many
    batches are read ahead as keep them busy. Raises UserError if a process is killed."""
    if workers < 2:
        yield from map(function, batches)
        return
    if sys.platform == "win32":
        workers = min(workers, 61)  # ProcessPoolExecutor raises ValueError for more
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=init_worker)
    try:
        pending: deque[Future[Result]] = deque()
        for batch in batches:
            pending.append(pool.submit(function, batch))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps because memory ran out: try --workers 1"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
