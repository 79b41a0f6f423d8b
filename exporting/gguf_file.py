"""Convert models to GGUF, the file format of llama.cpp, Ollama and LM Studio.

Our tensors keep their shapes; llama.cpp reads the same matrices as we do. What differs: names,
separate matrices for queries, keys and values (but for GPT-2), and the order in which `llama`
rotates channels. Each tokenizer becomes a byte-level BPE, the kind that llama.cpp reproduces.
"""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import utils
from config import GPTConfig, SampleConfig
from exporting import hf_tokenizer
from exporting.chat_template import CONTINUED, asks, jinja_template, ollama_template
from exporting.folders import check_file, import_optional
from exporting.hf_model import matching_arch, split_rows, tensor_names
from exporting.huggingface import origin, source_name, special_token_ids, with_end_token
from model import GPT
from system.files import atomic_write, locked_file
from system.settings import VERSION, UserError, quote_path
from tokenizer import GPT2_PATTERN, BPETokenizer, Tokenizer, to_printable

# precision -> llama.cpp's name
TYPES = {"float32": "F32", "float16": "F16", "int8": "Q8_0", "int4": "Q4_0"}
MAGIC = b"GGUF"  # the start of a GGUF file
FIRST_LINE = "# For Ollama: "  # the start of a Modelfile

# --- tensors

POSITIONS = "position_embd.weight"


def weights_to_gguf(state: dict[str, Tensor], config: GPTConfig, arch: str) -> dict[str, Tensor]:
    """Our weights by llama.cpp's names, which the gguf package finds by Hugging Face's."""
    gguf = import_optional("gguf")
    name_map = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.n_layer)
    hf_names = dict(tensor_names(config, arch))
    converted: dict[str, Tensor] = {}
    for ours in (name for name in state if name in hf_names):  # without a tied output layer
        parts = split_rows(state[ours], config, ours, hf_names[ours])
        for hf_name, part in parts.items():
            rotated = arch == "llama" and hf_name.endswith(("q_proj.weight", "k_proj.weight"))
            name = name_map.get_name(hf_name, try_suffixes=(".weight", ".bias"))
            converted[name] = interleave(part, config.head_size) if rotated else part
    return converted


