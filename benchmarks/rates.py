"""The rates that this machine reaches in a bare matrix product and a bare copy."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import linear


# Rows, inner width and outer width of the matrix products that are timed: a prompt of 8 * 288 tokens through the MLP
# of Qwen2.5-7B, 32 images through SigLIP-so400m's, and a large square one; on CPUs a prompt through SmolLM2-135M's
# and Qwen2.5-0.5B's, and a square one.
CUDA_PRODUCTS = ((2304, 3584, 18944), (23328, 1152, 4304), (8192, 8192, 8192))
CPU_PRODUCTS = ((576, 576, 1536), (576, 896, 4864), (1024, 1024, 1024))
CUDA_COPY_BYTES, CPU_COPY_BYTES = 2**32, 2**28


@dataclass(frozen=True)
class Rates:
    """
    Rates that a machine reaches.

    Args:
        flops_per_second (`float`): In matrix products.
        bytes_per_second (`float`): In copies, what is read and what is written counted both.
    """

    flops_per_second: float
    bytes_per_second: float


@torch.no_grad()
def measure_rates(device: str | torch.device, dtype: torch.dtype, seconds: float = 0.3) -> Rates:
    """
    Times matrix products of model-like sizes and a copy that no processor's cache holds, and takes the best of each:
    what this machine gives while it is doing nothing else, with the number of threads that torch uses.

    Args:
        device (`str` or `torch.device`): Device to measure.
        dtype (`torch.dtype`): Of the matrices.
        seconds (`float`, *optional*, defaults to 0.3): Seconds for which to repeat each, at least three times.
    """
    device = torch.device(device)
    is_cuda = device.type == "cuda"
    flops_per_second = 0.0
    for rows, inner, outer in CUDA_PRODUCTS if is_cuda else CPU_PRODUCTS:
        inputs = torch.randn(rows, inner, device=device, dtype=dtype)
        weight = torch.randn(outer, inner, device=device, dtype=dtype)
        taken = _best_seconds(lambda: linear(inputs, weight), device, seconds)  # noqa: B023
        flops_per_second = max(flops_per_second, 2 * rows * inner * outer / taken)
    size = CUDA_COPY_BYTES if is_cuda else CPU_COPY_BYTES
    source = torch.ones(size, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    taken = _best_seconds(lambda: target.copy_(source), device, seconds)
    return Rates(flops_per_second, 2 * size / taken)


def _best_seconds(function: Callable[[], object], device: torch.device, seconds: float) -> float:
    function()
    best, repeats, start = math.inf, 0, time.perf_counter()
    while repeats < 3 or time.perf_counter() - start < seconds:
        best = min(best, _cuda_seconds(function) if device.type == "cuda" else _cpu_seconds(function))
        repeats += 1
    return best


def _cpu_seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _cuda_seconds(function: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000
