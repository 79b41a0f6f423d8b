"""Random command lines and damaged files for every script: none may end in a traceback.

    python -m tests.fuzz --n 5000                      about ten cases per second
    python -m tests.fuzz --only train,generate --seed 7 --minutes 10
    python -m tests.fuzz --case 1234 --seed 7          one case again, in a folder that is kept

A case is a command that works, on small models and texts, with random changes: flags with valid and
hostile values and other paths, or an input file that is damaged. It is correct if it succeeds or
ends with status 2 and one line `error: ...`, within limits of time and memory, and changes no file
but its outputs. Case number i of a seed is always the same.

Each case runs in a fork of this process, which has imported everything, without a network and, if
started by root, as the user `nobody`: a crash ends only that case and cannot damage the machine.
"""

import codecs
import contextlib
import gc
import importlib
import io
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
from collections.abc import Iterator
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

import config
from config import UserError, kind_of, parse_args, setting
from tests.damage import damage
from training.run_log import RunLog

ROOT = Path(__file__).resolve().parent.parent
CPU_SECONDS, WALL_SECONDS = 10, 60  # per case; the machine may be busy
MEMORY = 4 << 30  # bytes that a case may allocate
NOBODY = 65534  # user id

WORDS = "the quick brown fox jumps over a lazy dog and then it sleeps".split()
RUN = "--device=cpu --no-compile --precision=float32 --batch_size=2 --max_steps=2 --eval_every=1 "
RUN += "--eval_windows=2 --sample_tokens=3"
TINY = f"--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 {RUN}"
SAMPLE = "--max_new_tokens=5 --device=cpu"
CHAR, LLAMA, BPE, QA = (f"checkpoints/{name}/best.pt" for name in ("char", "llama", "bpe", "qa"))
ADAPTER = "checkpoints/lora/adapter.pt"
# The inputs of the cases are made by these commands, in this order.
FIXTURES = (
    f"train --data=data/input.txt --tag=char --save_every=1 {TINY}",
    f"train --data=data/input.txt --tag=llama --arch=llama {TINY}",
    f"train --data=data/docs.jsonl --tag=bpe --tokenizer=bpe --vocab_size=300 --arch=gpt2 {TINY}",
    f"finetune {CHAR} --objective=qa --data=data/qa.json --tag=qa {RUN}",
    f"finetune {LLAMA} --data=data/input.txt --lora_rank=2 --tag=lora {RUN}",
    "prepare data/docs.jsonl --name=set --vocab_size=300 --workers=1",
    f"export {LLAMA} hf",
    f"export {BPE} hf_bpe",
    f"generate {CHAR} {SAMPLE}",
    f"plots --picture=attention --text=the {CHAR}",
)
# The commands of the cases, which work: script and arguments.
COMMANDS = (
    *(f"train --tag=new {TINY} --data={name}" for name in ("data/input.txt", "data/texts")),
    f"train --tag=new {TINY} --data=data/set",
    f"train --tag=new {TINY} --data=data/set --doc_mask",
    f"train --tag=new {TINY} --data=data/qa.json",
    f"train --tag=new {TINY} --data=data/docs.jsonl --tokenizer=bpe --vocab_size=300",
    *(f"train --resume --tag={name} --max_steps=3" for name in ("char", "bpe")),
    f"train --overwrite --tag=char --data=data/input.txt {TINY}",
    *(f"generate {name} {SAMPLE}" for name in (CHAR, LLAMA, BPE, "")),
    f"generate {CHAR} --prompt_file=data/texts/a.txt --output_file=out.txt {SAMPLE}",
    f"generate {QA} --num_samples=2 {SAMPLE}",
    f"generate {CHAR} --beams=2 {SAMPLE}",
    f"generate {CHAR} --stream --precision=int8 {SAMPLE}",
    "prepare data/docs.jsonl --name=new --vocab_size=300 --workers=1",
    "prepare data/texts --name=new --tokenizer=char --workers=1 --separator=the",
    "prepare data/input.txt --name=set --overwrite --vocab_size=260 --workers=1 --stats",
    "prepare --name=set --stats",
    f"evaluate {CHAR} {BPE} --device=cpu",
    f"evaluate {CHAR} --data=data/texts/a.txt --split=train",
    f"finetune {CHAR} --data=data/texts/a.txt --tag=new {RUN}",
    f"finetune {CHAR} --data=data/docs.jsonl --tag=new --lora_rank=2 {RUN}",
    f"finetune {BPE} --objective=qa --data=data/qa.json --tag=new {RUN}",
    f"finetune {CHAR} --objective=dpo --data=data/pairs.jsonl --tag=new {RUN}",
    f"finetune --objective=distill --teacher={CHAR} --n_embd=8 --tag=new {RUN}",
    "finetune --resume --tag=qa --objective=qa --max_steps=3",
    "finetune --resume --tag=lora --max_steps=3",
    f"finetune {LLAMA} --merge={ADAPTER} --tag=new",
    *(f"export {name} out" for name in (LLAMA, BPE, ADAPTER)),
    f"export {LLAMA} hf --overwrite",
    *(f"export --from={name} checkpoints/new.pt" for name in ("hf", "hf_bpe")),
    *(f"explore chat {name} {SAMPLE}" for name in (CHAR, QA)),
    f"explore probs {CHAR} {SAMPLE}",
    f"explore sweep {CHAR} --settings=temperature=0.5,1 {SAMPLE}",
    "plots checkpoints/char checkpoints/qa --output_file=out.png",
    "plots checkpoints/char/log.jsonl --x=time",
    f"plots --picture=attention {CHAR} --text=the --output_file=out.svg",
    f"plots --picture=positions {BPE}",
    f"plots --picture=embeddings {CHAR}",
    f"plots --picture=temperatures {CHAR} --text=the",
    f"demo {CHAR}",
    f"experiments.short_speeches {CHAR} --pairs=2",
    f"experiments.sampling {CHAR} --quick --results=out",
    "experiments.swaps --quick --data=data/input.txt --results=out",
    "experiments.bench data --data=data/input.txt --steps=1",
)
SCRIPTS = tuple(dict.fromkeys(command.split()[0] for command in COMMANDS))
RARE = tuple(name for name in SCRIPTS if name == "demo" or name.startswith("experiments"))
# Flags with which a run may be as long as the user likes.
LONG = "max_steps|max_iters|max_new_tokens|max_tokens|sample_tokens|grad_accum|repeats|steps|pairs"
SKIPPED = {"compile", "workers", "share", "tensorboard", "wandb"}  # slow, or not installed

