"""One web page that runs a model in the browser, without a server and without a network.

The file contains the weights, the tokenizer, the loss curve, and the program: exporting/page/ has a
second implementation of model.py, tokenizer.py and generate.py, in JavaScript. Everything is ASCII,
so the page is the same in every encoding.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import utils
from exporting.chat_template import asks
from exporting.folders import check_file
from exporting.hf_tokenizer import KNOWN_PATTERNS, library_pattern, token_ids
from exporting.huggingface import shown_settings, source_name
from model import GPT
from sampling.text import checkpoint_line
from system.files import atomic_write, locked_file
from system.settings import UserError
from tokenizer import BPETokenizer, Tokenizer
from viz.curve import is_number

PAGE = Path(__file__).parent / "page"
ENGINE = ("model.js", "tokenizer.js", "random.js", "generate.js", "inside.js", "worker.js")
INTERFACE = ("page.js", "view.js")
GENERATOR = b'<meta name="generator" content="TinyLLM export.py">'
MAX_INT8 = 127
# The settings that model.js implements.
IMPLEMENTED = "vocab_size block_size n_layer n_head n_embd n_kv_head head_size n_inner norm mlp pos"
IMPLEMENTED += " post_norm token_shift qk_norm tie_weights bias norm_eps rope_theta"


def export_page(checkpoint: Path, target: Path, precision: str, overwrite: bool = False) -> None:
    """Write a checkpoint as a web page, with its weights in float16 or int8 (`auto`). With
    `overwrite`, a page is replaced."""
    check_file(target, GENERATOR, overwrite)
    model, tokenizer, state = utils.load_checkpoint(checkpoint)
    data = page_data(model, tokenizer, state)
    precision = "int8" if precision == "auto" else precision
    if precision == "float16" and not all(p.half().isfinite().all() for p in model.parameters()):
        raise UserError("the weights are too large for float16: use --precision int8")
    data["summary"] += f"; weights in {precision}"
    with locked_file(target, "an export"):
        check_file(target, GENERATOR, overwrite)  # another process may have written it
        with atomic_write(target) as file:
            for text in page_parts(model, data, precision):
                file.write(text.encode("ascii"))
    size, n_params = target.stat().st_size, model.num_params()
    print(f"{target}: {size / 1e6:.2f} MB, {size / n_params:.2f} bytes per parameter")


# --- weights


def stored(weight: Tensor, precision: str) -> tuple[str, bytes]:
    """The type and the bytes of a parameter in the page. With int8, each row of a matrix has a
    float32 scale, and vectors are float32. This changes the loss of the laptop preset on
    TinyShakespeare by 0.0002 or less."""
    weight = weight.detach()
    if precision == "float16":
        return "float16", weight.numpy().astype("<f2").tobytes()
    if weight.dim() == 1:
        return "float32", weight.numpy().astype("<f4").tobytes()
    scale = weight.abs().amax(dim=1, keepdim=True) / MAX_INT8  # (n_out, 1)
    quotient = weight / scale.clamp(min=torch.finfo(torch.float32).tiny)  # (n_out, n_in)
    integers = quotient.round().clamp(-MAX_INT8, MAX_INT8)
    content = scale.numpy().astype("<f4").tobytes() + integers.numpy().astype("i1").tobytes()
    return "int8", content


# --- the page


def page_data(model: GPT, tokenizer: Tokenizer, state: dict[str, Any]) -> dict[str, Any]:
    """What the page knows besides the weights. Raises UserError if its tokenizer cannot be
    translated, or if model.js does not have a component of the model."""
    if unknown := model.config.beyond(IMPLEMENTED.split()):
        raise UserError(f"the program of a web page does not have {', '.join(unknown)}")
    pattern = r"[\s\S]"  # one character
    if isinstance(tokenizer, BPETokenizer):
        pattern = to_javascript(tokenizer.pattern)
    ranks = {token.decode("latin-1"): i for token, i in token_ids(tokenizer).items()}
    config, name = model.config, source_name(state)
    log = [{k: v for k, v in record.items() if is_number(v)} for record in state["log"]]
    sizes = f"{config.n_layer} layers, {config.n_embd} channels"
    return {
        "name": name,
        "summary": f"{model.num_params():,} parameters: {sizes}; {checkpoint_line(name, state)}",
        "config": asdict(config),
        "tokenizer": {"pattern": pattern, "ranks": ranks, "specials": tokenizer.specials},
        "qa": asks(tokenizer, state),
        "log": [{key: record.get(key) for key in ("step", "train", "val")} for record in log],
        "settings": list(shown_settings(model, state).items()),
    }


def to_javascript(pattern: str) -> str:
    """The JavaScript pattern (flag u) with the same matches as a split pattern. Raises UserError if
    the pattern is not one of KNOWN_PATTERNS.

    JavaScript's \\s matches other characters, older browsers have no (?i:...), and there are no
    possessive quantifiers, such as \\s++, which change no match of these patterns.
    """
    pattern = library_pattern(pattern)
    if pattern not in KNOWN_PATTERNS:
        raise UserError(f"a web page cannot split text as this tokenizer does: by {pattern:.60}")
    pattern = re.sub(r"([+*?])\+", r"\1", pattern)
    pattern = pattern.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")
    contractions = "(?:[sdmtSDMT\u017f]|[lL][lL]|[vV][eE]|[rR][eE])"  # U+017F is another s
    pattern = pattern.replace("(?i:[sdmt]|ll|ve|re)", contractions)
    return pattern.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", f"(?:'{contractions})")


def page_parts(model: GPT, data: dict[str, Any], precision: str) -> Iterator[str]:
    """The text of the page, in parts. Each placeholder of page.html is replaced once, so that no
    data is taken for one."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in PAGE.glob("[!.]*")}
    style, script = sources["page.css"], "".join(sources[name] for name in INTERFACE)
    title = html.escape(f"{data['name']}: a language model")
    content = json.dumps(data, allow_nan=False)  # in which < occurs only in strings
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in (f"\n{script}", style)
    ]
    # Only this script, this style and a worker that the script makes can run; nothing is fetched.
    policy = f"default-src 'none'; script-src {hashes[0]}; style-src {hashes[1]}; "
    policy += "worker-src blob:; base-uri 'none'; form-action 'none'"
    parts = {
        "POLICY": policy,
        "TITLE": title.encode("ascii", "xmlcharrefreplace").decode(),
        "STYLE": style,
        "DATA": content.replace("<", "\\u003c"),  # so that no text can end the element
        "ENGINE": "".join(
            f'<script type="text/plain" class="engine" data-file="{name}">\n'
            f"{sources[name]}</script>\n"
            for name in ENGINE
        ),
        "SCRIPT": script,
    }
    before, after = sources["page.html"].split("{{WEIGHTS}}")
    yield re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], before)
    for name, parameter in model.named_parameters():  # tied weights are one parameter
        kind, raw = stored(parameter, precision)
        shape = ",".join(map(str, parameter.shape))
        yield f'<script type="text/plain" class="weight" data-name="{name}" data-kind="{kind}" '
        yield f'data-shape="{shape}">{base64.b64encode(raw).decode()}</script>\n'
    yield after
