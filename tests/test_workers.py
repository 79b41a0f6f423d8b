"""Batches of text are divided among processes."""

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any
from unittest.mock import Mock, call

import pytest

from corpus import sources
from system.settings import UserError


def test_batches_are_mapped_in_order_and_few_are_read_ahead(monkeypatch: pytest.MonkeyPatch):
    read, settings = [], {}

    def pool(workers: int, **kwargs: Any) -> ThreadPoolExecutor:
        settings.update(kwargs, workers=workers)
        return ThreadPoolExecutor(workers)

    def batches() -> Iterator[list[Any]]:
        for i in range(20):
            read.append(i)
            yield [i]

    monkeypatch.setattr(sources, "ProcessPoolExecutor", pool)
    results = sources.parallel_map(lambda batch: batch[0] ** 2, batches(), 2)
    assert next(results) == 0 and len(read) == 5  # four more than the first keep two busy
    assert list(results) == [i**2 for i in range(1, 20)]
    assert settings["workers"] == 2 and settings["initializer"] is sources.init_worker
    assert settings["mp_context"].get_start_method() == "spawn"


def test_one_process_needs_no_pool(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "ProcessPoolExecutor", None)
    assert list(sources.parallel_map(len, [[], []], 1)) == [0, 0]


@pytest.mark.parametrize(("platform", "expected"), [("win32", 61), ("linux", 96)])
def test_windows_has_at_most_61_processes(monkeypatch: pytest.MonkeyPatch, platform, expected):
    asked = []
    monkeypatch.setattr(
        sources, "ProcessPoolExecutor", lambda n, **_: asked.append(n) or ThreadPoolExecutor(1)
    )
    monkeypatch.setattr(sources.sys, "platform", platform)
    assert list(sources.parallel_map(len, [[]], 96)) == [0] and asked == [expected]


def test_a_killed_worker_is_one_error(monkeypatch: pytest.MonkeyPatch):
    def die(batch: list[Any]) -> None:
        raise BrokenProcessPool

    monkeypatch.setattr(sources, "ProcessPoolExecutor", lambda n, **_: ThreadPoolExecutor(n))
    with pytest.raises(UserError, match=r"a worker process was killed.*--workers 1"):
        list(sources.parallel_map(die, [[], []], 2))


def test_a_worker_ignores_ctrl_c_and_ends_with_its_parent(monkeypatch: pytest.MonkeyPatch):
    ended, calls, handlers = threading.Event(), Mock(), {}
    calls.exit.side_effect = lambda status: ended.set()
    monkeypatch.setattr(sources.multiprocessing, "parent_process", lambda: calls.parent)
    monkeypatch.setattr(sources.os, "_exit", calls.exit)
    monkeypatch.setattr(sources.signal, "signal", handlers.__setitem__)
    sources.init_worker()
    assert ended.wait(10) and calls.mock_calls == [call.parent.join(), call.exit(1)]
    assert handlers == {signal.SIGINT: signal.SIG_IGN}
