"""Settings as dataclasses: a field is one line with its default, its help and its limits. Errors
that a user can correct.

system/command_line.py makes the flags and --help from these lines, all_problems the validation.
"""

import operator
import re
import typing
from collections.abc import Callable
from dataclasses import Field, field, fields
from pathlib import Path
from typing import Any

VERSION = "1.0"


class UserError(Exception):
    """A mistake that the user can correct. The text says what is wrong and what to do."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if there is none."""
    if isinstance(error, KeyError):  # its message is only the key
        return f"no {error}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def error_reason(error: Exception) -> str:
    """What a user can be told about an error; empty if it is a defect of the program."""
    if isinstance(error, UserError):
        return str(error).replace("\n", " ")
    if isinstance(error, OSError):
        return f"{error.filename or 'input or output'}: {error.strerror or error}"
    # in PyTorch's errors: on a GPU, on a CPU, and for sizes that no machine has
    words = ("out of memory", "DefaultCPUAllocator", "size calculation overflowed")
    if isinstance(error, MemoryError) or any(text in str(error) for text in words):
        return "not enough memory: use a smaller model, batch, window or number of samples"
    return ""


def quote_path(path: Path) -> str:
    """A path as a word of a command, in double quotes if needed, which all shells have.

    >>> quote_path(Path("runs/best.pt")), quote_path(Path("my runs/best.pt"))
    ('runs/best.pt', '"my runs/best.pt"')
    """
    return str(path) if re.fullmatch(r"[\w./\\:-]+", str(path)) else f'"{path}"'


def setting(default: Any, help: str, **limits: Any) -> Any:
    """A dataclass field with its help text and limits.

    Limits: low and high (inclusive), above and below (exclusive), choices. `group` starts a section
    of --help. `positional=True` also accepts the value without its flag. `alias` is another
    name of the flag, or several separated by spaces. `flag=False` leaves the field out of the
    command line. `escapes=True`: in its text, \\n is a newline and \\\\ a backslash. `fixed=True`:
    it cannot change when a run is resumed. `pretrain=True`: finetune.py does not have the flag.
    `computes=False`: what a model computes, once trained, does not depend on it. `of`: the settings
    from which its default is computed. A field of type tuple takes all positional arguments.
    """
    return field(default=default, metadata={"help": help, **limits})


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """An instance of a dataclass, from the values whose keys are its fields."""
    return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


FLOAT32 = (1.2e-38, 3.4e38)  # its smallest and largest positive numbers
LIMITS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "low": ("at least", operator.ge),
    "high": ("at most", operator.le),
    "above": ("above", operator.gt),
    "below": ("below", operator.lt),
    "choices": ("one of", lambda value, choices: value in choices),
}


def all_problems(config: Any) -> list[str]:
    """The fields of a wrong type; if there are none, those outside the limits of their `setting`
    line, and what config.problems() finds."""
    values = [(f, getattr(config, f.name)) for f in fields(config)]
    values = [(f, value) for f, value in values if value is not None or kind_of(f) is f.type]
    found = [f"{f.name} must be {p}, not {v!r}" for f, v in values if (p := type_problem(f, v))]
    if found:
        return found
    for f, value in values:
        for key in LIMITS.keys() & f.metadata.keys():
            words, holds = LIMITS[key]
            limit = f.metadata[key]
            if not holds(value, limit):
                limit = ", ".join(filter(None, limit)) if key == "choices" else limit
                found.append(f"{f.name} must be {words} {limit}, not {value!r}")
    return found + (config.problems() if hasattr(config, "problems") else [])


def type_problem(f: Field, value: Any) -> str:
    """What a field's value must be if it has another type, or is a number out of range."""
    kind = kind_of(f)
    if type(value) is not kind and (kind, type(value)) != (float, int):
        return f"of type {kind.__name__}"
    if kind is int and abs(value) >= 2**63:
        return "below 2**63"
    if kind is float and value and not FLOAT32[0] <= abs(value) <= FLOAT32[1]:
        return "a finite number that float32 can represent"
    return ""


def kind_of(f: Field) -> type:
    """The type of a field's values: int, float, str, bool or tuple; float for `float | None`."""
    is_tuple = typing.get_origin(f.type) is tuple
    return tuple if is_tuple else (typing.get_args(f.type) or (f.type,))[0]


def raise_problems(problems: list[str]) -> None:
    """Raise one UserError that lists all problems, if there are any."""
    if problems:
        raise UserError("; ".join(problems))


def escape(text: str) -> str:
    r"""Text as a flag with `escapes` reads it: \n for a newline, \\ for a backslash."""
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def unescape(text: str) -> str:
    r"""The text that `escape` wrote. Other characters after a backslash stay as they are.

    >>> unescape(r"a\nb"), unescape(r"a\\nb"), unescape(r"\alpha")
    ('a\nb', 'a\\nb', '\\alpha')
    """
    return re.sub(r"\\([n\\])", lambda found: "\n" if found[1] == "n" else "\\", text)
