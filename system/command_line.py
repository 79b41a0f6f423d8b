"""The command line of every script, made from dataclasses of settings: flags, checks, --help."""

import difflib
import sys
import textwrap
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Any

from config import VERSION, UserError, all_problems, from_dict, kind_of, raise_problems


def parse_args(
    classes: Any,
    argv: list[str] | None,
    doc: str,
    resolve: Callable[[dict[str, Any]], tuple[Any, ...]] | None = None,
    check: Callable[..., list[str]] = lambda *results: [],
) -> Any:
    """Read and validate a command line (sys.argv if argv is None).

    classes: a dataclass of settings, or a tuple of several; returns an instance, or a tuple.
    resolve(flags) creates them if that takes more than defaults, such as presets; what it returns
    after them is returned too. check(...) finds further problems, for example about devices.
    Raises UserError with all problems in one line. --help and --version print and exit.
    """
    words = sys.argv[1:] if argv is None else argv
    types = classes if isinstance(classes, tuple) else (classes,)
    known = {f.name: f for cls in types for f in fields(cls) if f.metadata.get("flag", True)}
    resolve = resolve or (lambda flags: tuple(from_dict(cls, flags) for cls in types))
    if {"-h", "--help", "--version"} & set(words):
        configs = resolve({})[: len(types)]
        defaults = {f.name: getattr(c, f.name) for c in configs for f in fields(c)}
        version = f"TinyLLM {VERSION}"
        print(version if "--version" in words else help_text(known, defaults, doc))
        sys.exit()
    flags, problems = read_flags(words, known)
    try:
        results = resolve(flags)
    except UserError as error:
        raise UserError("; ".join([*problems, str(error)])) from None
    for config in results[: len(types)]:
        problems += all_problems(config)
    raise_problems(problems + check(*results))
    return results if isinstance(classes, tuple) else results[0]


def read_flags(words: list[str], known: dict[str, Field]) -> tuple[dict[str, Any], list[str]]:
    """The values given on a command line, by field name, and its problems. `--n-embd 8`,
    `--n_embd 8` and `--n_embd=8` are the same. (argparse stops at the first problem, and takes
    values such as -1e-3 for flags.)"""
    flags: dict[str, Any] = {}
    problems = [f"invalid UTF-8: {w!r}" for w in words if w != w.encode(errors="replace").decode()]
    spellings = {name: f for f in known.values() for name in flag_names(f)}
    positionals = [f for f in known.values() if f.metadata.get("positional")]
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        f = spellings.get(name)
        if not word.startswith("-"):
            if not positionals:
                problems.append(f"unexpected argument {word!r}")
            elif kind_of(positionals[0]) is tuple:
                flags[positionals[0].name] = (*flags.get(positionals[0].name, ()), word)
            else:
                flags[positionals.pop(0).name] = word
        elif f is None:
            near = difflib.get_close_matches(name, spellings, n=1, cutoff=0.7)
            hint = f": did you mean --{near[0]}?" if near else ""
            problems.append(f"unknown flag {word.partition('=')[0]}{hint}")
            if not equals and rest and not rest[0].startswith("--"):
                rest.pop(0)  # its value
        elif kind_of(f) is bool:
            flags[f.name] = not name.startswith("no_")
            if equals:
                problems.append(f"--{name} takes no value: write --{f.name} or --no-{f.name}")
        elif not equals and (not rest or rest[0].startswith("--")):
            problems.append(f"--{name} needs a value (write --{name}=VALUE if it begins with --)")
        else:
            try:
                flags[f.name] = convert(f, text if equals else rest.pop(0))
            except ValueError as error:
                problems.append(str(error))
    return flags, problems


def flag_names(f: Field) -> list[str]:
    """The names of a field's flag, without the hyphens."""
    if kind_of(f) is tuple:
        return []
    names = [f.name, f.metadata.get("alias"), f"no_{f.name}" if kind_of(f) is bool else None]
    return [name for name in names if name]


def convert(f: Field, text: str) -> Any:
    """The text of a flag as a value of the field's type. Raises ValueError if it is not one."""
    words = {int: "a whole number", float: "a number", str: "text"}[kind_of(f)]
    try:
        return kind_of(f)(text)
    except ValueError:
        raise ValueError(f"--{f.name} must be {words}, not {text!r}") from None


def help_text(known: dict[str, Field], defaults: dict[str, Any], doc: str) -> str:
    """The text of --help: every flag with its choices and its default on this machine."""
    names = [f"[{f.name.upper()}]" for f in known.values() if f.metadata.get("positional")]
    lines = [doc.strip(), "", f"arguments: {' '.join([*names, '[--flag value ...]'])}"]
    lines += ["", "  --help, --version"]
    for f in known.values():
        if "group" in f.metadata:
            lines += ["", f"{f.metadata['group']}:"]
        flags = ", ".join(f"--{name}".replace("--no_", "--no-") for name in flag_names(f))
        words = [f.metadata["help"], " | ".join(filter(None, f.metadata.get("choices", ())))]
        text = f"{flags or f.name.upper():28}  " + "; ".join(filter(None, words))
        value = defaults[f.name]
        if isinstance(value, bool):
            value = "on" if value else "off"
        if value not in (None, "", ()):
            text += f" [{value}]".replace("\n", "\\n")
        lines.append(textwrap.fill(text, 100, initial_indent="  ", subsequent_indent=" " * 32))
    return "\n".join(lines)
