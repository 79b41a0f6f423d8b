"""Flags, presets, checks: what a command line means, and what is wrong with it."""

from dataclasses import dataclass, fields

import pytest

from config import ARCH_FIELDS, ARCHS, PRESETS, GPTConfig, SampleConfig, TrainConfig, train_settings
from finetuning.lora import LoRAConfig
from system.command_line import HINTS, SYNONYMS, parse_args
from system.settings import UserError, all_problems, setting


def read(line: str, device: str = "cpu") -> tuple[GPTConfig, TrainConfig]:
    classes = (GPTConfig, TrainConfig)
    return parse_args(classes, line.split(), "", lambda flags: train_settings(flags, device))


def problems_of(line: str) -> str:
    with pytest.raises(UserError) as error:
        read(line)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_flags_may_have_hyphens_underscores_and_equals_signs():
    for line in ("--n-embd 96 --lr-max 1e-4", "--n_embd=96 --lr_max=1e-4"):
        gpt, config = read(line + " --no-compile --no_bias --n-head=3")
        assert (gpt.n_embd, config.lr_max, config.compile, gpt.bias) == (96, 1e-4, False, False)


@pytest.mark.parametrize(
    ("name", "aliases", "value"),
    [
        ("n_embd", "d_model hidden_size", 320),
        ("n_layer", "n_layers num_hidden_layers", 3),
        ("n_head", "n_heads num_attention_heads", 4),
        ("n_inner", "d_ff", 300),
        ("block_size", "context_length context_len seq_len cutoff_len", 300),
        ("max_steps", "max_iters steps", 300),
        ("warmup_steps", "warmup warmup_iters", 4),
        ("lr_max", "learning_rate lr max_lr", 3),
        ("lr_min", "min_lr", 1e-4),
        ("schedule", "lr_scheduler_type", "linear"),
        ("batch_size", "per_device_train_batch_size", 3),
        ("grad_accum", "gradient_accumulation_steps grad_accumulation_steps", 4),
        ("grad_clip", "max_grad_norm max_norm", 3),
        ("eval_every", "eval_interval eval_steps", 4),
        ("log_every", "log_interval", 4),
        ("precision", "dtype", "float16"),
        ("out_dir", "output_dir", "x"),
        ("bpe_vocab_size", "vocab_size", 300),
    ],
)
def test_names_from_other_code_bases_are_accepted(name: str, aliases: str, value: object):
    for alias in aliases.split():
        gpt, config = read(f"--{alias}={value}")
        assert (vars(gpt) | vars(config))[name] == value
    assert parse_args(SampleConfig, ["--max-tokens=7"], "").max_new_tokens == 7


def test_values_may_begin_with_a_hyphen():
    config = parse_args(SampleConfig, ["--prompt=-x", "--stop=--a"], "")
    assert (config.prompt, config.stop) == ("-x", "--a")
    assert "lr_max must be above 0, not -0.001" in problems_of("--lr_max=-1e-3")


def test_the_text_to_train_on_and_the_checkpoint_need_no_flag():
    assert read("my.txt --seed 3")[1].data == read("--seed 3 --data my.txt")[1].data == "my.txt"
    assert parse_args(SampleConfig, ["a.pt", "--top_k", "3"], "").checkpoint == "a.pt"


def test_a_flag_wins_over_arch_over_preset_over_default():
    gpt, config = read("--preset tiny --arch gpt2 --bias --no-tie_weights --max_steps 7")
    assert (gpt.n_layer, gpt.n_embd, config.batch_size) == (2, 128, 32)  # the preset's
    assert (gpt.norm, gpt.mlp, gpt.pos) == ("layernorm", "gelu", "learned")  # the architecture's
    assert (gpt.tie_weights, config.max_steps) == (False, 7)  # the flags'
    assert config.weight_decay == TrainConfig.weight_decay


