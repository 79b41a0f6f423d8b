"""Flags, presets, checks: what a command line means, and what is wrong with it."""

import pytest

from config import (
    ARCHS,
    PRESETS,
    GPTConfig,
    SampleConfig,
    TrainConfig,
    UserError,
    parse_args,
    train_settings,
)
from system.errors import run


def read(line: str, device: str = "cpu") -> tuple[GPTConfig, TrainConfig]:
    """The settings of a train.py command line."""
    classes = (GPTConfig, TrainConfig)
    return parse_args(classes, line.split(), "", lambda flags: train_settings(flags, device))


def problems_of(line: str) -> str:
    """The error message of a train.py command line."""
    with pytest.raises(UserError) as error:
        read(line)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_flags_may_have_hyphens_underscores_and_equals_signs():
    for line in ("--n-embd 96 --lr-max 1e-4", "--n_embd=96 --lr_max=1e-4"):
        gpt, config = read(line + " --no-compile --no_bias --n-head=3")
        assert (gpt.n_embd, config.lr_max, config.compile, gpt.bias) == (96, 1e-4, False, False)


@pytest.mark.parametrize(
    ("alias", "name", "value"),
    [
        ("d_model", "n_embd", 320),
        ("n_layers", "n_layer", 3),
        ("n_heads", "n_head", 4),
        ("d_ff", "n_inner", 300),
        ("context_length", "block_size", 300),
        ("max_iters", "max_steps", 300),
        ("warmup", "warmup_steps", 300),
        ("learning_rate", "lr_max", 3),
        ("vocab_size", "bpe_vocab_size", 300),
    ],
)
def test_names_from_other_code_bases_are_accepted(alias: str, name: str, value: int):
    gpt, config = read(f"--{alias}={value}")
    assert (vars(gpt) | vars(config))[name] == value


def test_the_length_of_a_sample_has_another_name_too():
    assert parse_args(SampleConfig, ["--max-tokens=7"], "").max_new_tokens == 7


def test_values_may_begin_with_a_hyphen():
    config = parse_args(SampleConfig, ["--prompt", "-x", "--stop=--"], "")
    assert (config.prompt, config.stop) == ("-x", "--")
    assert "lr_max must be above 0, not -0.001" in problems_of("--lr_max -1e-3")


def test_positional_arguments_need_no_flag():
    assert parse_args(SampleConfig, ["a.pt", "--top_k", "3"], "").checkpoint == "a.pt"
    assert parse_args(SampleConfig, ["--checkpoint", "a.pt"], "").checkpoint == "a.pt"


def test_a_default_model_can_be_built_from_its_config():
    config = GPTConfig()
    assert (config.vocab_size, config.n_head, config.n_kv_head, config.head_size) == (
        50257,
        6,
        6,
        64,
    )


def test_a_flag_wins_over_arch_over_preset_over_default():
    gpt, config = read("--preset tiny --arch gpt2 --bias --no-tie_weights --max_steps 7")
    assert (gpt.n_layer, gpt.n_embd, config.batch_size) == (2, 128, 32)  # the preset's
    assert (gpt.norm, gpt.mlp, gpt.pos) == ("layernorm", "gelu", "learned")  # the architecture's
    assert (gpt.tie_weights, config.max_steps) == (False, 7)  # the flags'
    assert config.weight_decay == TrainConfig.weight_decay


@pytest.mark.parametrize(
    ("device", "preset"), [("cpu", "laptop"), ("cuda", "medium"), ("mps", "medium")]
)
def test_the_machine_chooses_the_preset(device: str, preset: str):
    gpt, config = read("", device)
    assert config.preset == preset and gpt.n_layer == PRESETS[preset]["n_layer"]


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [
        # layers, heads, channels, window
        ("tiny", (2, 2, 128, 128)),
        ("small", (4, 4, 256, 256)),
        ("medium", (6, 6, 384, 256)),
        ("large", (8, 8, 512, 512)),
        ("gpt2", (12, 12, 768, 1024)),
    ],
)
def test_presets_have_the_sizes_their_names_promise(preset: str, sizes: tuple):
    gpt, _ = read(f"--preset {preset}")
    assert (gpt.n_layer, gpt.n_head, gpt.n_embd, gpt.block_size) == sizes


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


