"""The paths on a GPU without one, on fake tensors: they have a shape, a type and a device but no
numbers, and an operation on tensors of two devices raises."""

import ctypes
import itertools
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import COMPONENTS
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config import OPTIMIZERS, GPTConfig, SampleConfig, TrainConfig
from corpus.corpus import Corpus
from experiments import bench
from experiments.timing import Row, to_table
from generate import Step, generate
from model import GPT
from sampling import beam_search
from sampling.compiled import compile_step
from sampling.quantize import lower_precision
from tokenizer import CharTokenizer
from train import Trainer
from training.task import Pretraining

SIZES = {"vocab_size": 11, "block_size": 12, "n_layer": 2, "n_head": 2, "n_embd": 16}
SOME = [{}, {"token_shift": True}, {"pos": "learned"}]
CPU = torch.device("cpu")
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}
# PyTorch has a guard, which selects the current device, for each kind. This one does nothing.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10::impl;
static NoOpDeviceGuardImpl<c10::DeviceType::{0}> guard;
static DeviceGuardImplRegistrar registrar(c10::DeviceType::{0}, &guard);
"""


class Operations(TorchDispatchMode):
    """Records the operations: the devices and types of their results, and how often a number is
    read, for which the host would wait. A number that is read is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.reads: list[str] = []
        self.results: set[tuple[str, torch.dtype]] = set()
        self.copies: list[tuple[bool, bool]] = []  # to a GPU: from pinned memory, without waiting

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        name = func._schema.name
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name in READS:
            self.reads.append(name)
            if name == "aten::_local_scalar_dense" and tensors[0].device != CPU:
                dtype = tensors[0].dtype
                return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        if name == "aten::_to_copy" and kwargs.get("device", CPU) != CPU == tensors[0].device:
            pinned = getattr(tensors[0], "pinned", False)
            self.copies.append((pinned, kwargs.get("non_blocking", False)))
        result = func(*args, **(kwargs or {}))
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.results |= {(t.device.type, t.dtype) for t in outputs}
        return result


