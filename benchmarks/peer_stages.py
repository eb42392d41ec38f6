"""
Measurements of a pair.

Processing makes a model's inputs of images in memory and prompts. Hooks divide one forward pass into tower, pooling
with projector (and pixel shuffle, in InternVL), and prefill, which is all the rest of the pass: embeddings, placing
the features, language model with its cache, and the head on the last token. The time to first token is that of a whole
call of `generate(max_new_tokens=1)` from processed inputs. Decoding is what follows the first pass of the language
model in a call of 32 tokens. Throughput is processing and a call of 16 tokens. A training step is forward, backward
and AdamW with the tower frozen and text as labels. Memory is weights and inputs, and what a call of one token adds to
them at its peak.
"""

import contextlib
import ctypes
import gc
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from limits import (
    Rates,
    Work,
    activation_bytes,
    cache_bytes,
    decode_work,
    limit_seconds,
    prefill_work,
    projector_work,
    tower_work,
    training_work,
    weight_bytes,
)
from peer_models import Contender
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokenflex.evaluation.cost import peak_memory, reset_peak_memory, synchronize


# The stages that one measurement yields.
STAGES = {
    "processing": ["processing"],
    "forward": ["tower", "projector", "prefill"],
    "first_token": ["first_token"],
    "decode": ["decode"],
    "throughput": ["throughput"],
    "training": ["training"],
    "memory": ["memory"],
}
DECODED, ANSWERED = 32, 16
# The most images in a batch that a measurement is made with; those that are not named are made with any number.
MOST_IMAGES = {"first_token": 32, "decode": 32, "throughput": 32, "training": 8}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
# The share of the rounds that is taken with up to so many images in a batch.
SHARES = ((1, 1.0), (8, 0.6), (math.inf, 0.2))


class Moments:
    """
    Times at which the first pass in the block begins and ends, and in it those of tower and projector.

    Args:
        contender ([`Contender`]): The contender to time.
    """

    def __init__(self, contender: Contender):
        self.contender, self.at, self.handles = contender, {}, []

    def __enter__(self) -> "Moments":
        model, tower, projector = self.contender.model, self.contender.tower, self.contender.projector
        for module, begins, ends in (
            (model, "forward", "forwarded"),
            (tower, "tower", "encoded"),
            (projector, "encoded", "projected"),  # a projector within the tower begins where encoding ends
        ):
            self.handles.append(module.register_forward_pre_hook(lambda *_, name=begins: self.mark(name)))
            self.handles.append(module.register_forward_hook(lambda *_, name=ends: self.mark(name)))
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def mark(self, name: str) -> None:
        if name in self.at:
            return
        if self.contender.model.device.type == "cuda":
            self.at[name] = torch.cuda.Event(enable_timing=True)
            self.at[name].record()
        else:
            self.at[name] = time.perf_counter()

    def seconds(self, begins: str, ends: str) -> float:
        if self.contender.model.device.type == "cuda":
            torch.cuda.synchronize()
            return self.at[begins].elapsed_time(self.at[ends]) / 1000
        return self.at[ends] - self.at[begins]


def encode(contender: Contender, photos: Sequence[Image.Image], batch_size: int):
    """Processed inputs where the model is, in its dtype."""
    return contender.encode(photos, batch_size).to(contender.model.device, contender.model.dtype)


@torch.no_grad()
def generate(contender: Contender, inputs, length: int, **options) -> torch.Tensor:
    return contender.model.generate(**inputs, max_new_tokens=length, min_new_tokens=length, **options)


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def measure_processing(contender: Contender, photos, batch_size: int) -> dict[str, float]:
    return {"processing": seconds_of(lambda: contender.encode(photos, batch_size), torch.device("cpu"))}


@torch.no_grad()
def measure_forward(contender: Contender, inputs) -> dict[str, float]:
    with Moments(contender) as moments:
        contender.model(**inputs, logits_to_keep=1, use_cache=True)
    tower, projector = moments.seconds("tower", "encoded"), moments.seconds("encoded", "projected")
    prefill = moments.seconds("forward", "forwarded") - tower - projector
    return {"tower": tower, "projector": projector, "prefill": prefill}


def measure_first_token(contender: Contender, inputs) -> dict[str, float]:
    return {"first_token": seconds_of(lambda: generate(contender, inputs, 1), contender.model.device)}


def measure_decode(contender: Contender, inputs) -> dict[str, float]:
    with Moments(contender) as moments:
        generate(contender, inputs, DECODED)
        moments.mark("end")
    return {"decode": moments.seconds("forwarded", "end")}


def measure_throughput(contender: Contender, photos, batch_size: int) -> dict[str, float]:
    def answer():
        generate(contender, encode(contender, photos, batch_size), ANSWERED)

    return {"throughput": seconds_of(answer, contender.model.device)}


