"""vLLM's engine as a reader of TokenFLEX checkpoints, beside transformers: run by `make test-vllm`."""

import os
from importlib.util import find_spec

import pytest


if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

# The engine in a process of its own: it changes classes of transformers, which the reference uses.
os.environ |= {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
TABLE = [("checkpoint", "asked for", "prompt tokens", "prompt and answer", "log probabilities differ by")]


@pytest.fixture
def compared():
    """The lines of the table at the end: what was compared, and with what outcome."""
    return TABLE


def pytest_terminal_summary(terminalreporter):
    if TABLE[1:]:
        terminalreporter.section("vLLM beside transformers' generate, greedy")
        widths = [max(len(str(line[i])) for line in TABLE) for i in range(len(TABLE[0]))]
        for line in TABLE:
            terminalreporter.write_line("  ".join(str(cell).ljust(width) for cell, width in zip(line, widths)))
