"""The cost of an answer at every vision-token count: time to first token, tokens per second, peak memory."""

import platform
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from ..inference.decoding import GREEDY


def describe_machine(model, processor) -> dict[str, str | int]:
    """
    Describes what scores and costs were measured with: `device`, `threads`, `torch`, `transformers` and
    `image_processor`.

    Args:
        model ([`TokenFlexForConditionalGeneration`]): The model.
        processor ([`TokenFlexProcessor`]): Its processor.
    """
    return {
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "image_processor": type(processor.image_processor).__name__,
    }


@torch.no_grad()
def measure_cost(
    model,
    processor,
    images: Sequence,
    question: str,
    counts: Sequence[int | str],
    repeats: int = 20,
    answer_tokens: int = 16,
) -> dict[str, dict[int | str, float | None]]:
    """
    Asks one question about a batch of images at every count. Counts take turns within each repeat, so that a busy
    machine slows all of them alike.

    Args:
        model ([`TokenFlexForConditionalGeneration`]): The model.
        processor ([`TokenFlexProcessor`]): Its processor.
        images (`Sequence[PIL.Image.Image]`): One image per prompt of the batch.
        question (`str`): The question, the same for each image.
        counts (`Sequence[int | str]`): The vision-token counts; `"auto"` takes in the choosing.
        repeats (`int`, *optional*, defaults to 20):
            Number of times to time the first token, after once that is not counted; whole answers a quarter as often.
        answer_tokens (`int`, *optional*, defaults to 16): Length of the answers for tokens per second and memory.

    Returns:
        `dict[str, dict[int | str, float | None]]`: For each count, `milliseconds_to_first_token`, the median time from
        processed inputs to the first answer token of the batch (tower, pooling, projector and prefill);
        `tokens_per_second`, the batch's answer tokens over the median time of whole answers; `peak_memory_mib`, what
        the device held at most while answering, weights included: of a GPU what torch had allocated, of a CPU the
        resident memory of the process; `None` where the system does not say (only CUDA and Linux do).
    """
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    batches = {
        count: processor(
            images=list(images),
            text=[prompt] * len(images),
            num_vision_tokens=None if count == "auto" else count,
            padding=True,
            return_tensors="pt",
        ).to(model.device)
        for count in counts
    }

    def answer(count: int | str, length: int) -> float:
        """The seconds that an answer of exactly `length` tokens takes."""
        synchronize(model.device)
        start = time.perf_counter()
        options = {"max_new_tokens": length, "min_new_tokens": length, **GREEDY}
        model.generate(**batches[count], num_vision_tokens=count, **options)
        synchronize(model.device)
        return time.perf_counter() - start

    first, whole, memory = ({count: [] for count in counts} for _ in range(3))
    for repeat in range(repeats + 1):
        for count in counts:
            seconds = answer(count, 1)
            if repeat:
                first[count].append(1000 * seconds)
    for _ in range(max(1, repeats // 4)):
        for count in counts:
            is_reset = reset_peak_memory(model.device)
            whole[count].append(answer(count, answer_tokens))
            memory[count].append(peak_memory(model.device) if is_reset else None)
    return {
        "milliseconds_to_first_token": {count: statistics.median(values) for count, values in first.items()},
        "tokens_per_second": {
            count: len(images) * answer_tokens / statistics.median(values) for count, values in whole.items()
        },
        "peak_memory_mib": {
            count: None if None in values else statistics.median(values) / 2**20 for count, values in memory.items()
        },
    }


def synchronize(device: torch.device) -> None:
    """
    Waits until a GPU has done what it was given.

    Args:
        device (`torch.device`): Any device; only CUDA's are waited for.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> bool:
    """
    Lets [`peak_memory`] begin anew.

    Args:
        device (`torch.device`): The device.

    Returns:
        `bool`: `True` if it could be reset: on CUDA, and for the memory of this process on Linux.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:  # https://docs.kernel.org/filesystems/proc.html: 5 resets the peak of the resident set
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return device.type == "cpu"


def peak_memory(device: torch.device) -> int | None:
    """
    Reads the most memory that was held since [`reset_peak_memory`].

    Args:
        device (`torch.device`): The device.

    Returns:
        `int`, *optional*: In bytes: of a GPU what torch had allocated, else the resident memory of the process; `None`
        where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * int(peak[1]) if peak else None
