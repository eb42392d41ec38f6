import mmap

import pytest
import torch
from PIL import Image

from tokenflex.data.synthetic import SyntheticVQA
from tokenflex.evaluation import cost
from tokenflex.evaluation.cost import measure_cost
from tokenflex.towers.tiny import tiny_model_and_processor


@pytest.fixture(scope="module")
def images():
    return [row["image"] for row in SyntheticVQA(3, 0)]


def test_every_count_is_measured_as_often_and_in_turn_at_its_own_length(narrow, images):
    model, processor = narrow
    ran = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: ran.append((kwargs["input_ids"] == model.config.image_token_id).sum(-1).tolist()),
        with_kwargs=True,
    )
    costs = measure_cost(model, processor, images, "which color?", [4, 36, 16], repeats=4, answer_tokens=3)
    handle.remove()
    assert set(costs) == {"milliseconds_to_first_token", "tokens_per_second", "peak_memory_mib"}
    for values in costs.values():
        assert list(values) == [4, 36, 16] and all(value > 0 for value in values.values())
    round_of_first, decoding = [[4] * 3, [36] * 3, [16] * 3], [[0] * 3] * 2
    assert ran == round_of_first * 5 + [step for prefill in round_of_first for step in (prefill, *decoding)]


def test_answers_have_the_length_that_is_counted(narrow, images, monkeypatch):
    model, processor = narrow
    lengths = []
    generate = model.generate

    def recorded(**inputs):
        output = generate(**inputs)
        lengths.append(output.shape[1] - inputs["input_ids"].shape[1])
        return output

    # A model that always wants to end is still measured on whole answers.
    monkeypatch.setattr(model, "generate", recorded)
    monkeypatch.setattr(model.generation_config, "eos_token_id", list(range(2, model.config.text_config.vocab_size)))
    measure_cost(model, processor, images, "which color?", [4], repeats=1, answer_tokens=5)
    assert lengths == [1, 1, 5]


def test_peak_memory_is_that_of_the_moment():
    device = torch.device("cpu")
    assert cost.reset_peak_memory(device)
    before = cost.peak_memory(device)
    with mmap.mmap(-1, 2**28) as block:  # 256 MiB, which an allocator might keep
        for _ in range(256):
            block.write(bytes(2**20))
        at_most = cost.peak_memory(device)
    assert at_most - before > 200 * 2**20
    cost.reset_peak_memory(device)
    assert cost.peak_memory(device) < at_most - 200 * 2**20


def test_memory_that_was_not_reset_is_not_shown(narrow, images, monkeypatch):
    monkeypatch.setattr(cost, "reset_peak_memory", lambda device: False)
    costs = measure_cost(*narrow, images, "which color?", [4], repeats=1, answer_tokens=2)
    assert costs["peak_memory_mib"] == {4: None}


def test_a_count_stored_for_generation_does_not_take_the_place_of_those_measured(images, monkeypatch):
    model, processor = tiny_model_and_processor(width=32)
    model.generation_config.num_vision_tokens = 16
    ran = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: ran.append((kwargs["input_ids"] == model.config.image_token_id).sum().item()),
        with_kwargs=True,
    )
    measure_cost(model.eval(), processor, images[:1], "which color?", [4, 36], repeats=1, answer_tokens=1)
    assert ran == [4, 36] * 3


@pytest.mark.parametrize("options", [{"match_aspect_ratio": True}, {"crop_to_patches": True, "max_patches": 2}])
def test_images_of_unlike_shapes_are_measured_together(options):
    model, processor = tiny_model_and_processor(width=32)
    for name, value in options.items():
        setattr(processor, name, value)
    shapes = [Image.new("RGB", size) for size in ((64, 64), (128, 32), (40, 200))]
    costs = measure_cost(model.eval(), processor, shapes, "which color?", [4, 16], repeats=1, answer_tokens=2)
    assert all(value > 0 for values in costs.values() for value in values.values())
