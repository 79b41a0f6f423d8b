"""Convert checkpoints to and from Hugging Face's format, to a web page, or to a file for llama.cpp.

    python export.py checkpoints/best.pt out/              to a folder that `transformers` loads
    python export.py --from gpt2 checkpoints/gpt2.pt       import a GPT-2, Llama or Qwen3 model from
    python export.py --from folder/ checkpoints/mine.pt    the hub or a folder as a checkpoint
    python export.py checkpoints/chat/adapter.pt out/      a LoRA adapter as a folder for `peft`
    python export.py checkpoints/best.pt model.html        one file: open it in a browser and sample
    python export.py checkpoints/best.pt model.gguf        a file for llama.cpp, Ollama, LM Studio

The exported folder loads with AutoModelForCausalLM and AutoTokenizer, without code of this project.
If no standard architecture has the model's components, the folder also contains the model's code,
and loads with trust_remote_code=True.
--overwrite replaces an earlier export, or with --from a checkpoint, and nothing else, once the new
one is complete. To upload a folder to the hub: `hf upload user/name out/`.
Folders need `pip install safetensors tokenizers`, the hub also huggingface_hub, .gguf files `pip
install gguf`; a page needs nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from system.start import run

from exporting.folders import check_target, import_optional
from exporting.gguf_file import export_gguf
from exporting.huggingface import export_hf, import_hf
from exporting.peft import export_adapter
from exporting.web_page import export_page
from finetuning import lora
from system.command_line import parse_args
from system.settings import setting


@dataclass
class ExportConfig:
    paths: tuple[str, ...] = setting(
        (),
        "a checkpoint, and a folder, NAME.html or NAME.gguf; with --from only a checkpoint",
        positional=True,
    )
    source: str = setting(
        "", "import this hub name or folder in Hugging Face's format", alias="from"
    )
    precision: str = setting(
        "auto", "weights of a .html or .gguf file; auto: int8 in .html, float16 in .gguf",
        choices=("auto", "float32", "float16", "int8", "int4"),
    )  # fmt: skip
    overwrite: bool = setting(False, "replace an earlier export, or a checkpoint")

    @property
    def kind(self) -> str:
        """html or gguf, if such a file is written."""
        suffix = Path(self.paths[-1]).suffix.lower() if self.paths and not self.source else ""
        return suffix[1:] if suffix in (".html", ".gguf") else ""

    def problems(self) -> list[str]:
        found = []
        if len(self.paths) != (1 if self.source else 2):
            found.append("give a checkpoint and a folder, or --from NAME and a checkpoint")
        if self.source and self.paths[-1:] and self.paths[-1].lower().endswith((".html", ".gguf")):
            found.append("--from writes a checkpoint: name it NAME.pt")
        if self.precision != "auto" and not self.kind:
            found.append("--precision is for .html and .gguf files: leave it out")
        if self.precision in ("float32", "int4") and self.kind == "html":
            found.append("a web page has weights in float16 or int8")
        return found


def main(argv: list[str] | None = None) -> int:
    config = parse_args(ExportConfig, argv, __doc__)
    target = Path(config.paths[-1])
    if config.source:
        import_hf(config.source, target, config.overwrite)
        return 0
    checkpoint = Path(config.paths[0])
    if config.kind:
        export_file = {"html": export_page, "gguf": export_gguf}[config.kind]
        export_file(checkpoint, target, config.precision, config.overwrite)
        if config.kind == "html":
            print("open it in a browser: it needs no server and no network")
        return 0
    check_target(target, config.overwrite)
    import_optional("safetensors")
    if lora.is_adapter(checkpoint):
        export_adapter(checkpoint, target, config.overwrite)
        call = f"peft.PeftModel.from_pretrained(model, {str(target)!r})"
    else:
        arguments = export_hf(checkpoint, target, config.overwrite)
        call = f"transformers.AutoModelForCausalLM.from_pretrained({arguments})"
    print(f"{target}/: load it with {call}")
    return 0


if __name__ == "__main__":
    run(main)
