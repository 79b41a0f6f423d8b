"""How much memory a device has, and whether something fits."""

import os

import torch

from config import UserError


def memory_size(device: torch.device) -> int | None:
    """The memory of a device in bytes; None if the system does not tell (Windows)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def check_memory(n_bytes: int, device: torch.device, what: str) -> None:
    """Raise UserError if this does not fit in the memory of the device."""
    size = memory_size(device)
    if size is not None and n_bytes > size:
        raise UserError(
            f"{what} takes about {n_bytes / 1e9:,.1f} GB, and {device.type} has {size / 1e9:,.1f} "
            "GB: use smaller sizes"
        )