PATHS = (
    *("missing", "missing/deep/x.pt", "data/input.txt/inside", "photos", "photos/cat.jpg", "loop"),
    *("locked", "locked/x.txt", "secret.txt", "x" * 300, "", ".", "..", "data/one.txt", "new.txt"),
    *("/dev/null", "/dev/full", "/dev/zero", "/proc/self/mem", "/proc/none/x", "data/empty.txt"),
    *("data/input.txt", "data/texts", "data/qa.json", "data/docs.jsonl", "data/pairs.jsonl"),
    *("data/set", "hf", CHAR, BPE, QA, ADAPTER, "checkpoints", "checkpoints/char", "new.png"),
    *("checkpoints/char/log.jsonl", "\udcff\udcfe", "ü/☃", "a b\n", "-x", "new.pt"),
)
TEXTS = (
    *("", " ", "\n", "\\n", "a|b", "||", "\udcff", "🤯" * 60, "x" * 300, "the fox", "\u202e\ufeff"),
    *("0", "0,1", "9", "nan", "1,inf", "0.5,1e-46", "temperature=1e-46,nan", "top_k=1 top_p=0,1"),
    *("temperature=0.5 temperature=1", "a=b", "=", "-1", "<|endoftext|>", "<EOS>", "user/name"),
)
INTS = ("0", "-1", "5", "7", "17", "300", "1" * 99, str(10**12))
INTS += tuple(map(str, (2**31, 2**63 - 1, 2**63, 2**64)))
FLOATS = tuple("-0.0 nan inf -inf 1e300 1e308 1e39 1e5 1e-5 1e-8 1e-46 1e-300 0.99999999".split())
BROKEN = ("", "abc", "1.5", "0x10", "1_000", "１", "1" * 5000, "1e3", "\n", " 1")  # noqa: RUF001
STDINS = (b"", b"\n", b"hello\n\n", b"the fox\n/new\nwho?\n", b"\xff\xfe\n\n", b"x" * 9999, None)
STDOUTS = (*["file"] * 60, "/dev/full", "closed pipe", "ASCII")


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
        """Unknown scripts."""
        unknown = [name for name in self.only.split(",") if name and name not in SCRIPTS]
        return [f"no script {', '.join(unknown)}: use {', '.join(SCRIPTS)}"] if unknown else []


