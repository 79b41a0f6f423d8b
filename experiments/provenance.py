"""Where the numbers of a study come from: commit, corpus, precision, machine, versions."""

import functools
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent


def run_record(corpus: dict[str, Any], precision: str, device: torch.device) -> dict[str, Any]:
    """What a run depends on besides its flags. corpus: the `info` of a Corpus."""
    return {
        "commit": git_commit(),
        "corpus": {name: corpus.get(name) for name in ("name", "bytes", "sha256")},
        "precision": precision,
        "machine": device_name(device),
        "versions": f"Python {platform.python_version()}, PyTorch {torch.__version__}",
    }


@functools.cache
def git_commit() -> str:
    """The commit of the code at the first call, and whether its Python files were changed since."""
    try:
        head = git("rev-parse", "HEAD")
        changed = git("diff", "--name-only", "HEAD", "--", "*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + (" with changes" if changed else "")


def git(*words: str) -> str:
    """The output of a git command in the folder of the project."""
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def device_name(device: torch.device) -> str:
    """The hardware that the numbers were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    n = torch.get_num_threads()
    return f"{device.type}, {n} thread{'s' * (n > 1)}, {cpu_model()}"


@functools.cache
def cpu_model() -> str:
    """The name of the processor."""
    info = Path("/proc/cpuinfo")  # on Linux
    text = info.read_text() if info.exists() else ""
    found = re.search(r"^model name\s*: (.*)", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def describe(records: list[dict[str, Any]]) -> str:
    """The values that occur in these records, in one sentence."""
    found: dict[str, list[str]] = {}
    for record in records:
        corpus = record.get("corpus")
        words = record | {
            "commit": f"commit {record.get('commit', 'unknown')}",
            "corpus": corpus and f"{corpus['name']} (sha256 {corpus['sha256'][:12]})",
        }
        for name, value in words.items():
            if value and value not in found.setdefault(name, []):
                found[name].append(value)
    return "; ".join(" and ".join(values) for values in found.values())
