"""Devices: which there are, their memory, whether bfloat16 and torch.compile work there."""

import ctypes
import logging
import os
import sys

import torch

from system.settings import UserError, first_line


def has_mps() -> bool:
    """Whether MPS works. Virtual machines have it without memory for it."""
    try:
        return torch.backends.mps.is_available() and bool(torch.ones(1, device="mps"))
    except RuntimeError:
        return False


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto`: CUDA, else MPS, else CPU. Raises UserError if missing."""
    available = ["cuda"] * torch.cuda.is_available() + ["mps"] * has_mps() + ["cpu"]
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
    """The memory of a device in bytes; None if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if sys.platform == "win32":
        kilobytes = ctypes.c_ulonglong()
        ctypes.windll.kernel32.GetPhysicallyInstalledSystemMemory(ctypes.byref(kilobytes))
        return 1024 * kilobytes.value or None  # 0 in some virtual machines
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
    """Why torch.compile does not work here; empty if it does. On a CPU, it needs a C++ compiler."""
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