def test_defaults_follow_what_is_given():
    config = read("--lr-max 1e-4 --max_steps 50")[1]
    assert config.warmup_steps == 5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--n_embd 100 --n_head 3", "n_embd 100 is not divisible by n_head 3"),
        ("--n_embd 9 --n_head 3", "rope needs an even head size, not 3"),
        ("--pos sinusoidal --n_embd 9", "sinusoidal positions need an even n_embd"),
        ("--token_shift --n_embd 9", "token_shift needs an even n_embd, not 9"),
        ("--lr_min 1 --lr_max 0.1", "lr_min 1 is above lr_max 0.1"),
        ("--warmup 100 --max_steps 50", "warmup_steps 100 is above max_steps 50"),
        ("--dropout 1", "dropout must be below 1, not 1.0"),
        ("--lr_max nan", "lr_max must be a finite number that float32 can represent, not nan"),
        ("--lr_max 0", "lr_max must be above 0"),
        ("--mlp tanh", "mlp must be one of gelu, relu, silu, relu2, swiglu, not 'tanh'"),
        ("--preset huge", "preset must be one of auto, laptop, tiny"),
        ("--arch bert", "arch must be one of gpt2, llama, qwen3"),
        ("--n_layers x", "--n_layer must be a whole number, not 'x'"),
        ("--n_layer 2.5", "--n_layer must be a whole number, not '2.5'"),
        ("--n_layer", "--n_layer needs a value"),
        ("--n_layer --resume", "--n_layer needs a value"),
        ("--resume=yes", "--resume takes no value: write --resume or --no-resume"),
        ("--learning_rat 1e-3", "unknown flag --learning_rat: did you mean --learning_rate?"),
        ("--n-layr=3", "unknown flag --n-layr: did you mean --n_layer?"),
        ("--no_n_layer", "unknown flag --no_n_layer: did you mean --n_layer?"),
        ("input.txt", "unexpected argument 'input.txt'"),
        ("--tag a/b", "tag 'a/b' must be a plain name"),
        ("--resume --overwrite", "give one of them"),
    ],
)
def test_a_mistake_is_named(line: str, message: str):
    assert message in problems_of(line)


def test_an_unknown_flags_value_is_no_mistake_of_its_own():
    assert problems_of("--foo 3") == "unknown flag --foo"


def test_all_mistakes_are_reported_in_one_line():
    problems = problems_of("--n_layr 3 --n_embd 100 --n_head 3 --dropout 2 --max_steps many --top")
    for words in ("n_layr", "not divisible", "dropout must be below 1", "'many'", "--top"):
        assert words in problems


def test_a_users_mistake_is_one_line_on_stderr_and_status_2(capsys):
    def main() -> int:
        raise UserError("that was wrong: do this")

    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: that was wrong: do this\n"


def test_help_names_every_flag_with_its_default_on_this_machine(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    text = capsys.readouterr().out
    for cls in (GPTConfig, TrainConfig):
        for name, field in cls.__dataclass_fields__.items():
            assert (f"  --{name}" in text) == field.metadata.get("flag", True), name
    lines = {line.split()[0].strip(","): line for line in text.splitlines() if "  --" in line}
    assert "[1000]" in lines["--max_steps"] and "[muon]" in lines["--optimizer"]  # laptop's
    assert "[off]" in lines["--resume"] and "[0.0]" in lines["--dropout"]


def test_help_shows_positional_arguments(capsys):
    with pytest.raises(SystemExit):
        parse_args(SampleConfig, ["--help"], "")
    assert "[CHECKPOINT]" in capsys.readouterr().out


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as stop:
        read("--version")
    assert not stop.value.code and capsys.readouterr().out.startswith("TinyLLM 1.")
