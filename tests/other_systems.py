"""A pytest plugin: this system without what others lack. Only a real machine has the rest of them.

    TINYLLM_SYSTEM=windows python -m pytest -p tests.other_systems tests/test_train.py
    TINYLLM_SYSTEM=macos python -m pytest -p tests.other_systems

windows: no fork, mkfifo, SIGKILL, fcntl, resource, /proc and /dev; files that do not name their
encoding are in cp1252, with its line ends; files that are open or mapped cannot be replaced,
renamed or deleted; paths in messages have backslashes. macos: no /proc; MPS without memory.
"""

import builtins
import io
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock  # noqa: F401  (has another implementation on Windows, so it keeps fcntl)
import torch
import torch.distributed.elastic.multiprocessing.api  # noqa: F401  (tests the platform itself)

ROOT = str(Path(__file__).resolve().parent.parent)
MISSING = {os: "fork mkfifo killpg sched_getaffinity sysconf wait", signal: "SIGKILL"}
real_open, real_stat, real_format = io.open, os.stat, pathlib.PurePath.__format__
hidden: tuple[str, ...] = ("/proc/",)


def check_not_hidden(path: Any) -> None:
    if isinstance(path, str | Path) and f"{path!s}/".startswith(hidden):
        raise FileNotFoundError(2, "No such file or directory", str(path))


def stat(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
    check_not_hidden(path)
    return real_stat(path, *args, **kwargs)


def open_file(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
    check_not_hidden(file)
    return real_open(file, mode, *args, **kwargs)


def open_on_windows(
    file: Any,
    mode: str = "r",
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    **others: Any,
) -> Any:
    check_not_hidden(file)
    if "b" not in mode:
        encoding = "cp1252" if encoding in (None, "locale") else encoding
        newline = "\r\n" if newline is None and mode[0] in "wax" else newline
    return real_open(file, mode, buffering, encoding, errors, newline, **others)


def unless_open(change: Callable) -> Callable:
    """An operation on files that fails while one of them is open or mapped."""

    def changed(*paths: Any, **kwargs: Any) -> Any:
        targets = {os.path.realpath(path) for path in paths if isinstance(path, str | Path)}
        in_use = {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
        with real_open("/proc/self/maps") as maps:
            in_use |= {line.split(maxsplit=5)[-1].strip() for line in maps}
        if found := targets & in_use:
            raise PermissionError(13, "The process cannot access the file", found.pop())
        return change(*paths, **kwargs)

    return changed


def format_on_windows(path: Path, spec: str) -> str:
    """In messages of the project, with backslashes."""
    file = sys._getframe(1).f_code.co_filename
    own = file.startswith(ROOT) and not file.startswith(f"{ROOT}/tests")
    return real_format(path, spec).replace("/", "\\" if own else "/")


os.stat = stat
builtins.open = io.open = open_file
if os.environ["TINYLLM_SYSTEM"] == "macos":
    torch.backends.mps.is_available = lambda: True
else:
    hidden = ("/proc/", "/dev/zero/", "/dev/full/")
    for module, names in MISSING.items():
        for name in names.split():
            delattr(module, name)
    sys.modules |= {"fcntl": None, "resource": None}
    multiprocessing.set_start_method("spawn")
    subprocess.Popen.kill = subprocess.Popen.terminate
    builtins.open = io.open = open_on_windows
    pathlib.PurePath.__format__ = format_on_windows
    for name in ("replace", "rename", "unlink", "remove"):
        setattr(os, name, unless_open(getattr(os, name)))
