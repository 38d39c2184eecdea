"""What the benchmarks of Megatron share: one process on a CPU or a GPU, and a clock for each."""

import time
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_r3 import cpu


def start(device_name: str | None) -> torch.device:
    """Make this process Megatron's only rank, on the GPU where there is one unless told otherwise.

    One thread on the CPU, since the clock counts CPU time.
    """
    device = torch.device(device_name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu":
        cpu.enable()
        torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=torch.distributed.HashStore(),
        rank=0,
        world_size=1,
    )
    parallel_state.initialize_model_parallel()
    cpu.seed(0)
    return device


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Time of one call: on the GPU until it is idle, on the CPU this process's CPU time.

    CPU time, so that other programs on the machine count for less.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        torch.cuda.synchronize(device)
        return time.perf_counter() - start
    start = time.process_time()
    function()
    return time.process_time() - start


def device_name(device: torch.device) -> str:
    """What it is, for the closing JSON line."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
