"""The command line of every script, made from dataclasses of settings: flags, checks, --help."""

import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from types import MappingProxyType
from typing import Any

from system.flag_names import flag_names, unknown_flag
from system.settings import VERSION, UserError, all_problems, from_dict, kind_of, raise_problems


def parse_args(
    classes: Any,
    argv: list[str] | None,
    doc: str,
    resolve: Callable[[dict[str, Any]], tuple[Any, ...]] | None = None,
    check: Callable[..., list[str]] = lambda *results: [],
    help_defaults: Mapping[str, str | None] = MappingProxyType({}),
) -> Any:
    """Read and validate a command line (sys.argv if argv is None).

    classes: a dataclass of settings, or a tuple of several; returns an instance, or a tuple.
    resolve(flags) creates them if that takes more than defaults, such as presets; what it returns
    after them is returned too. check(...) finds further problems, for example about devices.
    help_defaults: what --help shows instead of a default, by flag; None hides flags that this
    script reads only to say why they cannot be given.
    Raises UserError with all problems in one line. --help and --version print and exit.
    """
    words = sys.argv[1:] if argv is None else argv
    types = classes if isinstance(classes, tuple) else (classes,)
    known = {f.name: f for cls in types for f in fields(cls) if f.metadata.get("flag", True)}
    resolve = resolve or (lambda flags: tuple(from_dict(cls, flags) for cls in types))
    shown = {name: f for name, f in known.items() if help_defaults.get(name, "") is not None}
    flags, problems = read_flags(words, known, shown)
    if "--version" in words:
        print(f"TinyLLM {VERSION}")
        sys.exit()
    if {"-h", "--help"} & set(words):
        configs = resolve({n: flags[n] for n in ("preset", "arch") if n in flags and n in shown})
        print(help_text(known, configs[: len(types)], doc, help_defaults))
        sys.exit()
    try:
        results = resolve(flags)
    except UserError as error:
        raise UserError("; ".join([*problems, str(error)])) from None
    for config in results[: len(types)]:
        problems += all_problems(config)
    raise_problems(problems + check(*results))
    return results if isinstance(classes, tuple) else results[0]


BOOLS = {"true": True, "false": False}


def read_flags(
    words: list[str], known: dict[str, Field], suggested: dict[str, Field]
) -> tuple[dict[str, Any], list[str]]:
    """The values given on a command line, by field name, and its problems. `--n-embd 8`,
    `--n_embd 8` and `--n_embd=8` are the same, and so are `--no-compile`, `--compile=False` and
    `--compile False`. `suggested` are the fields that replace an unknown flag. (argparse stops at
    the first problem, and takes values such as -1e-3 for flags.)"""
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
            hint = unknown_flag(name, suggested.values())
            problems.append(f"unknown flag {word.partition('=')[0]}{hint}")
            if not equals and rest and not rest[0].startswith("--"):
                rest.pop(0)  # its value
        elif kind_of(f) is bool:
            if not equals and rest and rest[0].lower() in BOOLS:
                text = rest.pop(0)
            flags[f.name] = name.startswith("no_") != BOOLS.get(text.lower(), True)
            if equals and text.lower() not in BOOLS:
                problems.append(f"--{name} takes no value: write --{f.name} or --no-{f.name}")
        elif not equals and (not rest or rest[0].startswith("--")):
            problems.append(f"--{name} needs a value (write --{name}=VALUE if it begins with --)")
        else:
            try:
                value = convert(f, text if equals else rest.pop(0))
                flags[f.name] = unescape(value) if f.metadata.get("escapes") else value
            except ValueError as error:
                problems.append(str(error))
    return flags, problems


def convert(f: Field, text: str) -> Any:
    """The text of a flag as a value of the field's type. Raises ValueError if it is not one."""
    words = {int: "a whole number", float: "a number", str: "text"}[kind_of(f)]
    try:
        return kind_of(f)(text)
    except ValueError:
        raise ValueError(f"--{f.name} must be {words}, not {text!r}") from None


def escape(text: str) -> str:
    r"""Text as a flag with `escapes` reads it: \n for a newline, \\ for a backslash."""
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def unescape(text: str) -> str:
    r"""The text that `escape` wrote. Other characters after a backslash stay as they are.

    >>> unescape(r"a\nb"), unescape(r"a\\nb"), unescape(r"\alpha")
    ('a\nb', 'a\\nb', '\\alpha')
    """
    return re.sub(r"\\([n\\])", lambda found: "\n" if found[1] == "n" else "\\", text)


def help_text(
    known: dict[str, Field], configs: Sequence[Any], doc: str, help_defaults: Mapping[str, Any]
) -> str:
    """The text of --help: every flag with its choices and its default on this machine."""
    defaults = {f.name: getattr(c, f.name) for c in configs for f in fields(c)} | {**help_defaults}
    names = [f"[{f.name.upper()}]" for f in known.values() if f.metadata.get("positional")]
    lines = [doc.strip(), "", f"arguments: {' '.join([*names, '[--flag value ...]'])}"]
    if defaults.get("preset") and "n_layer" in known:  # not in bench.py, whose presets are models
        lines += [
            f"[brackets] contain the defaults of preset {defaults['preset']}; "
            "--preset NAME --help shows those of another"
        ]
    lines += ["", "  --help, --version"]
    header: list[str] = []  # of a section, until its first flag
    for f in known.values():
        if "group" in f.metadata:
            header = ["", f"{f.metadata['group']}:"]
        if (value := defaults[f.name]) is None and f.name in help_defaults:
            continue
        lines, header = lines + header, []
        names = [] if kind_of(f) is tuple else [f.name, *f.metadata.get("alias", "").split()[:1]]
        names += [f"no-{f.name}"] if kind_of(f) is bool and value is not False else []
        flags = ", ".join(f"--{name}" for name in names)
        words = [f.metadata["help"], " | ".join(filter(None, f.metadata.get("choices", ())))]
        text = f"{flags or f.name.upper():28}  " + "; ".join(filter(None, words))
        if isinstance(value, bool):
            value = "on" if value else "off"
        if value not in (None, "", ()):
            text += f" [{value}]".replace("\n", "\\n")
        lines.append(textwrap.fill(text, 100, initial_indent="  ", subsequent_indent=" " * 32))
    return "\n".join(lines)