@contextlib.contextmanager
def returned_memory() -> Iterator[None]:
    """
    Lets glibc give back every block of some size as soon as it is freed, so that what a process holds does not depend
    on what it held before. Afterwards the thresholds are those that glibc itself arrives at where large blocks come
    and go.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" and platform.libc_ver()[0] == "glibc" else None
    if libc is None:
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, 2**16)
    libc.malloc_trim(0)
    yield
    libc.mallopt(M_MMAP_THRESHOLD, 2**25)
    libc.mallopt(M_TRIM_THRESHOLD, 2**26)


def measure_memory(contender: Contender, inputs) -> dict[str, float]:
    """In bytes; `nan` where the system does not say."""
    device = contender.model.device
    gc.collect()
    with returned_memory():
        if not reset_peak_memory(device):
            return {"memory": float("nan")}
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else peak_memory(device)
        generate(contender, inputs, 1)
        synchronize(device)
        added = peak_memory(device) - before
    held = sum(parameter.nbytes for parameter in contender.model.parameters())
    held += sum(value.nbytes for value in inputs.values() if isinstance(value, torch.Tensor))
    return {"memory": held + added}


class Training:
    """Steps of a model whose tower is frozen, on one batch."""

    def __init__(self, contender: Contender, inputs):
        self.contender = contender
        projector = set(contender.projector.parameters())
        for parameter in contender.tower.parameters():
            parameter.requires_grad_(parameter in projector)
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == contender.image_token_id, -100)
        self.inputs = {**inputs, "labels": labels, "use_cache": False}
        trained = [parameter for parameter in contender.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6)

    def step(self) -> dict[str, float]:
        model = self.contender.model.train()

        def step():
            model(**self.inputs).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

        seconds = seconds_of(step, model.device)
        model.eval()
        return {"training": seconds}


def prepare(measurement: str, contender: Contender, photos, batch_size: int) -> Callable[[], dict[str, float]]:
    """A measurement of one contender that can be repeated; what it needs is made before."""
    if measurement == "processing":
        return lambda: measure_processing(contender, photos, batch_size)
    if measurement == "throughput":
        return lambda: measure_throughput(contender, photos, batch_size)
    inputs = encode(contender, photos, batch_size)
    if measurement == "training":
        return Training(contender, inputs).step
    measure = {
        "forward": measure_forward,
        "first_token": measure_first_token,
        "decode": measure_decode,
        "memory": measure_memory,
    }[measurement]
    return lambda: measure(contender, inputs)


def alternate(functions: dict, rounds: int, warmup: int = 1) -> dict:
    """
    Calls each in turn, round by round, forwards and backwards by turns, so that what slows the machine down slows all.

    Returns:
        `dict`: The values that each returned, in the rounds behind those that warm up.
    """
    records = {name: [] for name in functions}
    for number in range(-warmup, rounds):
        for name in list(functions)[:: -1 if number % 2 else 1]:
            record = functions[name]()
            if number >= 0:
                records[name].append(record)
    return records


def choose_rounds(measurement: str, num_images: int, rounds: int) -> tuple[int, int]:
    """
    Rounds that are timed, the fewer the larger the batch and none where a measurement is not made, and rounds before
    them that warm up.
    """
    if num_images > MOST_IMAGES.get(measurement, num_images):
        return 0, 0
    if measurement == "memory":
        return min(rounds, 2 if num_images <= 32 else 1), int(num_images <= 32)
    share = next(share for most, share in SHARES if num_images <= most)
    return math.ceil(rounds * share), int(num_images <= 32)


def count_flops(function: Callable[[], object]) -> int:
    """Floating-point operations of what runs, by torch's own counter."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def count_work(
    contender: Contender, count: int, batch_size: int, num_images: int, length: int
) -> dict[str, list[Work]]:
    """Of TokenFLEX, the parts of each stage that run one after the other."""
    config, bytes_per_value = contender.config, contender.model.dtype.itemsize
    images, text = batch_size * num_images, config.text_config
    tower = [tower_work(config.vision_config, images, bytes_per_value)]
    projector = [projector_work(config, images, count, bytes_per_value)]
    prefill = [prefill_work(text, batch_size, length, bytes_per_value)]

    def steps(number: int) -> Work:
        return number * decode_work(text, batch_size, length + (number - 1) // 2, bytes_per_value)  # the mean context

    text_tokens = length - num_images * count
    training = training_work(config, batch_size, num_images, count, text_tokens, bytes_per_value)
    return {
        "tower": tower,
        "projector": projector,
        "prefill": prefill,
        "first_token": tower + projector + prefill,
        "decode": [steps(DECODED - 1)],
        "throughput": [*tower, *projector, *prefill, steps(ANSWERED - 1)],
        "training": [training],
    }


def count_limits(
    contender: Contender, count: int, batch_size: int, num_images: int, length: int, rates: Rates
) -> dict[str, dict]:
    """
    Of TokenFLEX, for each stage its operations `flops`, its `bytes`, and the `least` seconds that they take one part
    after the other; for `memory` the `least` bytes of weights, cache and activations. Processing has none.
    """
    limits = {}
    for stage, works in count_work(contender, count, batch_size, num_images, length).items():
        total = sum(works, Work())
        seconds = sum(limit_seconds(work, rates) for work in works)
        limits[stage] = {"flops": total.flops, "bytes": total.bytes, "least": seconds}
    config, bytes_per_value = contender.config, contender.model.dtype.itemsize
    text_tokens = length - num_images * count
    held = weight_bytes(config, bytes_per_value) + cache_bytes(config.text_config, batch_size, length, bytes_per_value)
    activations = activation_bytes(config, batch_size, num_images, count, text_tokens, bytes_per_value)
    limits["memory"] = {"least": held + activations}
    return limits