class Case(NamedTuple):
    """A command line, its standard input and output, and the file that is damaged before it."""

    number: int
    script: str
    argv: list[str]
    stdin: bytes | None = b""
    stdout: str = "file"
    damaged: str = ""

    def __str__(self) -> str:
        program = f"-m {self.script}" if "." in self.script else f"{self.script}.py"
        words = [word if len(word) < 400 else word[:20] + "..." for word in self.argv]
        text = shlex.join(["python", *program.split(), *words])
        text += " <&-" * (self.stdin is None) + f" > {self.stdout}" * (self.stdout != "file")
        return text if text.isprintable() else ascii(text)[1:-1]


# --- random cases


def settings_of(script: str) -> list[Field]:
    """The fields of all settings of a script: what it passes to parse_args."""
    module, study = importlib.import_module(script), importlib.import_module("experiments.study")
    found: list[Field] = []

    def parse(classes: Any, *args: Any, **kwargs: Any) -> Any:
        for cls in classes if isinstance(classes, tuple) else (classes,):
            found.extend(f for f in fields(cls) if f.metadata.get("flag", True))
        raise UserError("")

    parsers = [m for m in (module, study) if hasattr(m, "parse_args")]
    for m in parsers:
        m.parse_args = parse  # type: ignore[attr-defined]
    with contextlib.suppress(UserError):
        module.main([])
    for m in parsers:
        m.parse_args = parse_args  # type: ignore[attr-defined]
    return [f for f in found if f.name not in SKIPPED]


def random_value(rng: random.Random, f: Field) -> str:
    """A value for a flag: valid, near its limits, hostile, or of another type."""
    if choices := f.metadata.get("choices"):
        return rng.choice([*choices * 3, rng.choice(TEXTS)])
    if kind_of(f) is str:
        return rng.choice(rng.choice([PATHS, TEXTS]))
    is_int = kind_of(f) is int
    limits = [f.metadata[key] for key in ("low", "high", "above", "below") if key in f.metadata]
    step = rng.choice([0, 1, -1] if is_int else [0, 1, -1, 1e-9, -1e-9, 1e-300])
    limit = str(rng.choice(limits or [0]) + step)
    valid = rng.choice(["1", "2", "3", "4", "8"] if is_int else ["0.1", "0.5", "0.9", "1.0", "2"])
    hostile = rng.choice(INTS if is_int else FLOATS + INTS)
    return rng.choices([limit, valid, hostile, rng.choice(BROKEN)], [20, 40, 37, 3])[0]


def random_flag(rng: random.Random, f: Field) -> list[str]:
    """A flag, well-formed in most cases."""
    name = rng.choice([f.name, f.name, f.metadata.get("alias", f.name), f.name.replace("_", "-")])
    if kind_of(f) is bool:
        return [rng.choice([*[f"--{name}", f"--no-{name}"] * 10, f"--{name}=yes"])]
    if kind_of(f) is tuple:
        return [rng.choice(PATHS)]
    value, form = random_value(rng, f), rng.random()
    if form < 0.02:
        return [f"--{name}"] if form < 0.01 else [f"--{name}x", value]
    return [f"--{name}={value}"] if form < 0.6 else [f"--{name}", value]


def values_of(argv: list[str]) -> dict[str, str]:
    """The flags of a command that have a value, by name."""
    pairs = (word.removeprefix("--").split("=", 1) for word in argv if word.startswith("--"))
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def input_files(argv: list[str], base: Path) -> list[list[Path]]:
    """The files that a command reads: a list for each of its arguments, files in it if it is a
    folder."""
    flags = values_of(argv)
    names = [*flags.values(), *(word for word in argv if not word.startswith("--"))]
    names += [f"checkpoints/{flags['tag']}"] if "--resume" in argv else []
    names += [f"data/{flags['name']}"] if argv[0] == "--name=set" else []
    paths = [base / name for name in names if "/" in name or name.startswith("hf")]
    found = [[path] if path.is_file() else sorted(path.rglob("*.*")) for path in paths]
    return [[p for p in files if p.is_file() and p.suffix != ".png"] for files in found if files]


