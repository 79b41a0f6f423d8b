"""Flags, presets, checks: what a command line means, and what is wrong with it."""

import pytest

from config import (
    ALIASES,
    ARCHS,
    PRESETS,
    GPTConfig,
    SampleConfig,
    TrainConfig,
    UserError,
    parse_flags,
    raise_problems,
    run,
    train_settings,
)


def read(line: str, device: str = "cpu") -> tuple[GPTConfig, TrainConfig, str]:
    """The settings of a train.py command line, and its problems as one text."""
    flags, problems = parse_flags(line.split(), "", GPTConfig, TrainConfig)
    gpt, config = train_settings(flags, device)
    return gpt, config, "; ".join(problems + gpt.problems() + config.problems())


def test_flags_may_have_hyphens_underscores_and_equals_signs():
    for line in ("--n-embd 96 --lr-max 1e-4", "--n_embd=96 --lr_max=1e-4"):
        gpt, config, problems = read(line + " --no-compile --no_bias --n-head=3")
        assert (gpt.n_embd, config.lr_max, config.compile, gpt.bias) == (96, 1e-4, False, False)
        assert not problems


@pytest.mark.parametrize(
    ("alias", "name"), [item for item in ALIASES.items() if item != ("from", "source")]
)
def test_names_from_other_code_bases_are_accepted(alias: str, name: str):
    flags, problems = parse_flags([f"--{alias}=3"], "", GPTConfig, TrainConfig, SampleConfig)
    assert flags == {name: 3} and not problems


def test_a_flag_wins_over_arch_over_preset_over_default():
    gpt, config, _ = read("--preset tiny --arch gpt2 --bias --no-tie_weights --max_steps 7")
    assert (gpt.n_layer, gpt.n_embd, config.batch_size) == (2, 128, 32)  # the preset's
    assert (gpt.norm, gpt.mlp, gpt.pos) == ("layernorm", "gelu", "learned")  # the architecture's
    assert (gpt.tie_weights, config.max_steps) == (False, 7)  # the flags'
    assert config.weight_decay == TrainConfig.weight_decay


@pytest.mark.parametrize(
    ("device", "preset"), [("cpu", "laptop"), ("cuda", "medium"), ("mps", "medium")]
)
def test_the_machine_chooses_the_preset(device: str, preset: str):
    gpt, config, problems = read("", device)
    assert config.preset == preset and gpt.n_layer == PRESETS[preset]["n_layer"] and not problems


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
    gpt, _, problems = read(f"--preset {preset}")
    assert (gpt.n_layer, gpt.n_head, gpt.n_embd, gpt.block_size) == sizes and not problems


@pytest.mark.parametrize("name", [*PRESETS, *ARCHS])
def test_every_preset_and_architecture_is_valid(name: str):
    kind = "preset" if name in PRESETS else "arch"
    assert not read(f"--{kind} {name}")[2]


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
        ("--n_embd 9 --n_head 3", "rope needs an even head size, and n_embd / n_head is 3"),
        ("--pos sinusoidal --n_embd 9", "sinusoidal positions need an even n_embd"),
        ("--token_shift --n_embd 9", "token_shift needs an even n_embd, not 9"),
        ("--lr_min 1 --lr_max 0.1", "lr_min 1 is above lr_max 0.1"),
        ("--warmup 100 --max_steps 50", "warmup_steps 100 is above max_steps 50"),
        ("--dropout 1", "dropout must be below 1, not 1.0"),
        ("--lr_max nan", "lr_max must be a finite number, not nan"),
        ("--lr_max 0", "lr_max must be above 0"),
        ("--mlp tanh", "mlp must be one of gelu, relu, silu, relu2, swiglu, not 'tanh'"),
        ("--preset huge", "preset must be one of laptop, tiny"),
        ("--arch bert", "arch must be one of gpt2, llama, qwen3"),
        ("--n_layers x", "--n_layer must be a whole number, not 'x'"),
        ("--n_layer 2.5", "--n_layer must be a whole number, not '2.5'"),
        ("--n_layer", "--n_layer needs a whole number after it"),
        ("--learning_rat 1e-3", "unknown flag --learning_rat: did you mean --learning_rate?"),
        ("--n-layr=3", "unknown flag --n_layr: did you mean --n_layer?"),
        ("input.txt", "unexpected argument 'input.txt'"),
        ("--tag a/b", "tag 'a/b' must be a plain name"),
        ("--resume --overwrite", "give one of them"),
    ],
)
def test_a_mistake_is_named(line: str, message: str):
    assert message in read(line)[2]


def test_an_unknown_flags_value_is_no_mistake_of_its_own():
    assert read("--foo 3")[2].count("3") == 0


def test_all_mistakes_are_reported_in_one_line():
    problems = read("--n_layr 3 --n_embd 100 --n_head 3 --dropout 2 --max_steps many --top")[2]
    with pytest.raises(UserError) as error:
        raise_problems([problems])
    for words in ("n_layr", "not divisible", "dropout must be below 1", "'many'", "--top"):
        assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_users_mistake_is_one_line_on_stderr_and_status_2(capsys):
    def main() -> int:
        raise UserError("that was wrong: do this")

    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: that was wrong: do this\n"


@pytest.mark.parametrize("classes", [(GPTConfig, TrainConfig), (SampleConfig,)])
def test_help_names_every_flag_with_its_default(classes: tuple, capsys):
    with pytest.raises(SystemExit):
        parse_flags(["--help"], "", *classes)
    text = capsys.readouterr().out
    for cls in classes:
        for name, field in cls.__dataclass_fields__.items():
            assert f"--{name}" in text or not field.metadata.get("flag", True)
    assert "[auto]" in text
