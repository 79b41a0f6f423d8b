"""Random command lines and damaged files for every script: none may end in a traceback.

    python -m tests.fuzz --n 5000                      about ten cases per second
    python -m tests.fuzz --only train,generate --seed 7 --minutes 10
    python -m tests.fuzz --case 1234 --seed 7          one case again, in a folder that is kept

A case is a command that works, on small models and texts, with random changes: flags with valid and
hostile values and other paths, or an input file that is damaged. It is correct if it succeeds or
ends with status 2 and one line `error: ...`, within limits of time and memory, and changes no file
but its outputs. Case number i of a seed is always the same.

Each case runs in a fork of this process, which has imported everything, without a network and, if
started by root, as the user `nobody` (if that can read the installed packages): a crash ends only
that case.
"""

import codecs
import contextlib
import gc
import importlib
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from system.start import run

import torch

import demo
from config import TEXT_ENCODINGS
from system.command_line import parse_args
from system.settings import setting
from tests.fuzz_cases import (
    LONG,
    RARE,
    SCRIPTS,
    Case,
    make_case,
    make_fixtures,
    settings_of,
    values_of,
)
from tests.fuzz_damage import damage
from training.run_log import RunLog

ROOT = Path(__file__).resolve().parent.parent
CPU_SECONDS, WALL_SECONDS = 10, 60  # per case; the machine may be busy
RARE_SECONDS = 3  # of CPU time, for a study: it may be cut short
MEMORY = 4 << 30  # bytes that a case may allocate
NOBODY = 65534  # user id


@dataclass
class FuzzConfig:
    """Which cases are run."""

    n: int = setting(1000, "number of cases", low=1)
    seed: int = setting(0, "seed of the cases", low=0)
    only: str = setting("", "scripts, separated by commas; default: all")
    minutes: float = setting(0.0, "stop after this time; 0: never", low=0)
    damaged: float = setting(0.5, "share of cases with a damaged file", low=0, high=1)
    case: int = setting(-1, "run only this case, show its output and keep its folder", low=-1)

    def problems(self) -> list[str]:
        unknown = [name for name in self.only.split(",") if name and name not in SCRIPTS]
        return [f"no script {', '.join(unknown)}: use {', '.join(SCRIPTS)}"] if unknown else []


# --- child processes


@contextlib.contextmanager
def temporary_folder(keep: bool = False) -> Iterator[Path]:
    top = Path(tempfile.mkdtemp(prefix="fuzz"))
    top.chmod(0o755)  # cases run as another user
    try:
        yield top
    finally:
        os.chdir(ROOT)
        if not keep:
            shutil.rmtree(top, ignore_errors=True)


def fork(function: Callable[..., int], *args: Any) -> int:
    """Call a function in a child process, whose exit status it returns. Returns the process id."""
    # Ctrl-C before `try` would run the ends of this process's context managers in the child.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            status = function(*args)
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    return pid


def run_script(script: str, argv: list[str]) -> int:
    """Run a command as its script does. Returns its exit status."""
    sys.argv = [script, *argv]
    status: Any = 1
    try:
        run(importlib.import_module(script).main)
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        traceback.print_exc()
    try:  # as Python does at exit
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    return status


# --- running a case


class TimeLimit(BaseException):
    """Raised in a case that has used its time."""


def raise_time_limit(*args: object) -> None:
    raise TimeLimit


def no_network(*args: object, **kwargs: object) -> Any:
    raise OSError("no network in this test")


def others_can_read(file: Path) -> bool:
    """Whether the user `nobody` can read a file."""
    return bool(file.stat().st_mode & 0o004) and all(p.stat().st_mode & 0o001 for p in file.parents)