def make_case(settings: FuzzConfig, number: int, flags: dict[str, list[Field]], base: Path) -> Case:
    """Case `number` of a seed."""
    rng = random.Random(f"{settings.seed}:{number}")
    scripts = [name for name in settings.only.split(",") if name] or list(SCRIPTS)
    common = [name for name in scripts if name not in RARE]
    script = rng.choice(common if common and rng.random() > 0.05 else scripts)
    argv = rng.choice([c for c in COMMANDS if c.split()[0] == script]).split()[1:]
    inputs = input_files(argv, base)
    if inputs and rng.random() < settings.damaged:
        path = rng.choice(rng.choice(inputs))
        return Case(number, script, argv, damaged=str(path.relative_to(base)))
    for _ in range(rng.choice([0, 1, 1, 1, 1, 2, 2, 3])):
        argv += random_flag(rng, rng.choice(flags[script]))
    positions = [i for i, word in enumerate(argv) if not word.startswith("--")]
    if positions and rng.random() < 0.15:
        argv[rng.choice(positions)] = rng.choice(PATHS)
    if rng.random() < 0.04:
        argv.insert(0, rng.choice([*PATHS, *TEXTS, "--", "-h", "--version"]))
    return Case(number, script, argv, rng.choice(STDINS), rng.choice(STDOUTS))


# --- running a case


class TimeLimit(BaseException):
    """Raised in a case that has used its time."""


def raise_time_limit(*args: object) -> None:
    raise TimeLimit


def no_network(*args: object, **kwargs: object) -> Any:
    raise OSError("no network in this test")


def run_child(case: Case, base: Path, folder: Path, seed: int) -> None:
    """Prepare the folder and run the case. Ends the process."""
    if os.getuid() == 0:
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
    socket.socket.connect = socket.getaddrinfo = no_network  # type: ignore[assignment]
    subprocess.run = subprocess.Popen = no_network  # type: ignore[assignment, misc]
    redirect(case, folder)
    set_limits()
    sys.argv = [case.script, *case.argv]
    status: Any = 1
    try:
        config.run(importlib.import_module(case.script).main)
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        traceback.print_exc()
    try:  # as Python does at exit
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)


