"""Preparations for torch.compile."""

import logging
import os

import torch

from system.errors import first_line


def compiler_problem(device: torch.device) -> str:
    """Why torch.compile does not work here; empty if a small function can be compiled. On a CPU, it
    needs a C++ compiler."""
    logging.getLogger("torch.utils.cpp_extension").addFilter(is_relevant)
    if device.type == "cpu":
        # Saves nine seconds of testing which instructions the C++ compiler supports.
        os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=device))
    except Exception as error:  # any error means that compiling does not work here
        return first_line(error)
    return ""


def is_relevant(record: logging.LogRecord) -> bool:
    """Whether a message is not "No CUDA runtime is found, using CUDA_HOME=...", which PyTorch logs
    before it compiles, even for the CPU, on a machine with CUDA but without a GPU."""
    return not record.msg.startswith("No CUDA runtime is found")