def test_all_presets_but_three_are_textbook_recipes_with_the_components_of_qwen3():
    for name in PRESETS.keys() - {"fast", "quick", "baseline"}:
        gpt, config = read(f"--preset {name}")
        assert {field: getattr(gpt, field) for field in ARCH_FIELDS} == ARCHS["qwen3"], name
        assert (config.optimizer, config.schedule, config.lr_min) == ("adamw", "cosine", 0.0), name
        assert config.grad_clip == 1.0 and not config.grow_windows, name


def test_the_machine_chooses_the_preset():
    for device, preset in {"cpu": "laptop", "cuda": "medium", "mps": "medium"}.items():
        gpt, config = read("", device)
        assert config.preset == preset and gpt.n_layer == PRESETS[preset]["n_layer"]


@pytest.mark.parametrize("name", [*PRESETS, *ARCHS])
def test_every_preset_and_architecture_is_valid(name: str):
    kind = "preset" if name in PRESETS else "arch"
    gpt, config = read(f"--{kind} {name}")  # raises if there is a problem
    for field, value in (PRESETS | ARCHS)[name].items() if name != "gpt2" else ():
        assert (vars(gpt) | vars(config))[field] == value


def test_heads_follow_the_width_unless_given():
    assert read("--d_model 512 --n_layers 8")[0].n_head == 8
    assert read("--n_embd 512 --n_head 4")[0].n_head == 4
    assert read("--n_embd 32")[0].n_head == 1
    assert read("--preset laptop --n_embd 128")[0].n_head == 4  # the preset's own width
    widths = {192: 3, 200: 2, 250: 1, 300: 3, 500: 5, 768: 12}  # channels per head: even
    for n_embd, n_head in widths.items():
        gpt = read(f"--n_embd {n_embd}")[0]
        assert gpt.n_head == n_head and not all_problems(gpt)


def test_the_rate_and_decay_of_sgd_are_not_those_of_adamw():
    config = read("--optimizer sgd")[1]
    assert (config.lr_max, config.weight_decay) == (0.1, 0.0)
    config = read("--optimizer sgd --lr_max 1e-2 --weight_decay 0.2")[1]
    assert (config.lr_max, config.weight_decay) == (1e-2, 0.2)
    assert read("--optimizer adamw")[1].lr_max == PRESETS["laptop"]["lr_max"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--lr_max 3e38", "lr_max must be at most"),
        ("--sample_tokens 1000000000000", "sample_tokens must be at most 100000"),
        (f"--seed {2**63}", "seed must be below 2**63"),
        ("--mlp tanh", "argument --mlp: invalid choice: 'tanh'"),
        ("--n_layers x", "argument --n_layer/--n_layers: invalid int value: 'x'"),
        ("--n_layer", "expected one argument"),
        ("--n_layer --resume", "expected one argument"),
        ("--resume=yes", "argument --resume/--no-resume: invalid boolean value: 'yes'; give file"),
        ("a.txt b.txt", "unrecognized arguments: b.txt"),
        ("--resume --overwrite", "give one of them"),
    ],
)
def test_a_mistake_is_named(line: str, message: str):
    assert message in problems_of(line)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("n_layr", "n_layer"),
        ("dmodel", "d_model"),
        ("learing_rate", "learning_rate"),
        ("btach_size", "batch_size"),
        ("wieght_decay", "weight_decay"),
        ("optimiser", "optimizer"),
        ("resum", "resume"),
        ("warm", "warmup_steps"),  # the beginning of a name
        ("output", "output_dir"),  # of one from another code base
        ("n-layr=3", "n_layer"),
    ],
)
def test_a_typo_is_corrected(typo: str, meant: str):
    assert problems_of(f"--{typo}").endswith(f": did you mean --{meant}?")


def test_a_flag_without_an_equal_gets_a_hint_that_names_a_flag_of_the_script():
    assert problems_of("--epochs=3").endswith("--epochs=3: use --max_steps (--dry_run prints the "
                                              "epochs)")  # fmt: skip
    with pytest.raises(UserError, match=r"^unrecognized arguments: --epochs=1$"):
        parse_args(SampleConfig, ["--epochs=1"], "")
    for flag in ("chat", "sweep", "show_probs"):
        with pytest.raises(UserError, match=rf"--{flag}: use python explore\.py, "):
            parse_args(SampleConfig, [f"--{flag}"], "")
    known = {f.name for cls in (GPTConfig, TrainConfig, LoRAConfig) for f in fields(cls)}
    flags = {text.split()[0][2:] for text in HINTS.values() if text.startswith("--")}
    assert SYNONYMS.keys() | flags <= known and len(flags) == 3


