"""A page to play with a model, in the browser: sliders, text that appears as it is sampled, the
probabilities behind it.

python demo.py                        the newest run's best checkpoint
python demo.py checkpoints/mine/best.pt --port 7861

Needs `pip install gradio`. Only this machine can open the page, unless --share asks for more.
"""

import html
import importlib.util
import io
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from config import (
    SampleConfig,
    UserError,
    from_dict,
    limit_problems,
    parse_flags,
    raise_problems,
    run,
    setting,
)
from generate import (
    TextWriter,
    adjust_logits,
    encode_prompt,
    end_tokens,
    generate,
    knobs,
    prompt_start,
)
from model import GPT
from pictures import labels
from plots import draw_runs, read_run
from tokenizer import Tokenizer
from utils import device_problems, load_checkpoint, newest_checkpoint, pick_device

if TYPE_CHECKING:
    import gradio as gr

BARS = 12  # of the likeliest tokens
BOX = "background:white; color:black; padding:12px; font:15px monospace; white-space:pre-wrap"


@dataclass
class DemoConfig:
    """What is served, and where."""

    checkpoint: str = setting(
        "", "default: the newest run's best.pt, else latest.pt", positional=True
    )
    port: int = setting(7860, "of the page's address", low=1, high=65535)
    share: bool = setting(False, "serve it to everybody, by a public address of Gradio's")
    device: str = setting("auto", "cpu, cuda, cuda:1, mps; auto: the fastest there is")


def tinted(text: str, probability: float) -> str:
    """A token on a blue that is the deeper, the likelier it was; as HTML."""
    color = f"rgba(86, 180, 233, {probability:.3f})"
    return f'<span style="background:{color}" title="{probability:.3f}">{html.escape(text)}</span>'


def bars(tokenizer: Tokenizer, logits: Tensor, config: SampleConfig) -> str:
    """The likeliest next tokens, with the probabilities that they are drawn with as bars, and a
    line where the model itself has them; logits is (1, V). As HTML."""
    own, ids = adjust_logits(logits)
    drawn, _ = adjust_logits(logits, **knobs(config))  # in the same order, (1, k)
    drawn = F.pad(drawn, (0, BARS))
    rows = ""
    for i, text in enumerate(labels(tokenizer, ids[0, :BARS])):
        before, now = own[0, i].item(), drawn[0, i].item()
        rows += (
            f'<div style="display:flex; white-space:pre"><span style="width:7em; '
            f'overflow:hidden">{html.escape(text)}</span><span style="flex:1; position:relative">'
            f'<span class="bar" style="position:absolute; height:80%; background:#56B4E9; '
            f'width:{now:.1%}"></span><span style="position:absolute; height:100%; '
            f'border-left:2px solid #D55E00; left:{before:.1%}"></span></span>'
            f'<span style="width:4em; text-align:right">{now:.3f}</span></div>'
        )
    return f'<div style="padding-top:1em">{rows}</div>'  # below its label


def write(model: GPT, tokenizer: Tokenizer, config: SampleConfig) -> Iterator[tuple[str, Tensor]]:
    """The text as HTML, at first the prompt and then with each token that is sampled, and the
    logits (1, V) of what comes next; the tint is the model's own probability, at temperature 1."""
    prompt = encode_prompt(tokenizer, config.prompt).to(next(model.parameters()).device)
    text, writer = f"<b>{html.escape(prompt_start(tokenizer, prompt))}</b>", TextWriter(tokenizer)
    n_new = config.max_new_tokens
    config = replace(config, max_new_tokens=n_new + 1)  # of the last one only the logits are shown
    for i, step in enumerate(generate(model, prompt, config, end_tokens(tokenizer))):
        yield text, step.logits
        if i < n_new:
            token = step.ids.item()
            probability = step.logits.float().softmax(dim=-1)[0, token].item()
            text += tinted(writer.add(token), probability)
    yield text + html.escape(writer.finish()), step.logits


