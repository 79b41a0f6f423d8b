"""The command line of every script: an argparse parser made from dataclasses of settings."""

import argparse
import difflib
import sys
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from typing import Any, NoReturn

from system import settings
from system.settings import UserError, kind_of

# Names of other code bases with the same meaning, accepted but not shown by --help.
SYNONYMS = {
    "block_size": "context_len seq_len seq_length max_seq_len max_seq_length cutoff_len n_ctx",
    "n_layer": "num_layers num_hidden_layers",
    "n_head": "num_heads num_attention_heads",
    "n_embd": "n_embed embed_dim emb_dim hidden_size width",
    "out_dir": "output_dir save_dir",
    "max_steps": "steps num_steps train_steps iters num_iterations",
    "batch_size": "micro_batch_size device_batch_size per_device_train_batch_size",
    "grad_accum": "grad_accum_steps gradient_accumulation_steps grad_accumulation_steps",
    "lr_max": "lr max_lr",
    "warmup_steps": "warmup_iters lr_warmup_steps num_warmup_steps",
    "lr_min": "min_lr final_lr",
    "schedule": "lr_schedule lr_scheduler_type",
    "grad_clip": "clip_grad_norm max_norm max_grad_norm",
    "eval_every": "eval_interval eval_steps",
    "precision": "dtype",
}
# Names without an equal: what to use instead.
HINTS = {
    "epochs num_epochs max_epochs num_train_epochs": "--max_steps (--dry_run prints the epochs)",
    "eval_iters": "--eval_windows (it counts windows, batch_size times as many)",
    "init_from resume_from_checkpoint": "--resume (it continues the run of --tag)",
    "chat sweep show_probs": "python explore.py, with chat, sweep or probs",
    "demo": "python demo.py",
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if "--temperature: invalid" in message:
            message += "; explore.py sweep --settings temperature=0.5,1 compares several values"
        if "invalid boolean value" in message:
            message += "; give file names before the flags"
        raise UserError(message)


class Switch(argparse.Action):
    """A boolean flag, --NAME or --no-NAME, that may have a value."""

    def __call__(self, parser: Any, namespace: Any, value: Any, name: str | None = None) -> None:
        setattr(namespace, self.dest, value != str(name).startswith("--no"))


def boolean(text: str) -> bool:
    return ("false", "true").index(text.lower()) == 1  # ValueError for other texts


def learned(text: str) -> str:
    return "learned" if boolean(text) else "rope"


def parse_args(
    classes: Any,
    argv: list[str] | None,
    doc: str,
    resolve: Callable[[dict[str, Any]], tuple[Any, ...]] | None = None,
    check: Callable[..., list[str]] = lambda *results: [],
    help_defaults: Mapping[str, Any] | None = None,
) -> Any:
    """Read and validate a command line (sys.argv if argv is None). Raises UserError.

    classes: a dataclass of settings, or a tuple of several; returns an instance, or a tuple, with
    what resolve(flags) returns after them, if it creates them. check(...) finds further problems.
    help_defaults: the flags and defaults that --help shows, if not those that resolve returns.
    """
    types = classes if isinstance(classes, tuple) else (classes,)
    known = {f.name: f for cls in types for f in fields(cls) if f.metadata.get("flag", True)}
    known = {name: f for name, f in known.items() if not help_defaults or name in help_defaults}
    resolve = resolve or (lambda flags: tuple(settings.from_dict(cls, flags) for cls in types))
    words = sys.argv[1:] if argv is None else argv
    if bad := [word for word in words if word != word.encode(errors="replace").decode()]:
        raise UserError(f"invalid UTF-8: {bad[0]!r}")
    given, unknown = make_parser(known, doc, {}).parse_known_intermixed_args(words)
    flags = {n: tuple(v) if isinstance(v, list) else v for n, v in vars(given).items()}
    if flags.pop("help", False):
        if help_defaults is None:
            configs = resolve({n: flags[n] for n in ("preset", "arch") if n in flags})
            help_defaults = {n: v for c in configs[: len(types)] for n, v in vars(c).items()}
        make_parser(known, doc, help_defaults).print_help()
        sys.exit()
    if unknown:
        names = [n for f in known.values() for n in (f.name, *f.metadata.get("alias", "").split())]
        names += [n for name in known for n in SYNONYMS.get(name, "").split()]
        raise UserError(f"unrecognized arguments: {' '.join(unknown)}{hint(unknown[0], names)}")
    results = resolve(flags)
    problems = [p for config in results[: len(types)] for p in settings.all_problems(config)]
    settings.raise_problems(problems + check(*results))
    return results if isinstance(classes, tuple) else results[0]


def make_parser(known: dict[str, Field], doc: str, defaults: Mapping[str, Any]) -> Parser:
    """The parser of these fields, whose result has only the flags that are given."""
    parser = Parser(
        usage="%(prog)s [ARGUMENT ...] [--FLAG VALUE ...]",
        description=doc.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this text, and exit")
    parser.add_argument("--version", action="version", version=f"TinyLLM {settings.VERSION}")
    group: Any = parser
    for f in known.values():
        kind, limits, default = kind_of(f), f.metadata, defaults.get(f.name, "")
        group = parser.add_argument_group(limits["group"]) if "group" in limits else group
        shown = f" [{default}]".replace("\n", "\\n") * (default not in (None, "", ()))
        help = (limits["help"] + shown).replace("%", "%%")
        read: Any = settings.unescape if limits.get("escapes") else str if kind is tuple else kind
        metavar = None if "choices" in limits else kind.__name__.upper()
        options: Any = {"type": read, "choices": limits.get("choices"), "metavar": metavar}
        if limits.get("positional"):
            n_words, name = "*" if kind is tuple else "?", f.name.upper()  # choices fail on "?"
            group.add_argument(f.name, nargs=n_words, help=help, type=read, metavar=name)
        names = [f.name, *limits.get("alias", "").split()] if kind is not tuple else []
        if kind is bool:
            options |= {"type": boolean, "action": Switch, "nargs": "?", "const": True}
            names.append(f"no-{f.name}")
        if names:
            group.add_argument(*(f"--{name}" for name in names), dest=f.name, help=help, **options)
        words = f"{' '.join(names)} {SYNONYMS.get(f.name, '')}"
        for name in {*words.replace("_", "-").split(), *words.replace("-", "_").split()} - {*names}:
            parser.add_argument(f"--{name}", dest=f.name, help=argparse.SUPPRESS, **options)
        if f.name == "pos":
            options = {"type": learned, "nargs": "?", "const": "true", "help": argparse.SUPPRESS}
            names = ["--use_learned_pos_emb", "--use-learned-pos-emb"]
            parser.add_argument(*names, dest="pos", **options)
    return parser


def hint(word: str, names: list[str]) -> str:
    """What to write instead of an unknown flag; empty if it is like none of these names."""
    name = word.removeprefix("--").partition("=")[0].replace("-", "_") if word[:1] == "-" else ""
    instead = next((HINTS[key] for key in HINTS if name in key.split()), "")
    if instead.split(" ")[0].removeprefix("--") in ("python", *names):
        return f": use {instead}"
    longer = [n for n in names if name and n.startswith(name)]
    near = longer or difflib.get_close_matches(name, names, 1, 0.75)
    return f": did you mean --{near[0]}?" if near else ""
