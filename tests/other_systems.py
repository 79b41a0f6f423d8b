"""A pytest plugin: this system without what others lack.

    TINYLLM_SYSTEM=windows python -m pytest -p tests.other_systems tests/test_train.py

windows: no fork, mkfifo, SIGKILL, fcntl, resource, /proc, /dev/zero; files whose encoding is not
given are in cp1252, with line ends of Windows; files that are open or mapped cannot be replaced,
renamed or deleted; paths in messages have backslashes. macos: no /proc; MPS, but without memory.
"""

import builtins
import functools
import io
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock  # noqa: F401  (keeps fcntl: on Windows it has other locks)
import torch
import torch.distributed.elastic.timer

ROOT = str(Path(__file__).resolve().parent.parent)
IS_WINDOWS = os.environ["TINYLLM_SYSTEM"] == "windows"
HIDDEN = ("/proc/", "/dev/zero/", "/dev/full/") if IS_WINDOWS else ("/proc/",)
real_open, real_stat, real_format = io.open, os.stat, pathlib.PurePath.__format__


def visible(path: Any) -> Any:
    if isinstance(path, str | Path) and f"{path!s}/".startswith(HIDDEN):
        raise FileNotFoundError(2, "No such file or directory", str(path))
    return path


def open_file(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
    if IS_WINDOWS and "b" not in mode:
        names = ("buffering", "encoding", "errors", "newline")
        kwargs, args = dict(zip(names, args, strict=False)) | kwargs, ()
        if kwargs.get("encoding") in (None, "locale"):
            kwargs["encoding"] = "cp1252"
        if kwargs.get("newline") is None and mode[0] in "wax":
            kwargs["newline"] = "\r\n"
    return real_open(visible(file), mode, *args, **kwargs)


def unless_open(change: Callable) -> Callable:
    def changed(*paths: Any, **kwargs: Any) -> Any:
        files = {os.path.realpath(path) for path in paths if isinstance(path, str | Path)}
        in_use = {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
        with real_open("/proc/self/maps") as maps:
            in_use |= {line.split(maxsplit=5)[-1].strip() for line in maps}
        if found := files & in_use:
            raise PermissionError(13, "The process cannot access the file", found.pop())
        return change(*paths, **kwargs)

    return changed


def format_path(path: Path, spec: str) -> str:
    file, text = sys._getframe(1).f_code.co_filename, real_format(path, spec)
    is_message = file.startswith(ROOT) and not file.startswith(f"{ROOT}/tests")
    return text.replace("/", "\\") if is_message and not path.is_absolute() else text


os.stat = lambda path, *args, **kwargs: real_stat(visible(path), *args, **kwargs)
builtins.open = io.open = open_file
if IS_WINDOWS:
    del os.fork, os.mkfifo, os.killpg, os.sched_getaffinity, signal.SIGKILL
    sys.modules |= {"fcntl": None, "resource": None}
    subprocess.Popen.kill = subprocess.Popen.terminate
    pathlib.PurePath.__format__ = format_path
    for name in ("replace", "rename", "unlink", "remove"):
        setattr(os, name, unless_open(getattr(os, name)))
else:
    torch.backends.mps.is_available = functools.cache(lambda: True)
