"""Output: text files that are never lost, their first lines, and tables."""

import shlex
from pathlib import Path
from typing import Any

from config import SampleConfig
from system.files import atomic_write
from system.settings import UserError, escape


def write_text(path: Path, text: str) -> None:
    """Write a text file. If that fails (a full disk, say), print the text and raise UserError."""
    try:
        with atomic_write(path) as file:
            file.write(text.encode())
    except UserError:
        print(text)
        raise


def format_table(rows: list[dict[str, str]]) -> str:
    """The rows as text, in aligned columns with a header."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = []
    for first, *others in lines:
        cells = [word.rjust(width) for word, width in zip(others, widths[1:], strict=True)]
        aligned.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(aligned)


def header(config: SampleConfig, state: dict[str, Any], command: str = "python generate.py") -> str:
    """The first lines of an output file: the model, and the command that reproduces the file."""
    for name, field in SampleConfig.__dataclass_fields__.items():
        value = getattr(config, name)
        if value == field.default or (name == "prompt" and config.prompt_file):
            continue
        if isinstance(value, bool):
            command += f" --{name}" if value else f" --no-{name}"
        else:
            text = escape(value) if field.metadata.get("escapes") else str(value)
            quoted = shlex.quote(text).replace("\n", "'$'\\n''")  # one line, also in a shell
            command += f" --{name}={quoted}"
    return f"# model trained on {state['corpus']['name']}, step {state['step']}\n# {command}\n\n"
