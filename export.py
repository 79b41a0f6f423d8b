"""Convert checkpoints to and from Hugging Face's format, to a file for llama.cpp, to a web page.

    python export.py checkpoints/best.pt out/              to a folder that `transformers` loads
    python export.py checkpoints/best.pt out/ --push user/name           and upload it to the hub
    python export.py --from gpt2 checkpoints/gpt2.pt       import a GPT-2, Llama or Qwen3 model from
    python export.py --from folder/ checkpoints/mine.pt    the hub or a folder as a checkpoint
    python export.py checkpoints/qa/adapter.pt out/        a LoRA adapter as a folder for `peft`
    python export.py checkpoints/best.pt model.gguf        a file for llama.cpp, Ollama, LM Studio
    python export.py checkpoints/best.pt model.html        a page that runs the model in a browser

The exported folder loads with AutoModelForCausalLM and AutoTokenizer, without code of this project.
--overwrite replaces an earlier export, and nothing else, once the new one is complete.
Folders need `pip install safetensors`, the hub `pip install huggingface_hub`, .gguf files `pip
install gguf`; a page needs nothing.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from config import setting
from exporting.folders import check_target
from exporting.gguf_file import KINDS, export_gguf
from exporting.huggingface import export_hf, import_hf, import_optional, upload
from exporting.peft import export_adapter
from exporting.web_page import export_page
from finetuning import lora
from system.command_line import parse_args
from system.errors import run


@dataclass
class ExportConfig:
    """What is converted, and where it is written."""

    paths: tuple[str, ...] = setting(
        (),
        "a checkpoint, and a folder, NAME.gguf or NAME.html; with --from only a checkpoint",
        positional=True,
    )
    source: str = setting(
        "", "import this hub name or folder in Hugging Face's format", alias="from"
    )
    push: str = setting("", "user/name: upload the exported folder to the hub")
    type: str = setting(
        "", "weights of a .gguf file; f16 (default): 2 bytes each; f32: exact, 4 bytes; q8_0: "
        "about 1 byte, less exact", choices=("", *KINDS)
    )  # fmt: skip
    precision: str = setting(
        "auto", "weights of a .html page; auto: int8 if the measured loss is nearly the same",
        choices=("auto", "float16", "int8"),
    )  # fmt: skip
    overwrite: bool = setting(False, "replace an earlier export, or a checkpoint")

    @property
    def suffix(self) -> str:
        """.gguf for a file for llama.cpp, .html for a web page, otherwise anything."""
        return Path(self.paths[-1]).suffix.lower() if self.paths else ""

    def problems(self) -> list[str]:
        """A wrong number of paths, or a wrong name on the hub."""
        found = []
        if len(self.paths) != (1 if self.source else 2):
            found.append("give a checkpoint and a folder, or --from NAME and a checkpoint")
        if self.push and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push):
            found.append(f"--push must be user/name, not {self.push!r}")
        if self.push and self.source:
            found.append("--push uploads an exported folder, and --from imports one")
        if self.suffix in (".gguf", ".html") and (self.source or self.push):
            found.append(
                f"--from writes a checkpoint and --push uploads a folder, not a {self.suffix} file"
            )
        if self.type and self.suffix != ".gguf":
            found.append("--type is for .gguf files: leave it out")
        if self.precision != "auto" and self.suffix != ".html":
            found.append("--precision is for .html pages: leave it out")
        return found


def main(argv: list[str] | None = None) -> int:
    config = parse_args(ExportConfig, argv, __doc__)
    target = Path(config.paths[-1])
    if config.source:
        import_hf(config.source, target, config.overwrite)
        return 0
    checkpoint = Path(config.paths[0])
    if config.suffix == ".gguf":
        modelfile = export_gguf(checkpoint, target, config.type or KINDS[0], config.overwrite)
        print(f"{target}: run it with llama.cpp or LM Studio")
        print(f"{modelfile}: ollama create NAME -f {modelfile}, then ollama run NAME")
        return 0
    if config.suffix == ".html":
        export_page(checkpoint, target, config.precision, config.overwrite)
        return 0
    check_target(target, config.overwrite)
    import_optional("safetensors")
    if config.push:
        import_optional("huggingface_hub")
    if lora.is_adapter(checkpoint):
        export_adapter(checkpoint, target, config.overwrite)
        call = f"peft.PeftModel.from_pretrained(model, {str(target)!r})"
    else:
        export_hf(checkpoint, target, config.overwrite)
        call = f"transformers.AutoModelForCausalLM.from_pretrained({str(target)!r})"
    print(f"{target}/: load it with {call}")
    if config.push:
        upload(target, config.push)
        print(f"uploaded: https://huggingface.co/{config.push}")
    return 0


if __name__ == "__main__":
    run(main)