@pytest.fixture(scope="module")
def guards(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Lets PyTorch name devices that it was not built for."""
    built = {"CUDA": torch.backends.cuda.is_built(), "MPS": torch.backends.mps.is_built()}
    if not (compiler := shutil.which("g++")):
        pytest.skip("needs a C++ compiler")
    folder, torch_folder = tmp_path_factory.mktemp("guards"), Path(torch.__file__).parent
    flags = f"-shared -fPIC -std=c++20 -I{torch_folder}/include -L{torch_folder}/lib".split()
    for name in (name for name in built if not built[name]):
        (folder / f"{name}.cpp").write_text(GUARD.format(name))
        command = [compiler, *flags, f"{name}.cpp", "-lc10", f"-o{name}.so"]
        subprocess.run(command, cwd=folder, check=True)
        ctypes.CDLL(str(folder / f"{name}.so"))


def stand_in_for_backward(parameters: list[nn.Parameter]) -> Any:
    """Gradients of a loss without autograd's engine, which needs the streams of a real device."""

    def backward(loss: Tensor) -> None:
        assert loss.requires_grad and loss.dim() == 0
        for p in parameters:
            p.grad = torch.ones_like(p) if p.grad is None else p.grad + 1

    return backward


def math_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """PyTorch's attention by its formula."""
    formula = torch.ops.aten._scaled_dot_product_attention_math
    return formula(q, k, v, mask, is_causal=is_causal)[0]


def pin_memory(tensor: Tensor) -> Tensor:
    """Fake tensors have no memory to pin."""
    tensor.pinned = True
    return tensor


@pytest.fixture(params=["cuda", "mps"])
def gpu(
    request: pytest.FixtureRequest, guards: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[torch.device]:
    """A device that PyTorch takes for a GPU."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(nn.Module, "to", lambda module, device: module)  # see `make_fake`
    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    if request.param == "mps":  # PyTorch selects its kernel by code that only exists there
        monkeypatch.setattr(F, "scaled_dot_product_attention", math_attention)
    with FakeTensorMode():
        yield torch.device(request.param)


def make_fake(gpu: torch.device, settings: dict[str, Any]) -> GPT:
    """A model that is on the device from the start: fake parameters cannot be moved."""
    with gpu:
        return GPT(GPTConfig(**SIZES | {"n_layer": 1} | settings))


def fake_trainer(gpu: torch.device, gpt: dict[str, Any], **settings: Any) -> Trainer:
    config = TrainConfig(batch_size=2, compile=False, max_steps=10, **settings)
    ids = (np.arange(100) % 11).astype(np.uint8)
    corpus = Corpus(ids, ids, {"name": "numbers"}, 100, 100, separator=3)
    tokenizer = CharTokenizer([chr(i) for i in range(11)])
    task = Pretraining(corpus, tokenizer, SIZES["block_size"], config, gpu)
    return Trainer(make_fake(gpu, gpt), task, config, gpu)


PRECISIONS = ("float32", "bfloat16", "float16")
HARD = {"grad_accum": 2, "doc_mask": True, "grow_windows": True, "grad_checkpoint": True}
TRAININGS = [(components, {"optimizer": "muon"}) for components in COMPONENTS]
TRAININGS += [({}, {"optimizer": name, "grad_clip": 0.0}) for name in OPTIMIZERS]
TRAININGS += [
    ({"dropout": 0.1, "token_shift": True}, HARD | {"precision": precision, "optimizer": optimizer})
    for precision, optimizer in itertools.product(PRECISIONS, OPTIMIZERS)
]


@pytest.mark.parametrize(("components", "settings"), TRAININGS, ids=str)
def test_training_on_a_gpu(gpu, monkeypatch, components, settings):
    default = "bfloat16" if gpu.type == "cuda" else "float32"
    trainer = fake_trainer(gpu, components, **{"precision": default} | settings)
    precision = trainer.config.precision
    backward = stand_in_for_backward(list(trainer.model.parameters()))
    monkeypatch.setattr(Tensor, "backward", backward)
    with Operations() as operations:
        for trainer.step in (0, 8):  # short windows and long ones
            metrics = trainer.train_step()
    assert {t.device.type for t in metrics.values()} == {gpu.type}
    # Only a copy from pinned memory can be waited for by the GPU alone; on MPS, it is not.
    assert set(operations.copies) == {(True, True) if gpu.type == "cuda" else (False, False)}
    for optimizer in trainer.optimizers.values():
        for state in optimizer.state.values():
            assert {t.device.type for t in state.values() if t.dim()} == {gpu.type}
    assert ("mps", torch.float64) not in operations.results  # MPS has none
    assert (gpu.type, getattr(torch, precision)) in operations.results
    assert trainer.scaler.is_enabled() == (precision == "float16")
    assert operations.reads == [] or precision == "float16"
    with operations:
        metrics["loss"].item()
    assert operations.reads[-1] == "aten::_local_scalar_dense"  # so it would be found


FILTERS = {"top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2}
SAMPLINGS = [(components, {}) for components in COMPONENTS]
SAMPLINGS += [(components, {"compile": True}) for components in SOME]
SAMPLINGS += [
    ({"token_shift": True}, FILTERS | {"precision": precision, "cache": cache})
    for precision, cache in itertools.product((*PRECISIONS, "int8"), (False, True))
]


@pytest.mark.parametrize(("components", "settings"), SAMPLINGS, ids=str)
def test_sampling_on_a_gpu(gpu, monkeypatch, components, settings):
    monkeypatch.setattr("sampling.compiled.compile_step", lambda step, device: step)
    model = make_fake(gpu, components).eval()
    config = SampleConfig(num_samples=3, max_new_tokens=11, seed=0, **settings)
    lower_precision(model, config.precision)
    prompt = torch.zeros(4, dtype=torch.long, device=gpu)
    with Operations() as operations:
        for step in generate(model, prompt, config, ends=[2]):
            assert {t.device.type for t in step} == {gpu.type}
            assert [t.shape for t in step] == [(3,), (3, 11), (3, 11)]
    assert ("mps", torch.float64) not in operations.results


@pytest.mark.parametrize("components", SOME, ids=str)
def test_beams_on_a_gpu(gpu, components):
    model = make_fake(gpu, components).eval()
    prompt = torch.zeros(4, dtype=torch.long, device=gpu)
    with Operations() as operations:
        texts = beam_search.beam_search(model, prompt, beams=3, n_new=11, ends=[2])
    assert [len(ids) for _, ids in texts] == [11, 11, 11]
    assert ("mps", torch.float64) not in operations.results


def test_an_operation_on_two_devices_is_found(gpu):
    model = make_fake(gpu, {})
    with pytest.raises(RuntimeError, match="cpu"):
        model(torch.zeros(1, 4, dtype=torch.long))


# --- waiting for the device, counted on a CPU


def cpu_trainer(**settings: Any) -> Trainer:
    """A trainer whose streams are tensors, as on a GPU."""
    trainer = fake_trainer(CPU, {}, precision="float32", **settings)
    trainer.task.train_ids = torch.from_numpy(trainer.task.corpus.train_ids.astype(np.int32))
    return trainer


def test_evaluations_are_not_compiled():
    """Otherwise each shape of the evaluations and of the sample would be compiled."""
    trainer = cpu_trainer()
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append([t.shape for t in inputs])
        return graph.forward

    trainer.model.compile(backend=backend)
    with trainer.eval_mode():
        trainer.task.evaluate(trainer.model)
    assert compiled == []
    trainer.train_step()
    assert compiled != []


@pytest.mark.parametrize(("optimizer", "limit"), [("adamw", 60), ("muon", 260)])
def test_a_step_does_little_besides_the_model(monkeypatch, optimizer, limit):
    """An operation takes the host of a GPU about five microseconds, a walk through the modules of
    `medium` 100, so small models would wait for them."""
    trainer = cpu_trainer(optimizer=optimizer)
    gradients = [torch.ones_like(p) for p in trainer.params]

    def backward(loss: Tensor) -> None:
        for p, gradient in zip(trainer.params, gradients, strict=True):
            p.grad = gradient

    loss = torch.ones((), requires_grad=True)
    monkeypatch.setattr(trainer.task, "loss", lambda net, *batch: {"loss": loss})
    monkeypatch.setattr(Tensor, "backward", backward)
    trainer.train_step()
    monkeypatch.setattr(nn.Module, "named_modules", None)
    with Operations() as operations:
        trainer.train_step()
    assert 30 < operations.count < limit


def test_the_compiler_pads_odd_vocabularies():
    assert torch._inductor.config.shape_padding
    assert bench.MODELS["124 M"]["vocab_size"] == 50257  # as GPT-2's tokenizer has


# --- CUDA graphs, whose results are in the same memory at each step, on a CPU


def train_as_with_cuda_graphs(grad_accum: int) -> Tensor:
    """The losses of steps whose forward passes overwrite earlier results and gradients with NaN."""
    torch.manual_seed(0)
    trainer = cpu_trainer(optimizer="muon", grow_windows=True, grad_accum=grad_accum)
    results: list[Tensor] = []

    def overwrite(model: nn.Module, inputs: Any) -> None:
        for result in results:
            result.fill_(torch.nan)
        results.clear()

    def keep(model: nn.Module, inputs: Any, outputs: Any) -> None:
        results.extend(t.detach() for t in tree_leaves(outputs) if isinstance(t, Tensor))

    trainer.model.register_forward_pre_hook(overwrite)
    trainer.model.register_forward_hook(keep)
    for parameter in trainer.model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: results.append(p.grad))
    return torch.stack([trainer.train_step()["loss"] for _ in range(7)])


def test_a_step_reads_no_result_of_the_step_before():
    assert train_as_with_cuda_graphs(grad_accum=1).isfinite().all()


def test_gradients_of_two_micro_steps_cannot_be_summed_in_reused_memory():
    """Why `compile_model` uses no CUDA graphs then."""
    losses = train_as_with_cuda_graphs(grad_accum=2)
    assert losses[0].isfinite() and losses[1:].isnan().all()


def test_sampled_steps_outlive_the_memory_of_their_cuda_graph(monkeypatch):
    """Which every step writes its results to; on a CPU, there are no graphs."""
    compile_options, memory = [], torch.zeros(2)

    def compiled(step: Any, fullgraph: bool, options: dict[str, Any]) -> Any:
        compile_options.append(options["triton.cudagraphs"])
        return lambda: Step(*memory.add_(1), memory)

    monkeypatch.setattr(torch, "compile", compiled)
    step = compile_step(compiled, torch.device("cuda"))
    first, second = step(), step()
    assert [t.sum().item() for t in (*first, *second)] == [1, 1, 2, 2, 2, 4]
    assert compile_step(compiled, CPU)()[2] is memory and compile_options == [True, False]


# --- the benchmark


def test_the_benchmark_checks_and_measures_a_tiny_model_on_the_cpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["gpu"]) == 0
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("| no GPU") and torch.__version__ in head
    rows = dict(line.strip("| ").split(" | ") for line in lines)
    assert "WRONG" not in str(rows)
    assert rows["losses of 50 steps, float32"] == "within 0 of the CPU's in float32"
    assert 0 < float(rows["losses of 50 steps, bfloat16"].split()[1]) < 0.05
    assert rows["resumed run"] == rows["ddp run"] == "weights within 0"
    assert rows["sampling in float32"] == "equals the CPU's"
    step = r"[\d,]+ tokens/s, [\d.]+ ms/step, [\d,]+ of [\d,]+ GFLOP/s \(MFU \d+%\), [\d,]+ MB"
    assert re.match(step, rows["training, toy"])
    assert re.match(r"8 x [\d,]+ tokens/s, 0.1 MB per token", rows["sampling toy, batch size 8"])
    assert re.fullmatch(r"\d+\.\d\d ms", rows["step without the model, muon"])
    assert rows["CUDA graphs, toy"].startswith("losses within 0, ")


def test_a_difference_is_marked_in_the_table(monkeypatch):
    results = iter([torch.zeros(50), *(torch.full((50,), x) for x in (0.002, 0.04, 0.06))])
    monkeypatch.setattr(bench, "losses", lambda trainer, n: next(results))
    rows = bench.check_losses(CPU)
    assert [row.problem for row in rows] == [True, False, True]
    assert "WRONG: within 0.002" in to_table(rows)
    monkeypatch.setattr(bench, "losses", lambda trainer, n: None)
    monkeypatch.setattr(bench, "sample", lambda *args: torch.rand(3, 50))
    assert bench.check_sampling(CPU)[0].problem


def test_the_other_rows_are_measured_after_an_error():
    def fail(message: str) -> list[Row]:
        raise torch.OutOfMemoryError(message)

    rows = bench.attempt("run", fail, "out of memory\nTried to allocate")
    assert rows == [Row("run", "out of memory", True)]
