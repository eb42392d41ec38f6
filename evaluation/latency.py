"""Time to first token at every vision-token count, measured side by side."""

import statistics
import time
from collections.abc import Sequence

import torch


@torch.no_grad()
def time_to_first_token(
    model, processor, images: Sequence, question: str, counts: Sequence[int | str], repeats: int = 20
) -> dict[int | str, float]:
    """
    The median time from processed inputs to the first answer token of a batch: tower, pooling, projector and prefill.
    Counts take turns within each repeat, so that a busy machine slows all of them alike.

    Args:
        model ([`TokenFlexForConditionalGeneration`]): The model.
        processor ([`TokenFlexProcessor`]): Its processor.
        images (`Sequence[PIL.Image.Image]`): One image per prompt of the batch.
        question (`str`): The question, the same for each image.
        counts (`Sequence[int | str]`): The vision-token counts; `"auto"` takes in the choosing.
        repeats (`int`, *optional*, defaults to 20): Measurements per count, after one that is not counted.

    Returns:
        `dict[int, float]`: Milliseconds per count.
    """
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    batches = {
        count: processor(
            images=list(images),
            text=[prompt] * len(images),
            num_vision_tokens=None if isinstance(count, str) else count,
            add_special_tokens=False,
            return_tensors="pt",
        ).to(model.device)
        for count in counts
    }
    times = {count: [] for count in counts}
    for repeat in range(repeats + 1):
        for count in counts:
            _synchronise(model.device)
            start = time.perf_counter()
            named = count if isinstance(count, str) else None
            model.generate(**batches[count], num_vision_tokens=named, max_new_tokens=1, do_sample=False)
            _synchronise(model.device)
            if repeat:
                times[count].append(1000 * (time.perf_counter() - start))
    return {count: statistics.median(values) for count, values in times.items()}


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
