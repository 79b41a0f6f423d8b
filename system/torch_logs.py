"""Messages of PyTorch that mislead."""

import logging


def hide_missing_cuda() -> None:
    """Hide "No CUDA runtime is found, using CUDA_HOME=...", which PyTorch logs before it compiles,
    even for the CPU, on a machine with CUDA but without a GPU."""
    logging.getLogger("torch.utils.cpp_extension").addFilter(is_relevant)


def is_relevant(record: logging.LogRecord) -> bool:
    """Whether a message is not that one."""
    return not record.msg.startswith("No CUDA runtime is found")
