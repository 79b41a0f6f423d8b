"""How much other programs slow a run down on a CPU."""

import time

import torch

BUSY = 1.6  # the CPU is busy if work takes this many times as long as alone; if idle 1.0 to 1.3


class CpuClock:
    """Measures how much other programs slow this process down on a CPU."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.time, self.cpu_time = time.perf_counter(), time.process_time()

    def slowdown(self) -> float:
        """How many times as long as alone the work since the start has taken: alone, all threads
        of PyTorch would use their cores all the time."""
        took, cpu_time = time.perf_counter() - self.time, time.process_time() - self.cpu_time
        return took * torch.get_num_threads() / max(cpu_time, 1e-9)