def interleave(weight: Tensor, head_size: int) -> Tensor:
    """Reorder the rows of each head, D of them, from 0, D/2, ... to neighbors: for `llama`,
    llama.cpp rotates the channel pairs (2i, 2i + 1), and we rotate (i, i + D/2)."""
    heads = weight.view(-1, 2, head_size // 2, weight.size(1))  # (H, 2, D/2, C)
    return heads.transpose(1, 2).reshape(weight.shape)


def padded(positions: Tensor) -> Tensor:
    """Position embeddings with a multiple of 256 rows: those of the model, then their second half
    repeated, where generate.py continues a text that exceeds the window. llama.cpp rounds the
    length of its context up to 256, and aborts at a position without a row."""
    n, half = len(positions), len(positions) // 2
    rows = torch.arange(math.ceil(n / 256) * 256)
    rows[n:] = half + (rows[n:] - half) % (n - half)
    return positions[rows]


def quantized(name: str, tensor: Tensor, precision: str) -> tuple[np.ndarray, Any]:
    """The data of a tensor and gguf's name of its type. Vectors and position embeddings, which
    llama.cpp adds, remain float32; rows that are not made of blocks of 32 become float16 instead
    of Q8_0 or Q4_0, and the vectors of tokens Q8_0. Raises UserError if a number is too large."""
    gguf = import_optional("gguf")
    if tensor.dim() == 1 or name == POSITIONS:
        precision = "float32"
    elif precision in ("int8", "int4") and tensor.size(1) % 32:
        precision = "float16"
    elif precision == "int4" and name in ("token_embd.weight", "output.weight"):
        precision = "int8"
    dtype = gguf.GGMLQuantizationType[TYPES[precision]]
    array = tensor.float().numpy()
    with np.errstate(over="ignore"):
        data = gguf.quants.quantize(array, dtype)
        if not np.isfinite(gguf.quants.dequantize(data, dtype)).all():
            raise UserError(f"{name} is too large for {precision}: add --precision float32")
    return data, dtype


# --- tokenizers

# The pre-tokenizers of llama.cpp that split text as our patterns do, and whether they look for a
# piece among the tokens before they merge, as tiktoken does. tiktoken's own pattern for gpt2 splits
# in the same way as GPT-2's. Those of cl100k_base and o200k_base have no exact equivalent: the
# first differs in spaces after the last newline, the second in combining marks.
PRE_TOKENIZERS = {
    GPT2_PATTERN: "gpt-2",
    hf_tokenizer.TIKTOKEN_GPT2: "gpt-2",
    hf_tokenizer.DIGITS_PATTERN: "smollm",
    hf_tokenizer.LLAMA3_PATTERN: "llama-bpe",
    hf_tokenizer.QWEN_PATTERN: "qwen2",
}
NORMAL, CONTROL, UNUSED = 1, 3, 5  # types of tokens


def bpe_rules(tokenizer: BPETokenizer) -> tuple[str, list[str]]:
    """The pre-tokenizer's name, and the merges. Raises UserError if llama.cpp gives other ids."""
    pre = PRE_TOKENIZERS.get(tokenizer.pattern)
    merges = list(hf_tokenizer.merges_of(tokenizer))
    unmerged = len({left + right for left, right in merges}) < len(tokenizer.ranks) - 256
    if pre is None or (pre != "llama-bpe" and unmerged):
        raise UserError(
            "llama.cpp has no tokenizer that splits text as this one does: train a model with "
            "--tokenizer bpe, char or gpt2"
        )
    return pre, [" ".join(map(to_printable, pair)) for pair in merges]


def char_rules(chars: Iterable[bytes]) -> tuple[str, list[str]]:
    """The name of a pre-tokenizer, and the merges that make characters of their bytes, from left to
    right: of an e with acute accent, C3 + A9. The intermediate results of longer characters are not
    in the vocabulary: llama.cpp leaves out what is not, and so unknown characters, as generate.py
    does. Where text is split makes no difference, so this is a pre-tokenizer that does not remove
    spaces before punctuation from the output, as "gpt-2" does in some programs.
    """
    merges: dict[str, None] = {}  # a set in order
    for char in (*chars, "\xe9".encode()):  # the list must not be empty
        text = to_printable(char)
        merges |= {f"{text[:i]} {text[i]}": None for i in range(1, len(text))}
    return "qwen2", list(merges)


def add_tokenizer(writer: Any, tokenizer: Tokenizer, specials: dict[str, int], n_rows: int) -> None:
    """Write a tokenizer, with other special tokens. n_rows: number of embeddings."""
    own = hf_tokenizer.token_ids(tokenizer)
    if isinstance(tokenizer, BPETokenizer):
        pre, merges = bpe_rules(tokenizer)
    else:
        pre, merges = char_rules(own)
    tokens = {i: (to_printable(token), NORMAL) for token, i in own.items()}
    tokens |= {i: (text, CONTROL) for text, i in specials.items()}
    ids = special_token_ids(specials)
    bos, end, pad = (ids[f"{name}_token_id"] for name in ("bos", "eos", "pad"))
    if specials != tokenizer.specials:  # without an end token, llama.cpp would end at token 11
        writer.add_array("tokenizer.ggml.suppress_tokens", [end])
    texts, types = zip(
        *(tokens.get(i, (f"<|unused_{i}|>", UNUSED)) for i in range(n_rows)), strict=True
    )
    if len(set(texts)) < n_rows:
        raise UserError("a special token has the same text as another token")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    # Without fim_pad, llama.cpp would take <PAD> for a token that ends a text.
    for name, i in {"bos": bos, "eos": end, "fim_pad": end, "padding": pad}.items():
        if i is not None:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", i)
    for name in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        writer.add_bool(f"tokenizer.ggml.{name}", False)


# --- files


def export_gguf(checkpoint: Path, target: Path, precision: str, overwrite: bool = False) -> None:
    """Write the model of a checkpoint as a GGUF file, `auto`: in float16, and beside it a Modelfile
    for Ollama. Raises UserError if llama.cpp does not have the model's components or tokenizer, or
    if a file exists, unless it is an export and `overwrite` is set."""
    modelfile = target.with_suffix(".Modelfile")
    for path, mark in ((target, MAGIC), (modelfile, FIRST_LINE.encode())):
        check_file(path, mark, overwrite)
    import_optional("gguf")
    model, tokenizer, state = utils.load_checkpoint(checkpoint, torch.device("cpu"))
    asked = asks(tokenizer, state)
    writer = gguf_writer(model, tokenizer, "float16" if precision == "auto" else precision)
    writer.add_name(f"{source_name(state)} ({writer.arch})")
    writer.add_author(f"TinyLLM {VERSION}")
    writer.add_description(origin(state))
    writer.add_size_label(import_optional("gguf").size_label(model.num_params(), 0, 0, 0))
    writer.add_chat_template(jinja_template() if asked else CONTINUED)
    # The sampling of generate.py, where Ollama has other defaults
    parameters = {n: getattr(SampleConfig, n) for n in ("temperature", "top_k", "top_p", "min_p")}
    parameters["repeat_penalty"] = SampleConfig.repetition_penalty
    parameters["num_ctx"] = model.config.block_size
    template = ollama_template() if asked else "{{ .Prompt }}{{ .Response }}"
    lines = [
        f"{FIRST_LINE}ollama create NAME -f {modelfile.name}, then ollama run NAME",
        f"FROM ./{target.name}",
        f'TEMPLATE """{template}"""',
        *(f"PARAMETER {name} {value}" for name, value in parameters.items()),
    ]
    with locked_file(target, "an export"):
        check_file(target, MAGIC, overwrite)  # another process may have written it
        with atomic_write(target) as file, atomic_write(modelfile) as text_file:
            write_gguf(writer, Path(file.name))
            text_file.write("\n".join([*lines, ""]).encode())
    print(f"{target}: run it with llama.cpp or LM Studio")
    print(f"{modelfile}: ollama create NAME -f {quote_path(modelfile)}, then ollama run NAME")


def gguf_writer(model: GPT, tokenizer: Tokenizer, precision: str) -> Any:
    """A writer of the gguf package with the settings, tokenizer and weights of a model."""
    gguf = import_optional("gguf")
    arch = matching_arch(model.config)
    model, specials = with_end_token(model, tokenizer)
    config = model.config
    weights = weights_to_gguf(model.state_dict(), config, arch)
    if POSITIONS in weights:
        weights[POSITIONS] = padded(weights[POSITIONS])
        config = dataclasses.replace(config, block_size=len(weights[POSITIONS]))
    writer = gguf.GGUFWriter(None, arch)
    writer.add_context_length(config.block_size)  # the number of its positions
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    if arch == "gpt2":
        writer.add_layer_norm_eps(config.norm_eps)
    else:
        writer.add_key_length(config.head_size)
        writer.add_value_length(config.head_size)
        writer.add_rope_dimension_count(config.head_size)
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_rope_freq_base(config.rope_theta)
    add_tokenizer(writer, tokenizer, specials, config.vocab_size)
    mostly = "ALL" if precision == "float32" else "MOSTLY"
    writer.add_file_type(gguf.LlamaFileType[f"{mostly}_{TYPES[precision]}"])
    if precision in ("int8", "int4"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, tensor in weights.items():
        data, dtype = quantized(name, tensor, precision)
        writer.add_tensor(name, data, raw_dtype=dtype)
    return writer


def write_gguf(writer: Any, path: Path) -> None:
    """Write a file with what a writer contains."""
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
