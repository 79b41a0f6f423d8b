"""The code of a model in Hugging Face's format that no standard architecture can represent.

The exported folder then contains model.py of this project, and modeling_tinyllm.py, which wraps it
for `transformers`. They are copies, except for the imports, and need nothing else of this project.
"""

from pathlib import Path

from system.settings import VERSION

ROOT = Path(__file__).parent.parent
# file in the folder: file here, and an import with what replaces it
FILES = {
    "modeling_tinyllm.py": ("exporting/modeling_tinyllm.py", "from model", "from .model"),
    "model.py": (
        "model.py",
        "from config import GPTConfig",
        "from transformers import PreTrainedConfig as GPTConfig",
    ),
}


def code_files() -> dict[str, str]:
    """The texts of the code files, by file name."""
    texts = {}
    for name, (source, ours, theirs) in FILES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        if text.count(f"\n{ours}") != 1:
            raise RuntimeError(f"{source} must have one line that begins with {ours!r}")
        header = f"# {source} of TinyLLM {VERSION} (MIT License); only an import differs.\n"
        texts[name] = header + text.replace(f"\n{ours}", f"\n{theirs}")
    return texts
