"""Precision, compilation and memory on this machine."""

import contextlib
import logging
import os
import timeit
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import make_model
from torch.utils import cpp_extension

from config import ARCH_FIELDS, PRESET_FIELDS, GPTConfig, TrainConfig, train_settings
from corpus.corpus import Corpus
from system.device import check_memory, compiler_problem
from system.settings import UserError
from training import auto_compile, setup, task
from training.setup import memory_estimate, pick_compile, pick_precision, preset_table
from training.task import to_gpu_if_small

CPU = torch.device("cpu")


def test_nothing_is_compiled_if_compiling_does_not_work(monkeypatch, capsys):
    monkeypatch.setattr(
        torch, "compile", Mock(side_effect=RuntimeError("no C++ compiler\nand a long trace"))
    )
    assert pick_compile(TrainConfig(), torch.device("meta")) is False
    assert capsys.readouterr().out == "not compiling: no C++ compiler\n"
    with pytest.raises(UserError, match=r"not work here \(no C\+\+ compiler\): give --no-compile"):
        pick_compile(TrainConfig(compile=True), CPU)
    assert pick_compile(TrainConfig(), torch.device("mps")) is False


def test_a_cpu_compiles_if_the_steps_of_the_run_save_more_time_than_it_takes(monkeypatch):
    assert pick_compile(TrainConfig(max_steps=300), CPU) is None
    assert pick_compile(TrainConfig(max_steps=299), CPU) is False
    model, config, task = make_model(), TrainConfig(max_steps=2000), Mock(tokens_per_step=1)
    monkeypatch.setattr(auto_compile, "compiler_problem", lambda device: "")

    def decide(*seconds, **changes):  # of a step: eager, compiled
        monkeypatch.setattr(auto_compile, "step_seconds", Mock(side_effect=seconds))
        decided = auto_compile.compile_if_faster(model, task, replace(config, **changes))
        assert decided == all(block._compiled_call_impl is not None for block in model.blocks)
        return decided

    assert decide(0.08) is False  # 2000 steps save 0.15 x 160 s = 24 s
    assert decide(0.09, 0.084) is False  # not faster, so it is undone
    assert decide(0.09, grow_windows=True) is False
    assert decide(0.09, 0.07) is True
    monkeypatch.setattr(setup, "world_size", lambda: 2)
    assert pick_compile(config, CPU) is False


def test_the_memory_of_optimizers_checkpointing_and_shards_by_hand(monkeypatch):
    model = make_model()
    n = model.num_params()
    run = TrainConfig(batch_size=2, precision="float32", optimizer="muon", grad_accum=2)
    run.grad_checkpoint, run.parallel = True, "fsdp"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert memory_estimate(model.config, run) == {
        "weights": 2 * n,
        "gradients": 2 * n,
        # two averages for the embedding (11 x 16) and the last norm (16), one for the rest
        "optimizer": 2 * (n + 11 * 16 + 16),
        # for 24 tokens, the inputs of 2 blocks, one block of 20 x 16 + 5 x 64 numbers, and 11
        # logits twice with their gradient
        "activations": 24 * (2 * 16 * 4 + (320 + 320) * 4 + 11 * 12),
        "batches": 24 * 2 * 8,  # each process has one of two micro-batches
    }
    run.optimizer = "sgd"
    assert memory_estimate(model.config, run)["optimizer"] == 2 * n  # one each
    run.parallel = "ddp"  # divides nothing
    assert memory_estimate(model.config, run)["weights"] == 4 * n


def test_only_small_streams_are_copied_to_another_device(monkeypatch):
    ids = np.arange(100, dtype=np.uint16)
    monkeypatch.setattr(task, "MAX_GPU_TOKENS", 100)
    copy = to_gpu_if_small(ids, torch.device("meta"))  # has no memory, like a GPU for this purpose
    assert (copy.device.type, copy.dtype, len(copy)) == ("meta", torch.int32, 100)
    assert to_gpu_if_small(ids, CPU) is ids
    monkeypatch.setattr(task, "MAX_GPU_TOKENS", 99)
    assert to_gpu_if_small(ids, torch.device("meta")) is ids


# --- precision and compilation