@pytest.mark.parametrize("name", ["zzz", "not_a_flag", "use_flash", "top_k"])
def test_a_flag_with_another_meaning_gets_no_suggestion(name: str):
    assert problems_of(f"--{name}=1") == f"unrecognized arguments: --{name}=1"


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("--compile", True),
        ("--compile=True", True),
        ("--compile=false", False),
        ("--compile False", False),
        ("--no-compile", False),
        ("--no_compile", False),
        ("--no-compile=False", True),
    ],
)
def test_switches_are_turned_on_and_off_as_in_other_code_bases(line: str, value: bool):
    config = read(f"{line} --seed 3")[1]
    assert (config.compile, config.seed) == (value, 3)


@pytest.mark.parametrize("value", ["", " True", "=true", " False"])
def test_learned_positions_have_a_switch(value: str):
    pos = "rope" if value == " False" else "learned"
    assert read(f"--use_learned_pos_emb{value} --n_embd=32")[0].pos == pos
    assert read(f"--use-learned-pos-emb{value}")[0].pos == pos


def help_of(line: str, capsys: pytest.CaptureFixture) -> dict[str, str]:
    """The help of each flag of train.py, by name, without line breaks."""
    with pytest.raises(SystemExit) as stop:
        read(line)
    assert not stop.value.code
    entries = capsys.readouterr().out.split("\n  --")
    return {entry.split()[0].strip(","): " ".join(entry.split()) for entry in entries[1:]}


def test_help_names_every_flag_with_its_default_on_this_machine(capsys):
    found = help_of("--help", capsys)
    for cls in (GPTConfig, TrainConfig):
        for name, field in cls.__dataclass_fields__.items():
            assert (name in found) == field.metadata.get("flag", True), name
    assert "[2400]" in found["max_steps"] and "[adamw]" in found["optimizer"]  # laptop's
    assert "--max_iters" in found["max_steps"] and "muon" in found["optimizer"]
    assert "--no-resume" in found["resume"] and "[0.0]" in found["dropout"]


def test_help_shows_the_defaults_of_the_preset_and_architecture_that_are_given(capsys):
    found = help_of("--preset gpt2 --arch llama --n_layer 3 --help", capsys)
    assert "[12]" in found["n_layer"] and "[20000]" in found["max_steps"]  # gpt2's
    assert "[swiglu]" in found["mlp"] and "[False]" in found["tie_weights"]  # llama's


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as stop:
        read("--version")
    assert not stop.value.code and capsys.readouterr().out.startswith("TinyLLM 1.")


@dataclass
class Small:
    """One field of each kind."""

    files: tuple[str, ...] = setting((), "files to read", positional=True)
    out: str = setting("", "where to write: 100% of it")
    size: int = setting(3, "how many", low=1, high=9, group="numbers", alias="n")
    rate: float = setting(0.5, "how fast", above=0, below=1)
    limit: float | None = setting(None, "at most this", low=0)
    fast: bool = setting(False, "no accuracy", group="switches")
    exact: bool = setting(True, "no speed")
    mode: str = setting("a\nb", "", choices=("", "a\nb", "c"))
    hidden: int = setting(7, "not a flag", flag=False)


def read_small(*words: str) -> Small:
    return parse_args(Small, list(words), "")


def test_help_can_describe_defaults_and_leave_out_flags(capsys):
    shown = {f.name: f.default for f in fields(Small) if f.name != "rate"}
    shown["size"] = "as large as possible"
    with pytest.raises(SystemExit):
        parse_args(Small, ["-h"], "A title.", help_defaults=shown)
    text = capsys.readouterr().out
    assert "A title." in text and "\nswitches:\n" in text and "100% of it" in text
    assert "how many [as large as possible]" in text and "--rate" not in text
    assert "at most this\n" in text and "[a\\nb]" in text and "FILES" in text
    with pytest.raises(UserError, match=r"^unrecognized arguments: --rate=1$"):
        parse_args(Small, ["--rate=1"], "", help_defaults=shown)


