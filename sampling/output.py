"""Writing generated text, so that it is never lost: to a file, or to any terminal."""

import io
import shlex
import sys
from pathlib import Path
from typing import Any

from config import SampleConfig, UserError
from system.files import atomic_write


def accept_any_text() -> None:
    """Print characters that the terminal cannot show as escapes such as \\u2423, and read invalid
    input as U+FFFD, where Python would stop and the generated text would be lost."""
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def write_text(path: Path, text: str) -> None:
    """Write a text file. If that fails, for example because the disk is full, the text is printed
    before the UserError."""
    try:
        with atomic_write(path) as file:
            file.write(text.encode())
    except UserError:
        print(text)
        raise


def header(config: SampleConfig, state: dict[str, Any]) -> str:
    """The first lines of an output file: the model, and the command that reproduces the file."""
    command = "python generate.py"
    for name, field in SampleConfig.__dataclass_fields__.items():
        value = getattr(config, name)
        if value == field.default or (name == "prompt" and config.prompt_file):
            continue
        if isinstance(value, bool):
            command += f" --{name}" if value else f" --no-{name}"
        else:
            quoted = shlex.quote(str(value)).replace("\n", "'$'\\n''")  # one line, also in a shell
            command += f" --{name}={quoted}"
    return f"# model trained on {state['corpus']['name']}, step {state['step']}\n# {command}\n\n"
