"""Counts of operations: work that the model began to do twice again would fail here."""

import copy
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from tokenflex import at_count
from tokenflex.data.synthetic import draw_scene


# Operations that make the host wait for the device.
SYNCHRONIZING = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "item", "_unique2"}


class Operations(TorchDispatchMode):
    """Counts operations by name, and lists the sizes of the new tensors they write."""

    def __init__(self):
        super().__init__()
        self.count, self.written = Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.count[func.__name__.split(".")[0]] += 1
        if isinstance(output, torch.Tensor) and not func.is_view:
            self.written.append((func.__name__.split(".")[0], output.numel()))
        return output

    @property
    def synchronizing(self) -> int:
        return sum(number for name, number in self.count.items() if name in SYNCHRONIZING)


def encode(processor, images_per_row, count=16):
    images = [draw_scene(7, index % 5).image for index in range(sum(images_per_row))]
    text = [" and ".join([processor.image_token] * number) for number in images_per_row]
    return processor(images=images, text=text, num_vision_tokens=count, padding=True, return_tensors="pt")


def run(function, *args, **kwargs):
    with torch.no_grad(), Operations() as operations:
        output = function(*args, **kwargs)
    return output, operations


def test_the_host_waits_for_the_device_once_more_than_the_language_model_makes_it(tiny):
    model, processor = tiny
    for images_per_row in ([1], [2, 3, 1]):
        inputs, cache = encode(processor, images_per_row), DynamicCache(config=model.config)
        _, own = run(model.model.language_model, inputs["input_ids"], attention_mask=inputs["attention_mask"])
        _, operations = run(model, **inputs, past_key_values=cache, logits_to_keep=1)
        assert operations.synchronizing - own.synchronizing == 1  # the check that placeholders and features match
        step = {"attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)}
        step["input_ids"] = inputs["input_ids"][:, -1:]
        _, own = run(model.model.language_model, **step, past_key_values=copy.deepcopy(cache))
        _, operations = run(model, **step, past_key_values=cache)
        assert operations.synchronizing == own.synchronizing


@pytest.mark.parametrize("count", [4, 64, "mixed"])
def test_images_are_not_encoded_one_by_one(tiny, count):
    model, processor = tiny
    few, many = ([4, 16, 4], [4, 16, 4, 16, 4, 4]) if count == "mixed" else (count, count)
    counted = []
    for number, counts in ((3, few), (6, many)):
        pixel_values = encode(processor, [number])["pixel_values"]
        _, operations = run(model.get_image_features, pixel_values, num_vision_tokens=counts)
        counted.append(operations.count)
    assert counted[0] == counted[1]


def test_a_prompt_is_written_thrice_before_the_language_model_reads_it(tiny):
    model, processor = tiny
    inputs = encode(processor, [2, 3, 1])
    size = inputs["input_ids"].numel() * model.config.text_config.hidden_size
    seen = []
    operations = Operations()
    hook = model.model.language_model.register_forward_pre_hook(lambda *_: seen.extend(operations.written))
    with torch.no_grad(), operations:
        model(**inputs)
    hook.remove()
    assert [name for name, numel in seen if numel == size] == ["embedding", "embedding", "where"]


def test_pooling_comes_before_widening_and_the_head_reads_last_tokens_only(tiny):
    model, processor = tiny
    inputs = encode(processor, [1, 2, 1], count=4)
    read = {}
    parts = {
        "gate": model.model.multi_modal_projector.connector.gate,
        "head": model.lm_head,
        "tower": model.model.vision_tower,
    }
    hooks = [
        part.register_forward_pre_hook(lambda _, args, name=name: read.setdefault(name, []).append(args[0].shape[:-1]))
        for name, part in parts.items()
    ]
    model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    for hook in hooks:
        hook.remove()
    assert [shape.numel() for shape in read["gate"]] == [4 * 4]
    assert {shape[1:] for shape in read["head"]} == {(1,)}
    assert sum(shape[0] for shape in read["head"]) == 3 * 3
    assert [shape[0] for shape in read["tower"]] == [4]


def test_re_counting_does_not_go_through_images_or_rows(tiny):
    _, processor = tiny
    counted = []
    for images_per_row in ([1, 1], [4, 3, 4, 2, 4, 4]):
        inputs = encode(processor, images_per_row)
        _, operations = run(at_count, inputs, 36, processor, 0)
        counted.append(operations.count)
    assert counted[0] == counted[1]


def test_what_generate_adds_does_not_grow_with_images_or_tokens(tiny):
    model, processor = tiny

    def count(images_per_row, **kwargs):
        inputs = encode(processor, images_per_row)
        options = {"num_vision_tokens": 36, "do_sample": False, "max_new_tokens": 1, **kwargs}
        return run(model.generate, **inputs, **options)[1]

    few, many = count([1, 1]), count([4, 4])
    assert few.synchronizing == many.synchronizing
    assert sum(many.count.values()) == sum(few.count.values())
