"""The cases of tests/fuzz.py: commands that work, their inputs, and random changes to them."""

import codecs
import contextlib
import importlib
import io
import json
import os
import random
import shlex
from collections.abc import Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from system.settings import UserError, kind_of

WORDS = "the quick brown fox jumps over a lazy dog and then it sleeps".split()
RUN = "--device=cpu --no-compile --precision=float32 --batch_size=2 --max_steps=2 --eval_every=1 "
RUN += "--eval_windows=2 --sample_tokens=3"
TINY = f"--n_layer=1 --n_head=2 --n_embd=16 --block_size=48 {RUN}"
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
    f"generate {QA} --prompt=Who? --num_samples=2 {SAMPLE}",
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
    f"train --teacher={CHAR},{CHAR} --tag=new {TINY}",
    f"finetune {CHAR} --objective=distill --teacher={CHAR} --tag=new {RUN}",
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
    "experiments.swaps --data=data/input.txt --results=out",
    "experiments.bench data --data=data/input.txt --steps=1",
)
SCRIPTS = tuple(dict.fromkeys(command.split()[0] for command in COMMANDS))
RARE = tuple(name for name in SCRIPTS if name == "demo" or name.startswith("experiments"))
# Flags with which a run may be as long as the user likes.
LONG = "max_steps|max_iters|max_new_tokens|max_tokens|sample_tokens|grad_accum|repeats|steps"
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


Flags = dict[str, list[Field]]  # the settings of each script


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
    with contextlib.ExitStack() as stack:
        for m in parsers:
            stack.enter_context(mock.patch.object(m, "parse_args", parse))
        stack.enter_context(contextlib.suppress(UserError))
        module.main([])
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
    name = rng.choice(
        [f.name, f.name, *f.metadata.get("alias", "").split(), f.name.replace("_", "-")]
    )
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
    """The files that a command reads: a list for each of its arguments; of a folder, its files."""
    flags = values_of(argv)
    names = [*flags.values(), *(word for word in argv if not word.startswith("--"))]
    names += [f"checkpoints/{flags['tag']}"] if "--resume" in argv else []
    names += [f"data/{flags['name']}"] if argv[0] == "--name=set" else []
    paths = [base / name for name in names if "/" in name or name.startswith("hf")]
    found = [[path] if path.is_file() else sorted(path.rglob("*.*")) for path in paths]
    return [[p for p in files if p.is_file() and p.suffix != ".png"] for files in found if files]


def make_case(
    seed: int, number: int, scripts: Sequence[str], damaged: float, flags: Flags, base: Path
) -> Case:
    """Case `number` of a seed: of one of the scripts, whose settings are `flags`, with inputs in
    the folder `base`. `damaged` is the share of cases with a damaged file."""
    rng = random.Random(f"{seed}:{number}")
    common = [name for name in scripts if name not in RARE]
    script = rng.choice(common if common and rng.random() > 0.05 else scripts)
    argv = rng.choice([c for c in COMMANDS if c.split()[0] == script]).split()[1:]
    inputs = input_files(argv, base)
    if inputs and rng.random() < damaged:
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