def set_limits() -> None:
    """Limit the memory, files and time of this process."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 28,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS + 5,) * 2)  # if stuck outside of Python
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, raise_time_limit)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.alarm(WALL_SECONDS)


def redirect(case: Case, folder: Path) -> None:
    """Set the standard input, output and error of this process."""
    (folder / "stdin").write_bytes(case.stdin or b"")
    flags = os.O_WRONLY | os.O_CREAT
    out = os.open("/dev/full" if case.stdout == "/dev/full" else folder / "stdout", flags)
    if case.stdout == "closed pipe":
        read_end, out = os.pipe()
        os.close(read_end)
    for source, target in (
        (os.open(folder / "stdin", os.O_RDONLY), 0),
        (out, 1),
        (os.open(folder / "stderr", flags), 2),
    ):
        os.dup2(source, target)
    encoding = "ascii" if case.stdout == "ASCII" else "utf-8"
    sys.stdin = None if case.stdin is None else os.fdopen(0, encoding="utf-8")  # type: ignore
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
    pid = os.fork()
    if pid == 0:
        try:
            run_child(case, base, folder, seed)
        except BaseException:
            traceback.print_exc()
        os._exit(99)
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
    lines = [line for line in trace.splitlines() if not line.startswith(" ")] or [""]
    frames = re.findall(r'File "(.+?)", line (\d+), in (\S+)', trace)
    ours = [f for f in frames if f[0].startswith(str(ROOT)) and f"{ROOT}/tests" not in f[0]]
    ours = [f for f in ours if not f[0].endswith("/config.py") or f[2] != "run"]
    place = (
        f"at {Path(ours[-1][0]).relative_to(ROOT)}:{ours[-1][1]} ({ours[-1][2]})" if ours else ""
    )
    return lines[0].partition(":")[0] or "exception", lines[0], place or "at exit"


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


# --- fixtures


def make_fixtures(base: Path) -> None:
    """The inputs of the cases. Runs scripts of every kind, so that all modules are imported."""
    base.mkdir()
    os.chdir(base)
    for name in ("data/texts", "photos"):
        Path(name).mkdir(parents=True)
    text = "\n".join(" ".join(WORDS[i * j % 13] for j in range(1, 9)) for i in range(60)) + "\n"
    pairs = [{"prompt": f"{w} {i}", "chosen": w, "rejected": "-"} for i, w in enumerate(WORDS)]
    files = {
        "input.txt": text,
        "texts/a.txt": text[:900],
        "texts/b.txt": text[900:],
        "one.txt": "t",
        "empty.txt": "",
        "qa.json": json.dumps([{"question": f"who {w}?", "answer": w} for w in WORDS]),
        "docs.jsonl": "\n".join(json.dumps({"text": text[i : i + 60]}) for i in range(0, 1600, 40)),
        "pairs.jsonl": "\n".join(map(json.dumps, pairs)),
    }
    for name, content in files.items():
        Path("data", name).write_text(content)
    Path("photos/cat.jpg").write_bytes(b"\xff\xd8\xff\xe0 a cat")
    for script, *argv in map(str.split, FIXTURES):
        with contextlib.redirect_stdout(io.StringIO()):
            status = importlib.import_module(script).main(argv)
        assert status == 0, (script, argv)
    Path("attention.png").unlink()
    with contextlib.suppress(UserError):  # imports the package, which needs no network to fail
        importlib.import_module("export").main(["--from=no/such", "x.pt"])
    codecs.lookup("ascii")
    for path in Path().rglob("*"):  # also readable for another user
        path.chmod(0o755 if path.is_dir() else 0o644)


# --- main


@contextlib.contextmanager
def temporary_folder(keep: bool) -> Iterator[Path]:
    """A folder that other users can read."""
    top = Path(tempfile.mkdtemp(prefix="fuzz"))
    top.chmod(0o755)
    try:
        yield top
    finally:
        os.chdir(ROOT)
        if not keep:
            shutil.rmtree(top, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns 1 if a case has failed."""
    settings = parse_args(FuzzConfig, argv, __doc__ or "")
    torch.set_num_threads(1)
    failures: dict[tuple[str, str], list[str]] = {}
    counts: Counter[str] = Counter()
    with temporary_folder(keep=settings.case >= 0) as top:
        os.environ |= {"HF_HUB_OFFLINE": "1", "MPLCONFIGDIR": str(top), "HOME": str(top)}
        make_fixtures(top / "base")
        flags = {script: settings_of(script) for script in SCRIPTS}
        gc.freeze()  # a collection in a child would copy all pages
        started = time.monotonic()
        for number in range(settings.n) if settings.case < 0 else [settings.case]:
            case, folder = make_case(settings, number, flags, top / "base"), top / f"case{number}"
            status = run_case(case, top / "base", folder, settings.seed)
            problem = judge(case, folder, status)
            counts[case.script] += 1
            counts[f"damaged, and status {status}" if case.damaged else f"status {status}"] += 1
            how = f"  [{case.damaged}: {(folder / 'damage').read_text()}]" if case.damaged else ""
            text = f"case {number} of seed {settings.seed}: {case}{how}"
            if problem:
                text += f"\n        {ascii(problem[1])[1:-1][:300]}"
                failures.setdefault((case.script, problem[0]), []).append(text)
                print(f"{case.script}: {problem[0]}\n    {text}", flush=True)
            if settings.case >= 0:
                print(f"{text}\nfolder: {folder}\n{(folder / 'stderr').read_text()}")
            else:
                shutil.rmtree(folder)
            if settings.minutes and time.monotonic() - started > 60 * settings.minutes:
                break
    print("\nfailures by kind, each with its first case:")
    for (script, kind), texts in sorted(failures.items(), key=lambda item: -len(item[1])):
        print(f"{len(texts):5} {script}: {kind}\n      {texts[0]}")
    print("cases:", ", ".join(f"{name}: {n}" for name, n in sorted(counts.items())))
    n_failed, n_cases = sum(map(len, failures.values())), sum(counts[name] for name in SCRIPTS)
    print(f"{n_failed} of {n_cases} cases failed, {time.monotonic() - started:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    config.run(main)
