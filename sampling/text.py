"""Text in and out of a model: prompts, questions, text from tokens as they come."""

import codecs
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import SampleConfig
from model import GPT
from system.settings import UserError, quote_path
from tokenizer import END_OF_TEXT, QA_SPECIALS, Tokenizer, prompt_text

START_TOKENS = ("<BOS>", END_OF_TEXT)  # the first that the tokenizer has starts a text


def end_tokens(tokenizer: Tokenizer) -> list[int]:
    return [i for text, i in tokenizer.specials.items() if text in (END_OF_TEXT, "<EOS>")]


def encode_prompt(tokenizer: Tokenizer, text: str, qa: bool = True) -> Tensor:
    """The ids of a prompt (T,). Characters that the tokenizer does not know are left out, with a
    warning. If the model answers questions, the text becomes one, as in training, unless `qa` is
    off: <BOS>Question: ...\\nAnswer:

    An empty prompt, or a blank question, becomes the token that starts a text: <BOS> for questions
    and answers, or <|endoftext|>; without special tokens, a newline or else the first token.
    """
    text = "" if text == "\n" and tokenizer.unknown(text) else text  # the default
    unk = tokenizer.specials.get("<UNK>")  # never trained: all characters of a corpus are known
    chars = sorted(set(text))
    unknown = [c for c in chars if tokenizer.unknown(c) or unk in tokenizer.encode(c).tolist()]
    if unknown:
        names = " ".join(map(repr, unknown))
        print(f"warning: unknown characters left out of the prompt: {names}", file=sys.stderr)
        text = "".join(c for c in text if c not in unknown)
    ask = qa and answers_questions(tokenizer)
    if ask:
        text = text.strip() and prompt_text(text)
    if not text and not tokenizer.specials and not tokenizer.unknown("\n"):
        text = "\n"
    ids = tokenizer.encode(text)  # (T,)
    if ask or not text:
        starts = [tokenizer.specials[t] for t in START_TOKENS if t in tokenizer.specials]
        ids = np.append([*starts, 0][0], ids)
    return torch.from_numpy(ids)


def decode_prompt(tokenizer: Tokenizer, prompt: Tensor) -> str:
    """The text of a prompt (T,), without the token that starts an empty one."""
    hidden = {tokenizer.specials.get(text) for text in START_TOKENS}
    return tokenizer.decode(i for i in prompt.tolist() if i not in hidden)


def model_prompt(model: GPT, tokenizer: Tokenizer, config: SampleConfig) -> Tensor:
    """The ids of the prompt (T,), on the model's device; a warning if it exceeds the window."""
    prompt = encode_prompt(tokenizer, config.prompt, config.qa)
    warn_if_cut("the prompt", len(prompt), model.config.block_size)
    return prompt.to(model.tok.weight.device)


class TextWriter:
    """Turns the tokens of one sample into text as they come: complete characters only, because a
    token may end inside one, and nothing after an end token or a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.ends = end_tokens(tokenizer)
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""  # may be the beginning of a stop string
        self.done = False

    def add(self, token: int) -> str:
        """The text that is complete after one more token."""
        if self.done or token < 0 or token in self.ends:
            return self.finish()
        self.held += self.utf8.decode(self.tokenizer.decode_bytes([token]))
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.done = True
            return self.held[: min(found)]
        prefixes = (stop[:n] for stop in self.stops for n in range(len(stop)))
        keep = max((len(p) for p in prefixes if self.held.endswith(p)), default=0)
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return text

    def finish(self) -> str:
        """The text still held back; later tokens are ignored."""
        text = "" if self.done else self.held + self.utf8.decode(b"", final=True)
        self.done, self.held = True, ""
        return text


def answers_questions(tokenizer: Tokenizer) -> bool:
    """Whether a model was trained on questions: then its tokenizer has their special tokens."""
    return set(QA_SPECIALS) <= tokenizer.specials.keys()


def last_objective(state: dict[str, Any]) -> str:
    """The objective that a checkpoint, or an adapter merged into it, was fine-tuned with last;
    empty if it was not fine-tuned, and for an adapter of an older version."""
    last = state.get("merged", state.get("finetune"))
    objective = last.get("objective") if isinstance(last, dict) else None
    return "" if objective in (None, "None") else str(objective)


def last_trained_on_text(state: dict[str, Any]) -> bool:
    """Whether a checkpoint was trained on text last, if that is known. If it was trained on
    questions before, its tokenizer still has their special tokens."""
    objective, corpus = last_objective(state), state["corpus"]
    asked = "questions" in corpus or not corpus["sha256"]  # an imported model may be asked
    return objective == "text" or not (asked or objective in ("chat", "qa"))


def check_question(config: SampleConfig, tokenizer: Tokenizer) -> None:
    """Raise UserError if the model answers questions and the prompt is blank, as the default is."""
    if config.qa and answers_questions(tokenizer) and not config.prompt.strip():
        raise UserError(
            f'{config.checkpoint} answers questions: ask one with --prompt "Who are you?", or chat '
            f"with it: python explore.py chat {quote_path(Path(config.checkpoint))}"
        )


def warn_if_cut(what: str, n_tokens: int, block_size: int) -> None:
    """Print a warning if a text is longer than the window, from which `generate` cuts it."""
    if n_tokens > block_size:
        seen = max(block_size // 2, 1)
        print(
            f"warning: {what} has {n_tokens} tokens, more than the window of {block_size}: the "
            f"model sees only the last {seen}",
            file=sys.stderr,
        )


def checkpoint_line(path: str | Path, state: dict[str, Any]) -> str:
    """A checkpoint in one line: path, step, and the validation loss if it was measured."""
    if not state["corpus"]["sha256"]:
        return f"{path}: an imported model"
    if not state["step"] and "finetune" not in state:
        return f"{path}: not trained yet (step 0), it writes noise; its run may have a latest.pt"
    losses = [record["val"] for record in state["log"] if record["step"] == state["step"]]
    loss = f", validation loss {losses[-1]:.4f}" if losses else ""
    return f"{path}: step {state['step']}{loss}"
