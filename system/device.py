"""Devices: which there are, their memory, whether bfloat16 and torch.compile work there, and how
much other programs slow down work on a CPU."""

import logging
import os
import time

import torch

from system.errors import first_line
from system.settings import UserError

BUSY = 1.5  # from this slowdown on, the CPU is busy: 1.0 if idle, 1.9 beside one busy loop


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA, else MPS, else the CPU. Raises UserError if it does
    not exist."""
    gpus = {"cuda": torch.cuda, "mps": torch.backends.mps}
    available = [*(kind for kind, gpu in gpus.items() if gpu.is_available()), "cpu"]
    if name == "auto":
        return torch.device(available[0])
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}: use cpu, cuda, cuda:1 or mps") from None
    missing_gpu = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    if device.type not in available or missing_gpu:
        have = ", ".join(available)
        raise UserError(f"no device {name!r} on this machine (it has {have}): use --device auto")
    return device


def device_problems(name: str) -> list[str]:
    """Why a device cannot be used on this machine; empty if it can."""
    try:
        pick_device(name)
    except UserError as error:
        return [str(error)]
    return []


def memory_size(device: torch.device) -> int | None:
    """The memory of a device in bytes; None if the system does not tell (Windows)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def check_memory(
    n_bytes: int, device: torch.device, what: str, advice: str = "use smaller sizes"
) -> None:
    """Raise UserError if this does not fit in the memory of the device."""
    size = memory_size(device)
    if size is not None and n_bytes > size:
        raise UserError(
            f"{what} takes about {n_bytes / 1e9:,.1f} GB, and {device.type} has {size / 1e9:,.1f} "
            f"GB: {advice}"
        )


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device (of GPUs, the current one) computes in bfloat16. NVIDIA GPUs before Ampere
    (T4, V100, RTX 20) only emulate it, slowly."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def compiler_problem(device: torch.device) -> str:
    """Why torch.compile does not work here; empty if a small function can be compiled. On a CPU, it
    needs a C++ compiler."""
    # On a machine with CUDA but without a GPU, PyTorch logs this even if it compiles for the CPU.
    log = logging.getLogger("torch.utils.cpp_extension")
    log.addFilter(lambda record: not record.msg.startswith("No CUDA runtime is found"))
    if device.type == "cpu":
        # Saves nine seconds of testing which instructions the C++ compiler supports.
        os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=device))
    except Exception as error:  # any error means that compiling does not work here
        return first_line(error)
    return ""


class CpuClock:
    """Measures how much other programs slow this process down on a CPU."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.time, self.cpu_time = time.perf_counter(), time.thread_time()

    def slowdown(self) -> float:
        """How many times as long as alone the work since the start has taken. Alone, the thread
        that trains computes all the time; beside other programs it also waits, for a core or for
        other threads of PyTorch. (Of many threads, some are idle without other programs too.)"""
        took, cpu_time = time.perf_counter() - self.time, time.thread_time() - self.cpu_time
        return took / max(cpu_time, 1e-9)