@pytest.mark.parametrize(
    ("seconds", "expected", "ratio"),
    [(150.0, "float32", 0.02), (2.0, "float32", 1.5), (1.95, "bfloat16", 1.5)],
)
def test_a_cpu_uses_bfloat16_if_it_is_more_than_one_and_a_half_times_as_fast(
    monkeypatch, seconds, expected, ratio
):
    times = {torch.float32: 3.0, torch.bfloat16: seconds}
    monkeypatch.setattr(setup, "matmul_seconds", times.get)
    reason = f"bfloat16 matrix products are {ratio} times as fast as float32 here"
    assert pick_precision("auto", CPU) == (expected, reason)
    assert pick_precision("float16", CPU) == ("float16", "as requested")
    assert pick_precision("auto", torch.device("mps")) == ("float32", "the default on this device")


@pytest.mark.parametrize("durations", [[0.005, 0.003, 0.0025, 0.004] + 12 * [0.009], [0.25]])
def test_a_matrix_product_is_timed_by_the_best_of_sixteen_or_a_slow_one(monkeypatch, durations):
    ticks = iter([t for i, d in enumerate(durations) for t in (i, i + d)])
    threads = []

    def timer() -> float:
        threads.append(torch.get_num_threads())
        return next(ticks)

    timed = partial(timeit.timeit, timer=timer)
    monkeypatch.setattr(setup, "timeit", SimpleNamespace(timeit=timed))
    torch.set_num_threads(2)
    assert setup.matmul_seconds(torch.float32) == pytest.approx(min(durations))
    assert next(ticks, None) is None and set(threads) == {1}
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_a_function_is_compiled_for_the_device_to_see_if_that_works(monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_VEC_ISA_OK", raising=False)
    seen = []
    monkeypatch.setattr(
        torch, "compile", lambda function: lambda x: seen.append((function, x.device))
    )
    assert pick_compile(TrainConfig(), torch.device("meta")) is True
    assert "TORCHINDUCTOR_VEC_ISA_OK" not in os.environ
    assert seen == [(torch.neg, torch.device("meta"))]
    assert pick_compile(TrainConfig(compile=True), CPU) is True
    assert seen[1:] == [(torch.neg, CPU)]
    assert os.environ["TORCHINDUCTOR_VEC_ISA_OK"] == "1"
    assert pick_compile(TrainConfig(compile=False), CPU) is False
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 0), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")],
)
def test_a_gpu_before_ampere_uses_float16_instead_of_emulated_bfloat16(
    monkeypatch, capability: tuple[int, int], expected: str
):
    """By capability: V100, T4, A100, H100. torch.cuda itself decides, from what the driver says."""
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert torch.cuda.is_bf16_supported()  # with emulation, all of them
    reasons = {"bfloat16": "supported by this GPU", "float16": "this GPU has no bfloat16"}
    assert pick_precision("auto", torch.device("cuda")) == (expected, reasons[expected])
    monkeypatch.setattr(setup, "device_problems", lambda name: [])
    monkeypatch.setattr(setup, "pick_device", torch.device)
    config = TrainConfig(device="cuda", precision="bfloat16", dry_run=True)
    slow = ["this GPU only emulates bfloat16, slowly: use --precision float16"]
    assert setup.check_run(GPTConfig(), config) == (slow if expected == "float16" else [])