def run_child(case: Case, base: Path, folder: Path, seed: int) -> int:
    """Prepare the folder and run the case. Returns its exit status."""
    if os.getuid() == 0 and others_can_read(Path(torch.__file__)):  # for imports that come later
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    os.setpgid(0, 0)
    work, rng = folder / "work", random.Random(f"{seed}:{case.number}:child")
    shutil.copytree(base, work, copy_function=shutil.copyfile)
    os.chdir(work)
    Path("../neighbor.txt").write_text("not yours\n")
    if case.damaged:
        Path("../damage").write_text(damage(Path(case.damaged), rng))
    Path("secret.txt").write_text("secret")
    Path("secret.txt").chmod(0)
    Path("locked").mkdir(mode=0o555)
    Path("loop").symlink_to("loop")
    Path("../before").write_text(json.dumps(checksums(folder)))
    if rng.random() < 0.9:  # drawing takes longer than everything else
        RunLog.plot = lambda self: None  # type: ignore[method-assign]
    demo.ThreadingHTTPServer.serve_forever = lambda self: None  # type: ignore[method-assign]
    socket.socket.connect = socket.getaddrinfo = no_network  # type: ignore[assignment]
    subprocess.run = subprocess.Popen = no_network  # type: ignore[assignment, misc]
    redirect(folder, case.stdin, case.stdout)
    set_limits(RARE_SECONDS if case.script in RARE else CPU_SECONDS)
    return run_script(case.script, case.argv)


def set_limits(cpu_seconds: int) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 28,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds + 5,) * 2)  # if stuck outside of Python
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, raise_time_limit)
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    signal.alarm(WALL_SECONDS)


def redirect(folder: Path, stdin: bytes | None = b"", stdout: str = "file") -> None:
    """Set this process's standard streams to files in a folder, or the output to one of STDOUTS."""
    (folder / "stdin").write_bytes(stdin or b"")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    out = os.open("/dev/full" if stdout == "/dev/full" else folder / "stdout", flags)
    if stdout == "closed pipe":
        read_end, out = os.pipe()
        os.close(read_end)
    inputs, errors = os.open(folder / "stdin", os.O_RDONLY), os.open(folder / "stderr", flags)
    for source, target in ((inputs, 0), (out, 1), (errors, 2)):
        os.dup2(source, target)
    encoding = "ascii" if stdout == "ASCII" else "utf-8"
    sys.stdin = None if stdin is None else os.fdopen(0, encoding="utf-8")  # type: ignore
    sys.stdout = os.fdopen(1, "w", encoding=encoding)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace")


def checksums(folder: Path) -> dict[str, int]:
    """A checksum of every file that a case must not change without being asked, by its path."""
    files = [folder / "neighbor.txt", *(folder / "work").rglob("*")]
    readable = (p for p in files if not p.is_symlink() and p.is_file() and p.name != "secret.txt")
    return {os.path.relpath(p, folder / "work"): zlib.crc32(p.read_bytes()) for p in readable}


def run_case(case: Case, base: Path, folder: Path, seed: int) -> int:
    """Run a case in a child process. Returns its exit status, negative if a signal ended it."""
    folder.mkdir()
    folder.chmod(0o777)
    pid = fork(run_child, case, base, folder, seed)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):  # what it has started
        os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(status)


# --- judging a case


def judge(case: Case, folder: Path, status: int) -> tuple[str, str] | None:
    """What is wrong with a finished case: a kind, to group by, and a detail; None if it is fine."""
    stderr = (folder / "stderr").read_text("utf-8", "replace").rstrip()
    name, message, place = parse_traceback(stderr)
    slow = name == "TimeLimit" or -status in (signal.SIGALRM, signal.SIGXCPU)
    if slow and (case.script in RARE or re.search(rf"--({LONG})\W", shlex.join(case.argv[-6:]))):
        return None
    if slow or status < 0:
        how = "time limit" if slow else signal.Signals(-status).name
        return f"{how} {place}", stderr[-200:]
    if name:
        return f"{name} {place}", message
    *before, last = stderr.splitlines() or [""]
    if status == 2 and (not last.startswith("error: ") or any("error: " in b for b in before)):
        return "more than one line", stderr[-300:]
    if status not in (0, 1, 2) and case.stdout == "file":
        return f"status {status}", stderr[-200:]
    old, new = json.loads((folder / "before").read_text()), checksums(folder)
    changed = [p for p in old if old[p] != new.get(p) and not asked_for(p, case)]
    if changed:
        return f"file {'changed' if changed[0] in new else 'deleted'}", ", ".join(changed[:3])
    left = [p for p in new if re.search(r"\.(part|old)(/|$)", p)]
    return ("temporary file", ", ".join(left[:3])) if left else None


