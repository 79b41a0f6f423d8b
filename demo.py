"""Web demo of a model: sampling settings, streamed text, next-token probabilities, loss curve.

    python demo.py                        best.pt of the newest run
    python demo.py checkpoints/mine/best.pt --port 7861

Needs `pip install gradio`. The page is served to this machine only, unless --share is given.
"""

import contextlib
import html
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from system.start import run

import torch
import torch.nn.functional as F
from torch import Tensor

from config import DEVICE_HELP, SampleConfig
from generate import adjust_logits, generate, sampling_settings
from model import GPT
from sampling.text import (
    TextWriter,
    answers_questions,
    checkpoint_line,
    decode_prompt,
    encode_prompt,
    end_tokens,
    last_trained_on_text,
)
from system.command_line import parse_args
from system.device import device_problems, pick_device
from system.settings import UserError, all_problems, from_dict, raise_problems, setting
from tokenizer import Tokenizer
from utils import load_checkpoint, newest_checkpoint
from viz.curve import plot_runs
from viz.internals import token_labels
from viz.runs import read_run

if TYPE_CHECKING:  # optional, and slow to import
    import gradio as gr
    from matplotlib.figure import Figure

N_BARS = 12  # tokens in the bar chart
MAX_TOKENS = 1000  # per text: the page is sent again at each update
REFRESH_SECONDS = 0.05  # between updates of the page; a browser need not redraw more often
TEXT_STYLE = (
    "background:white; color:black; padding:12px; font:15px monospace; white-space:pre-wrap"
)
# The fields of SampleConfig that the page has inputs for, in the order of the inputs.
SETTINGS = ("prompt", "temperature", "top_k", "top_p", "seed", "max_new_tokens")


@dataclass
class DemoConfig:
    """Which model is served, and where."""

    checkpoint: str = setting(
        "", "default: best.pt, else latest.pt, of the newest run", positional=True
    )
    port: int = setting(7860, "port of the page's address", low=1, high=65535)
    share: bool = setting(False, "serve the page to everybody at a public Gradio address")
    device: str = setting("auto", DEVICE_HELP)


# --- what the page shows, as HTML


def probability_bars(tokenizer: Tokenizer, logits: Tensor, config: SampleConfig) -> str:
    """A bar chart of the most likely next tokens, for logits (1, V): the bar is the probability
    that the settings give the token, the line the model's own (temperature 1)."""
    model_probs, ids = adjust_logits(logits)  # (1, V) both, most likely first, as below
    sampling_probs, _ = adjust_logits(logits, **sampling_settings(config))  # (1, k)
    sampling_probs = F.pad(sampling_probs, (0, N_BARS))  # top-k may keep fewer tokens than N_BARS
    rows = ""
    for i, text in enumerate(token_labels(tokenizer, ids[0, :N_BARS])):
        line, bar = model_probs[0, i].item(), sampling_probs[0, i].item()
        rows += (
            f'<div style="display:flex; white-space:pre"><span style="width:7em; '
            f'overflow:hidden">{html.escape(text)}</span><span style="flex:1; position:relative">'
            f'<span class="bar" style="position:absolute; height:80%; background:#56B4E9; '
            f'width:{bar:.1%}"></span><span style="position:absolute; height:100%; '
            f'border-left:2px solid #D55E00; left:{line:.1%}"></span></span>'
            f'<span style="width:4em; text-align:right">{bar:.3f}</span></div>'
        )
    return f'<div style="padding-top:1em">{rows}</div>'  # below the label of the chart


def stream_html(
    model: GPT, tokenizer: Tokenizer, config: SampleConfig
) -> Iterator[tuple[str, str, Tensor]]:
    """Yields the text so far, the bars of the token after it, and the logits (1, V) of that token:
    for the prompt, at most every REFRESH_SECONDS while text is generated, and at the end. The tint
    of a token is its probability at temperature 1."""
    prompt = encode_prompt(tokenizer, config.prompt, config.qa).to(model.tok.weight.device)
    text = decode_prompt(tokenizer, prompt)
    page = f'<div style="{TEXT_STYLE}"><b>{html.escape(text)}</b>'
    if dropped := sorted(set(config.prompt) - set(text)):
        names = html.escape(" ".join(dropped))
        page = f"<i>without characters that the model does not know: {names}</i>{page}"
    writer = TextWriter(tokenizer)
    last_time, n_new = 0.0, config.max_new_tokens
    longer = replace(config, max_new_tokens=n_new + 1)  # for the logits after the text
    for i, step in enumerate(generate(model, prompt, longer, end_tokens(tokenizer))):
        if time.perf_counter() - last_time > REFRESH_SECONDS:
            yield f"{page}</div>", probability_bars(tokenizer, step.logits, config), step.logits
            last_time = time.perf_counter()
        if i < n_new:
            token = int(step.ids)
            probability = step.logits.float().softmax(dim=-1)[0, token].item()
            style = f"background:rgba(86, 180, 233, {probability:.3f})"
            shown = html.escape(writer.add(token))
            page += f'<span style="{style}" title="{probability:.3f}">{shown}</span>'
    page += f"{html.escape(writer.finish())}</div>"
    yield page, probability_bars(tokenizer, step.logits, config), step.logits