@pytest.mark.parametrize(
    ("device", "settings", "same_shapes", "expected"),
    [
        ("cuda", {}, True, [("GPT", {"dynamic": False, "mode": "reduce-overhead"})]),
        ("cuda", {"grad_accum": 2}, True, [("GPT", {"dynamic": False, "mode": None})]),
        ("cuda", {}, False, [("GPT", {"dynamic": None, "mode": None})]),
        ("cuda", {"parallel": "fsdp"}, True, [("Block", {}), ("Block", {})]),
        ("cpu", {}, True, [("Block", {}), ("Block", {})]),
    ],
)
def test_what_is_compiled(monkeypatch, device, settings, same_shapes, expected):
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **kw: compiled.append((type(self).__name__, kw))
    )
    model, config = make_model(), TrainConfig(**settings)
    setup.compile_model(model, config, torch.device(device), same_shapes)
    assert compiled == expected
    if "mode" in expected[0][1]:  # large models and several processes do without CUDA graphs
        for name, value in (
            ("MAX_GRAPH_PARAMS", model.num_params() - 1),
            ("world_size", lambda: 2),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(setup, name, value)
                setup.compile_model(model, config, torch.device(device), same_shapes)
            assert compiled[-1][1]["mode"] is None


def test_freed_memory_is_kept_by_the_c_library(monkeypatch):
    """glibc's malloc.h: M_MMAP_MAX is -4, M_TRIM_THRESHOLD -1; the largest int switches it off."""
    calls = []
    libc = SimpleNamespace(mallopt=lambda *args: calls.append(args))
    monkeypatch.setattr(setup.ctypes, "CDLL", lambda name: libc)
    monkeypatch.setattr(setup.sys, "platform", "linux")
    setup.keep_freed_memory()
    assert calls == [(-4, 0), (-1, 2147483647)]
    monkeypatch.setattr(setup.ctypes, "CDLL", lambda name: SimpleNamespace())  # as with musl
    setup.keep_freed_memory()
    monkeypatch.setattr(setup.ctypes, "CDLL", None)
    monkeypatch.setattr(setup.sys, "platform", "win32")
    setup.keep_freed_memory()
    assert len(calls) == 2


def test_the_memory_of_gpt_2_by_hand():
    """GPT-2's components have 10 C + 3 F numbers per block and token (Korthikanti et al. 2022 count
    34 C bytes in float16, of which the attention scores' are not stored here)."""
    gpt = GPTConfig(vocab_size=7, block_size=5, n_layer=3, n_embd=8, n_head=1, n_inner=32)
    gpt.norm, gpt.mlp, gpt.pos, gpt.qk_norm = "layernorm", "gelu", "learned", False
    run = TrainConfig(batch_size=2, precision="bfloat16")
    estimate = memory_estimate(gpt, run)
    # embeddings, 3 blocks of 2 gains and 4 matrices, and the last gain
    n = 7 * 8 + 5 * 8 + 3 * (2 * 8 + 8 * 24 + 8 * 8 + 2 * 8 * 32) + 8
    # per token: 3 blocks x (80 + 96) numbers of 2 bytes, and 7 logits of 2 and twice 4 bytes
    assert estimate == {
        "weights": 4 * n,
        "gradients": 4 * n,
        "optimizer": 8 * n,
        "activations": 10 * (3 * 176 * 2 + 7 * 10),
        "batches": 10 * 16,
    }
    for change, per_token in (
        ({"norm": "rmsnorm"}, 3 * (112 + 96) * 2 + 70),
        ({"qk_norm": True}, 3 * (112 + 96) * 2 + 70),
        ({"pos": "rope"}, 3 * (96 + 96) * 2 + 70),
        ({"mlp": "swiglu"}, 3 * (80 + 160) * 2 + 70),
    ):
        assert memory_estimate(replace(gpt, **change), run)["activations"] == 10 * per_token


@pytest.mark.parametrize(
    ("preset", "changes", "fits"),
    [
        ("medium", {}, True),
        ("gpt2", {}, False),
        ("gpt2", {"batch_size": 8, "grad_accum": 4, "grad_checkpoint": True}, True),
    ],
)
def test_what_a_t4_can_train(monkeypatch, preset, changes, fits):
    """It has 16 GB, of which PyTorch reports 15.8."""
    flags = {"preset": preset, "vocab_size": 50257, "precision": "float16"} | changes
    n_bytes = sum(memory_estimate(*train_settings(flags, "cuda")).values())
    assert fits == (1.5 * n_bytes < 15.8e9)  # with checkpointing, estimates were two thirds
    monkeypatch.setattr("system.device.memory_size", lambda device: int(15.8e9))
    with contextlib.nullcontext() if fits else pytest.raises(UserError, match="--batch_size with"):
        check_memory(n_bytes, torch.device("cuda"), "this run", setup.LESS_MEMORY)


# --- the summary of a run


def test_the_machine_is_set_up_before_the_weights_are_drawn(monkeypatch, capsys):
    kept = []
    monkeypatch.setattr(setup, "keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr(setup, "pick_compile", lambda config, device: device == CPU)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    config = TrainConfig(precision="bfloat16", seed=77, parallel="fsdp")
    torch.set_float32_matmul_precision("highest")
    setup.setup_machine(config, CPU)
    words = "bfloat16 (as requested), compiled, so the first step is slow\n"
    assert capsys.readouterr().out == f"machine: cpu (6 threads), {words}"
    assert torch.initial_seed() == 77 and kept == [True]
    assert (config.precision, config.compile) == ("bfloat16", True)
    assert torch.get_float32_matmul_precision() == "high"
    monkeypatch.setattr(setup, "world_size", lambda: 4)
    monkeypatch.setattr(setup, "broadcast_from_rank0", lambda function: function())
    setup.setup_machine(config, torch.device("meta"))
    words = "bfloat16 (as requested), eager\n"
    assert capsys.readouterr().out == f"machine: meta in 4 processes, fsdp, {words}"
    assert kept == [True]  # only on a CPU


@pytest.mark.parametrize(
    ("settings", "picked", "expected"),
    [
        ({"precision": "bfloat16"}, "bfloat16", "bfloat16 (as before)"),  # in the checkpoint
        ({"precision": "float16"}, "float16", "float16 (why; bfloat16 before)"),
        ({}, "float16", "float16 (why; bfloat16 before)"),
        ({"parallel": "fsdp"}, "float16", "float32 (--parallel fsdp has no loss scaling"),
    ],
)
def test_the_precision_has_a_reason(monkeypatch, capsys, settings, picked, expected):
    monkeypatch.setattr(setup, "pick_precision", lambda *args: (picked, "why"))
    config = TrainConfig(compile=False, **settings)
    setup.setup_machine(config, CPU, {"train_config": {"precision": "bfloat16"}})
    assert expected in capsys.readouterr().out
    assert config.precision == expected.split()[0]


def test_a_missing_gpu_is_no_news_on_a_cpu(monkeypatch, caplog):
    """PyTorch says it when inductor imports torch.utils.cpp_extension."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_HOME", "/somewhere")
    cpp_extension._find_cuda_home()
    assert "No CUDA runtime is found" in caplog.text  # otherwise PyTorch has changed
    caplog.clear()
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert compiler_problem(CPU) == ""
    cpp_extension._find_cuda_home()
    logger.warning("another warning")
    assert {record.message for record in caplog.records} == {"another warning"}


def test_the_summary_of_a_run(capsys, monkeypatch):
    monkeypatch.setattr(setup, "memory_estimate", lambda *args: {"weights": 2.4e6, "rest": 1.2e9})
    gpt = GPTConfig(vocab_size=8, block_size=5, n_layer=3, n_embd=8, n_head=2)
    config = TrainConfig(preset="tiny", max_steps=70, batch_size=9, grad_accum=4, lr_min=1e-5)
    info = {"name": "a book", "bytes": 1234567}
    corpus = Corpus(np.zeros(4321), np.zeros(1000), info, 9000, 2500)
    monkeypatch.setattr(setup, "count_params", lambda gpt: (12345, 100))
    setup.print_summary(gpt, config, corpus, CPU)
    shown = capsys.readouterr()
    assert "note: 9,000 bytes of training text are few, a new model will memorize" in shown.err
    setup.print_summary(gpt, config, replace(corpus, train_bytes=45000), CPU)
    assert capsys.readouterr().err == ""
    assert shown.out.splitlines() == [
        "corpus: a book, 1,234,567 bytes; 4,321 training tokens, 1,000 validation tokens, "
        "vocabulary 8, 2.50 bytes per token",
        "model: 3 layers, 2 heads of 4, 8 channels, window 5; rmsnorm, swiglu, rope; "
        "12,345 parameters",
        "memory: about 1,202 MB (weights 2, rest 1,200)",
        "run: preset tiny, 70 steps of 9 x 4 sequences, learning rate 0.001 to 1e-05",
        "uniform guessing would give a loss of ln(8) = 2.0794",
    ]


def test_the_table_of_presets_in_the_help():
    lines = [line.split() for line in preset_table().splitlines()]
    assert lines[0] == ["preset", *PRESET_FIELDS]
    assert lines[1] == "laptop 4 4 128 256 9 2400 0.004 0.0 300".split()
    assert lines[2][0] == "tiny" and lines[3][0] == "small"  # nothing else in tiny
    assert lines[-4] == ["arch", *ARCH_FIELDS]  # gpt2, llama, qwen3: all settings are columns
    assert lines[-2] == "llama rmsnorm swiglu rope False False False False False".split()


@pytest.mark.parametrize(
    ("name", "preset"), [("cuda:1", "medium"), ("cpu", "laptop"), ("abacus", "laptop")]
)
def test_the_device_that_is_given_selects_the_preset(monkeypatch, name: str, preset: str):
    """An invalid device is treated as a CPU until it is reported."""
    problems = {"abacus": ["no such device"]}
    monkeypatch.setattr(setup, "device_problems", lambda name: problems.get(name, []))
    monkeypatch.setattr(setup, "pick_device", torch.device)
    assert setup.resolve_train({"device": name})[1].preset == preset