def parse_traceback(text: str) -> tuple[str, str, str]:
    """The type of the exception in a traceback, its message, and the place in this project."""
    _, found, trace = text.rpartition("Traceback (most recent call last):\n")
    if not found:
        return "", "", ""
    message = next((line for line in trace.splitlines() if not line.startswith(" ")), "")
    ours = rf'File "{ROOT}/(?!tests/)(.+?)", line (\d+), in (?!run\n)(\S+)'
    frames = re.findall(ours, trace)
    place = "at {}:{} ({})".format(*frames[-1]) if frames else "at exit"
    return message.partition(":")[0] or "exception", message, place


def asked_for(path: str, case: Case) -> bool:
    """Whether a command names an existing file as one to replace or to continue."""
    words = {os.path.normpath(word) for word in (*case.argv, *values_of(case.argv).values())}
    options = shlex.join(case.argv)
    if "--output" in options and path in words:
        return True
    if "--overwrite" not in options and "--resume" not in options:
        return False
    folder, _, rest = path.partition("/")
    places = {"prepare": "data", "train": "checkpoints", "finetune": "checkpoints"}
    if case.script == "export":
        return path in words or (folder in words and folder.startswith("hf"))
    return folder == places.get(case.script) and (rest.split("/")[0] in words or "/" not in rest)


# --- main


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns 1 if a case has failed."""
    settings = parse_args(FuzzConfig, argv, __doc__ or "")
    torch.set_num_threads(1)
    failures: dict[tuple[str, str], list[str]] = {}
    counts: Counter[str] = Counter()
    one_case = settings.case >= 0
    with temporary_folder(keep=one_case) as top:
        os.environ |= {"HF_HUB_OFFLINE": "1", "MPLCONFIGDIR": str(top), "HOME": str(top)}
        make_fixtures(top / "base")
        scripts = [name for name in settings.only.split(",") if name] or SCRIPTS
        flags = {script: settings_of(script) for script in scripts}
        for encoding in (*TEXT_ENCODINGS, "idna"):  # of host names
            codecs.lookup(encoding)  # a child may not read Python's files
        gc.freeze()  # a collection in a child would copy all pages
        started = time.monotonic()
        for number in [settings.case] if one_case else range(settings.n):
            case = make_case(settings.seed, number, scripts, settings.damaged, flags, top / "base")
            folder = top / f"case{number}"
            status = run_case(case, top / "base", folder, settings.seed)
            problem = judge(case, folder, status)
            counts.update([case.script, f"status {status}{' of damaged' * bool(case.damaged)}"])
            text = f"case {number} of seed {settings.seed}: {case}"
            if case.damaged:
                text += f"  [{case.damaged}: {(folder / 'damage').read_text()}]"
            if problem:
                text += f"\n        {ascii(problem[1])[1:-1][:300]}"
                failures.setdefault((case.script, problem[0]), []).append(text)
                print(f"{case.script}: {problem[0]}\n    {text}", flush=True)
            if one_case:
                print(f"{text}\nfolder: {folder}\n{(folder / 'stderr').read_text()}")
            else:
                shutil.rmtree(folder)
            if settings.minutes and time.monotonic() - started > 60 * settings.minutes:
                break
    print("\nfailures by kind, each with its first case:")
    for (script, kind), texts in sorted(failures.items(), key=lambda item: -len(item[1])):
        print(f"{len(texts):5} {script}: {kind}\n      {texts[0]}")
    print("cases:", ", ".join(f"{name}: {n}" for name, n in sorted(counts.items())))
    n_failed, n_cases = sum(map(len, failures.values())), counts.total() // 2
    print(f"{n_failed} of {n_cases} cases failed, {time.monotonic() - started:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    run(main)