def test_words_without_a_flag_fill_the_tuple():
    one = read_small("a.txt", "--size", "4", "b.txt", "--exact=False", "c.txt")
    assert (one.files, one.size, one.exact) == (("a.txt", "b.txt", "c.txt"), 4, False)
    assert read_small().files == () and read_small("--out=x").out == "x"


@pytest.mark.parametrize(
    ("line", "problems"),
    [
        ("--size 1", ""),
        ("--size=9", ""),
        ("--size 0", "size must be at least 1, not 0"),
        ("--size 10", "size must be at most 9, not 10"),
        ("--rate 0.001", ""),
        ("--rate 0", "rate must be above 0, not 0.0"),
        ("--rate 1", "rate must be below 1, not 1.0"),
        ("--rate inf", "rate must be a finite number that float32 can represent, not inf"),
        ("--limit 0", ""),
        ("--limit=-1", "limit must be at least 0, not -1.0"),
        ("--mode c", ""),
        ("--rate nan", "rate must be a finite number that float32 can represent, not nan"),
        ("--size 0 --rate 1", "size must be at least 1, not 0; rate must be below 1, not 1.0"),
        ("--hidden 3", "unrecognized arguments: --hidden"),
        ("--out=\udcff", "invalid UTF-8: '--out=\\udcff'"),
    ],
)
def test_the_limits_of_a_setting(line: str, problems: str):
    if not problems:
        read_small(*line.split())
        return
    with pytest.raises(UserError) as error:
        read_small(*line.split())
    assert str(error.value).startswith(problems)


def test_the_command_line_is_that_of_the_process_unless_given(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py", "--size=5"])
    assert parse_args(Small, None, "").size == 5
    assert parse_args(Small, [], "").size == 3
    small, run_config = parse_args((Small, TrainConfig), ["--rate=0.25", "--seed=4"], "")
    assert (small.rate, run_config.seed, run_config.max_steps) == (0.25, 4, 5000)


def test_further_problems_come_after_those_of_the_fields():
    def check(small: Small) -> list[str]:
        return [f"size is {small.size}", "second"]

    with pytest.raises(UserError, match=r"^size must be at least 1, not 0; size is 0; second$"):
        parse_args(Small, ["--size=0"], "", check=check)
    with pytest.raises(UserError, match=r"^size is 5; second$"):
        parse_args(Small, ["--size=5"], "", check=check)


def test_a_model_setting_that_is_not_known_is_beyond_an_export():
    config = GPTConfig(norm="layernorm", dropout=0.5)
    assert config.beyond({f.name for f in fields(GPTConfig)}) == []
    assert "norm" in config.beyond(set()) and "dropout" not in config.beyond(set())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # n_head, n_kv_head, head_size, n_inner, norm_eps
        ({}, (6, 6, 64, 1024, 1e-6)),
        ({"n_embd": 768, "mlp": "gelu", "norm": "layernorm"}, (12, 12, 64, 3072, 1e-5)),  # GPT-2
        ({"n_embd": 768}, (12, 12, 64, 2048, 1e-6)),  # 8/3 * 768 = 2048
        ({"n_embd": 4096, "n_head": 32, "n_kv_head": 8}, (32, 8, 128, 10944, 1e-6)),  # 342 * 32
        ({"n_embd": 130, "mlp": "relu"}, (1, 1, 130, 544, 1e-6)),  # 520 = 16.25 * 32
        ({"n_embd": 32, "head_size": 6, "n_inner": 5, "norm_eps": 0.5}, (1, 1, 6, 5, 0.5)),
        ({"n_embd": 63}, (1, 1, 63, 192, 1e-6)),  # 168 = 5.25 * 32
    ],
)
def test_sizes_that_are_not_given_follow_from_the_others(settings: dict, expected: tuple):
    c = GPTConfig(**settings)
    assert (c.n_head, c.n_kv_head, c.head_size, c.n_inner, c.norm_eps) == expected
    assert type(c.n_inner) is int and type(c.head_size) is int


