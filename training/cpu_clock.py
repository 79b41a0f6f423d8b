"""How much other programs slow a run down on a CPU."""

import time

BUSY = 1.5  # from this slowdown on, the CPU is busy: 1.0 if idle, 1.9 beside one busy loop


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