# --- the page


def sample_config(values: tuple[Any, ...], qa: bool) -> SampleConfig:
    """The settings for the values of the page's inputs, which a request can set to anything."""
    config = from_dict(SampleConfig, dict(zip(SETTINGS, values, strict=True)) | {"qa": qa})
    raise_problems(all_problems(config))
    if config.max_new_tokens > MAX_TOKENS:
        raise UserError(f"at most {MAX_TOKENS} tokens")
    return config


@contextlib.contextmanager
def errors_as_text() -> Iterator[None]:
    """A UserError is shown in the page, and not logged with a traceback."""
    import gradio as gr

    try:
        yield
    except UserError as error:
        raise gr.Error(html.escape(str(error))) from None


def build_page(checkpoint: Path, device: torch.device) -> "gr.Blocks":
    """The page of a checkpoint, not yet served."""
    import gradio as gr

    model, tokenizer, state = load_checkpoint(checkpoint, device)
    qa = answers_questions(tokenizer) and not last_trained_on_text(state)
    print(checkpoint_line(checkpoint, state), file=sys.stderr)

    def generate_text(*values: Any) -> Iterator[tuple[str, str, Tensor]]:
        if qa and not values[0].strip():
            raise gr.Error("Ask a question")
        with errors_as_text():
            yield from stream_html(model, tokenizer, sample_config(values, qa))

    def show_prompt(*values: Any) -> tuple[str, str, Tensor]:
        with errors_as_text():
            return next(stream_html(model, tokenizer, sample_config(values, qa)))

    def update_bars(logits: Tensor | None, *values: Any) -> str:
        with errors_as_text():
            config = sample_config(values, qa)
            return "" if logits is None else probability_bars(tokenizer, logits, config)

    def draw_curve() -> "Figure":
        log = checkpoint.with_name("log.jsonl")
        return plot_runs([read_run(log if log.exists() else checkpoint)])

    with gr.Blocks(title="TinyLLM", analytics_enabled=False) as page:
        size = f"{model.num_params() / 1e6:.2f} M parameters"
        corpus = html.escape(str(state["corpus"]["name"]))  # a checkpoint from a stranger
        gr.HTML(f"<b>{html.escape(str(checkpoint))}</b>: {size}, trained on {corpus}")
        example, label = ("Who are you?", "Question") if qa else ("ROMEO:", "Prompt")
        with gr.Tab("Text"), gr.Row():
            with gr.Column():
                inputs = [  # for SETTINGS
                    gr.Textbox(example, label=label, lines=2),
                    gr.Slider(0, 2, 0.8, step=0.05, label="Temperature"),
                    gr.Slider(0, model.config.vocab_size, 0, step=1, label="Top-k (0: all)"),
                    gr.Slider(0.05, 1, 1, step=0.05, label="Top-p"),
                    gr.Slider(0, 9999, 1337, step=1, label="Seed"),
                    gr.Slider(1, MAX_TOKENS, 300, step=1, label="Tokens"),
                ]
                with gr.Row():
                    start = gr.Button("Generate", variant="primary")
                    stop = gr.Button("Stop")
            with gr.Column():
                frame = {"show_label": True, "container": True, "padding": True}
                bars = gr.HTML(label="Next token (line: the model's own probability)", **frame)
                text = gr.HTML(label="Text (the bluer a token, the more probable)", **frame)
        with gr.Tab("Training") as training_tab:
            curve = gr.Plot(show_label=False)
        logits = gr.State()
        outputs = [text, bars, logits]
        quiet = {"show_progress": "hidden"}
        page.load(show_prompt, inputs, outputs, **quiet)
        prompt, temperature, top_k, top_p, *_ = inputs
        prompt.change(show_prompt, inputs, outputs, trigger_mode="always_last", **quiet)
        generation = start.click(generate_text, inputs, outputs, **quiet)
        stop.click(None, cancels=[generation])
        for slider in (temperature, top_k, top_p):
            slider.input(update_bars, [logits, *inputs], bars, trigger_mode="always_last", **quiet)
        training_tab.select(draw_curve, outputs=curve)
    return page


def main(argv: list[str] | None = None) -> int:
    config = parse_args(
        DemoConfig, argv, __doc__, check=lambda config: device_problems(config.device)
    )
    checkpoint = Path(config.checkpoint or newest_checkpoint(Path("checkpoints")))
    if find_spec("gradio") is None:
        raise UserError("the web demo needs Gradio: pip install gradio")
    page = build_page(checkpoint, pick_device(config.device))
    address = {"server_name": "127.0.0.1", "server_port": config.port, "share": config.share}
    try:
        page.launch(**address, footer_links=[], show_error=True)
    except OSError as error:
        raise UserError(f"port {config.port} is in use: choose another --port") from error
    return 0


if __name__ == "__main__":
    run(main)