@pytest.mark.parametrize(
    ("settings", "n_problems"),
    [
        ({"n_embd": 6, "n_head": 3}, 0),
        ({"n_embd": 10, "n_head": 2}, 1),  # heads of 5 cannot be rotated
        ({"n_embd": 10, "n_head": 2, "pos": "learned"}, 0),
        ({"n_embd": 10, "n_head": 3}, 1),
        ({"n_embd": 10, "n_head": 3, "head_size": 4}, 0),
        ({"n_embd": 10, "n_head": 3, "head_size": 5}, 1),
        ({"n_embd": 32, "n_head": 4, "n_kv_head": 2}, 0),
        ({"n_embd": 32, "n_head": 4, "n_kv_head": 3}, 1),
        ({"n_embd": 9, "n_head": 1, "pos": "none"}, 0),
        ({"n_embd": 9, "n_head": 1, "pos": "sinusoidal"}, 1),
        ({"n_embd": 9, "n_head": 1, "pos": "sinusoidal", "token_shift": True}, 2),
        ({"n_embd": 10, "n_head": 1, "pos": "sinusoidal", "token_shift": True}, 0),
        ({"n_embd": 1, "n_head": 1, "pos": "none", "token_shift": True}, 1),
        ({"n_embd": 10**9, "n_head": 1}, 1),
        ({"head_size": 10**18}, 1),
        ({"n_embd": 0, "n_head": 1}, 0),  # reported as outside its limits
    ],
)
def test_combinations_of_sizes_that_fit(settings: dict, n_problems: int):
    assert len(GPTConfig(**settings).problems()) == n_problems


@pytest.mark.parametrize(
    ("settings", "n_problems"),
    [
        ({"lr_max": 0.5, "lr_min": 0.5}, 0),
        ({"lr_max": 0.5, "lr_min": 0.6}, 1),
        ({"lr_max": 0.0, "lr_min": 0.6}, 0),  # lr_max is reported as outside its limits
        ({"warmup_steps": 10, "max_steps": 10}, 0),
        ({"warmup_steps": 11, "max_steps": 10}, 1),
        ({"warmup_steps": 0, "max_steps": 1}, 0),
        ({"resume": True}, 0),
        ({"overwrite": True}, 0),
        ({"tag": "a b-1.x"}, 0),
        *(({"tag": tag}, 1) for tag in (".", "..", "a/b", "a\\b")),
    ],
)
def test_settings_of_a_run_that_fit_together(settings: dict, n_problems: int):
    assert len(TrainConfig(**settings).problems()) == n_problems


def test_warmup_is_a_tenth_of_the_run_and_at_most_100_steps():
    steps = {5: 0, 99: 9, 1000: 100, 1009: 100, 5000: 100}
    assert {n: TrainConfig(max_steps=n).warmup_steps for n in steps} == steps
    assert TrainConfig(max_steps=50, warmup_steps=0).warmup_steps == 0


def test_a_presets_architecture_gives_way_to_a_flag():
    gpt, config = read("--preset baseline")
    assert (gpt.norm, gpt.pos, gpt.bias, config.arch) == ("layernorm", "learned", True, "gpt2")
    gpt, config = read("--preset baseline --arch llama --n_layer 3")
    assert (gpt.norm, gpt.pos, gpt.bias, gpt.n_layer) == ("rmsnorm", "rope", False, 3)
    assert (config.arch, config.lr_min) == ("llama", 1e-4)  # nanoGPT's final rate
    assert read("--preset auto --n_head 4", "cuda")[0].n_head == 4
    gpt = read("--preset fast --arch llama")[0]  # the preset has components of its own
    assert {field: getattr(gpt, field) for field in ARCH_FIELDS} == ARCHS["llama"]