def curve(path: Path) -> str:
    """The losses of the run that a checkpoint belongs to, as SVG."""
    folder = path.parent
    try:
        figure = draw_runs([read_run(folder if (folder / "log.jsonl").exists() else path)])
    except UserError as error:  # a model that came from elsewhere has no log
        return html.escape(str(error))
    picture = io.StringIO()
    figure.savefig(picture, format="svg")
    return picture.getvalue().partition("?>")[2]


def build_page(path: Path, device: torch.device) -> "gr.Blocks":
    """The page of a checkpoint."""
    import gradio as gr

    model, tokenizer, state = load_checkpoint(path, device)
    names = ("prompt", "temperature", "top_k", "top_p", "seed", "max_new_tokens")

    def show(text: str, logits: Tensor, config: SampleConfig) -> tuple[str, str, Tensor]:
        return f'<div style="{BOX}">{text}</div>', bars(tokenizer, logits, config), logits

    def sample(*values: str | float) -> Iterator[tuple[str, str, Tensor]]:
        config = SampleConfig(**dict(zip(names, values, strict=True)))
        shown = 0.0
        for text, logits in write(model, tokenizer, config):
            if time.perf_counter() - shown > 0.05:  # a browser need not draw more often
                yield show(text, logits, config)
                shown = time.perf_counter()
        yield show(text, logits, config)

    def begin(*values: str | float) -> tuple[str, str, Tensor]:
        return next(sample(*values))

    def move(logits: Tensor, *values: str | float) -> str:
        return bars(tokenizer, logits, SampleConfig(**dict(zip(names, values, strict=True))))

    with gr.Blocks(title="TinyLLM", analytics_enabled=False) as page:
        size = f"{model.num_params() / 1e6:.2f} M parameters"
        gr.Markdown(f"**{path}**: {size}, trained on {state['corpus']['name']}")
        with gr.Tab("Text"), gr.Row():
            with gr.Column():
                prompt = gr.Textbox("ROMEO:", label="Prompt", lines=2)
                temperature = gr.Slider(0, 2, 0.8, step=0.05, label="Temperature")
                top_k = gr.Slider(0, model.config.vocab_size, 0, step=1, label="Top-k, 0: all")
                top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p")
                seed = gr.Slider(0, 9999, 1337, step=1, label="Seed")
                length = gr.Slider(1, 1000, 300, step=1, label="Tokens")
                with gr.Row():
                    go, stop = gr.Button("Write", variant="primary"), gr.Button("Stop")
            with gr.Column():
                look = {"show_label": True, "container": True, "padding": True}
                chart = gr.HTML(
                    label="The next token: as it is drawn; | as the model has it", **look
                )
                text = gr.HTML(label="The text: the bluer a token, the likelier it was", **look)
        with gr.Tab("Training") as training:
            picture = gr.HTML()
        logits = gr.State()
        settings = [prompt, temperature, top_k, top_p, seed, length]
        shown = [text, chart, logits]
        page.load(begin, settings, shown, show_progress="hidden")
        prompt.change(begin, settings, shown, show_progress="hidden", trigger_mode="always_last")
        writing = go.click(sample, settings, shown, show_progress="hidden")
        stop.click(None, cancels=[writing])
        for knob in (temperature, top_k, top_p):
            knob.input(
                move, [logits, *settings], chart, show_progress="hidden", trigger_mode="always_last"
            )
        training.select(lambda: curve(path), outputs=picture)
    return page


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    flags, problems = parse_flags(argv, __doc__, DemoConfig)
    config = from_dict(DemoConfig, flags)
    raise_problems(problems + limit_problems(config) + device_problems(config.device))
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs Gradio: pip install gradio")
    path = Path(config.checkpoint or newest_checkpoint(Path("checkpoints")))
    page = build_page(path, pick_device(config.device))
    try:
        page.launch(
            server_name="127.0.0.1", server_port=config.port, share=config.share, footer_links=[]
        )
    except OSError as error:
        raise UserError(f"port {config.port} is taken: give another --port") from error
    return 0


if __name__ == "__main__":
    run(main)
