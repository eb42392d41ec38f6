import copy
import functools

import accelerate
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from tokenflex.data.synthetic import draw_scene
from tokenflex.prefill_tokenflex import group_by_length
from tokenflex.towers.tiny import tiny_model_and_processor


IMAGES = [draw_scene(3, index).image for index in range(6)]
COUNTS = [64, 4, 16, 64, 36, 4]
QUESTIONS = ["which color?", "which color?", "how tall is the red bar?", "hi", "which color?", "hi"]


def encode(processor, rows, counts=COUNTS):
    text = [f"{processor.image_token} {QUESTIONS[row]}" for row in rows]
    images, counts = [IMAGES[row] for row in rows], [counts[row] for row in rows]
    return processor(images=images, text=text, num_vision_tokens=counts, padding=True, return_tensors="pt")


def generate(model, inputs, **kwargs):
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True, **kwargs}
    return model.generate(**inputs, **options)


@pytest.fixture
def calls(tiny):
    """The shape of each call of the language model."""
    shapes = []
    language_model = tiny[0].model.language_model
    hook = language_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    yield shapes
    hook.remove()


@given(st.lists(st.integers(1, 500), min_size=1, max_size=30), st.sampled_from([0, 100, 10_000]))
def test_no_row_is_padded_much_unless_that_is_quicker(lengths, min_tokens):
    groups = group_by_length(lengths, min_tokens)
    assert sorted(row for rows in groups for row in rows) == list(range(len(lengths)))
    for rows in groups:
        longest = max(lengths[row] for row in rows)
        assert lengths[rows[0]] == longest
        if not min_tokens:
            assert all(longest <= 1.05 * lengths[row] for row in rows)
    costs = [
        sum(max(lengths[rows[0]] * len(rows), min_tokens) for rows in found)
        for found in (groups, group_by_length(lengths))
    ]
    assert costs[0] <= costs[1]


def test_a_mixed_batch_costs_the_sum_of_its_parts(tiny):
    model, processor = tiny

    def count_flops(rows):
        inputs = encode(processor, rows)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            generate(model, inputs, max_new_tokens=1, min_new_tokens=1)
        return counter.get_total_flops()

    rows = range(len(COUNTS))
    assert count_flops(rows) <= 1.05 * sum(count_flops([row]) for row in rows)


def test_rows_of_like_length_are_prefilled_together(tiny, calls):
    model, processor = tiny
    passes = []
    hook = model.model.vision_tower.register_forward_hook(lambda *_: passes.append(1))
    generate(model, encode(processor, range(6)))
    hook.remove()
    lengths = encode(processor, range(6))["attention_mask"].sum(-1).tolist()
    groups = group_by_length(lengths)
    assert 2 < len(groups) < 6
    assert calls[: len(groups)] == [(len(rows), lengths[rows[0]]) for rows in groups]
    assert calls[len(groups) :] == [(6, 1)] * 3
    assert len(passes) == 1


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_apart_or_padded_the_answers_are_the_same(tiny, monkeypatch, options):
    model, processor = tiny
    inputs = encode(processor, range(6))
    torch.manual_seed(0)
    apart = generate(model, inputs, **options)
    monkeypatch.setattr(type(model), "_group_rows", lambda *_: [])
    torch.manual_seed(0)
    padded = generate(model, inputs, **options)
    assert torch.equal(apart.sequences, padded.sequences)
    torch.testing.assert_close(torch.stack(apart.logits), torch.stack(padded.logits), atol=1e-4, rtol=0)
    if not options:
        mask = inputs["attention_mask"].bool()
        for layer, expected in zip(apart.past_key_values.layers, padded.past_key_values.layers):
            for states, expected_states in [(layer.keys, expected.keys), (layer.values, expected.values)]:
                assert states.shape == expected_states.shape
                states, expected_states = states.transpose(1, 2), expected_states.transpose(1, 2)
                length = mask.shape[1]
                torch.testing.assert_close(
                    states[:, :length][mask], expected_states[:, :length][mask], atol=1e-4, rtol=0
                )
                torch.testing.assert_close(states[:, length:], expected_states[:, length:], atol=1e-4, rtol=0)


def test_a_conversation_goes_on_behind_a_mixed_batch(tiny):
    model, processor = tiny
    inputs = encode(processor, [0, 1])
    first = generate(model, inputs)
    more = torch.tensor([[36, 37], [38, 39]])
    ids = torch.cat([first.sequences, more], dim=-1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, ids.shape[1] - inputs["input_ids"].shape[1])], dim=-1)
    options = {"input_ids": ids, "attention_mask": mask.long()}
    cached = generate(model, options, past_key_values=first.past_key_values)
    images = {name: inputs[name] for name in ("pixel_values", "vision_token_grids")}
    again = generate(model, {**options, **images})
    assert torch.equal(cached.sequences, again.sequences)


def test_the_callers_own_cache_is_filled(tiny):
    model, processor = tiny
    cache = DynamicCache(config=model.config)
    inputs = encode(processor, [0, 1])
    output = generate(model, inputs, past_key_values=cache)
    assert output.past_key_values is cache
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 3


STAY_TOGETHER = {
    "equal counts": {"num_vision_tokens": 16},
    "static cache": {"cache_implementation": "static"},
    "hidden states": {"output_hidden_states": True},
    "no cache": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 1000},
}


@pytest.mark.parametrize("name", STAY_TOGETHER)
def test_what_cannot_be_joined_is_prefilled_at_once(tiny, calls, name):
    model, processor = tiny
    inputs = encode(processor, range(6))
    generate(model, inputs, **STAY_TOGETHER[name])
    assert calls[0][0] == 6


def test_sliding_windows_stay_together(tiny, calls):
    model, processor = tiny
    cache = DynamicCache(config=model.config)
    config = copy.deepcopy(model.config.text_config)
    config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    config.sliding_window = 1000
    cache = DynamicCache(config=config)
    generate(model, encode(processor, range(6)), past_key_values=cache)
    assert calls[0][0] == 6


def test_rows_padded_on_either_side_give_what_they_give_together(tiny, monkeypatch):
    model, processor = tiny
    inputs = encode(processor, range(6))
    mask = inputs["attention_mask"]
    order = torch.arange(mask.shape[1]).repeat(6, 1)
    order[1] = torch.argsort(mask[1], descending=True, stable=True)
    inputs["input_ids"], inputs["attention_mask"] = inputs["input_ids"].gather(1, order), mask.gather(1, order)
    apart = generate(model, inputs)
    monkeypatch.setattr(type(model), "_group_rows", lambda *_: [])
    together = generate(model, inputs)
    torch.testing.assert_close(torch.stack(apart.logits), torch.stack(together.logits), atol=1e-4, rtol=0)


def test_rows_of_several_images_or_none_answer_as_alone(tiny, calls):
    model, processor = tiny
    text = [processor.image_token * 2 + "hi", "which color is it?", processor.image_token + "hi"]
    options = {"padding": True, "return_tensors": "pt"}
    together = generate(model, processor(images=IMAGES[:3], text=text, num_vision_tokens=[16, 4, 36], **options))
    assert calls[0][0] < 3
    alone = [
        generate(model, processor(images=images, text=one, num_vision_tokens=counts, **options))
        for images, one, counts in [(IMAGES[:2], text[0], [16, 4]), (None, text[1], None), (IMAGES[2:3], text[2], 36)]
    ]
    for row, one in enumerate(alone):
        torch.testing.assert_close(
            torch.stack(together.logits)[:, row], torch.stack(one.logits)[:, 0], atol=1e-4, rtol=0
        )


def test_a_forward_in_the_models_place_sees_one_prefill(tiny, monkeypatch):
    model, processor = tiny
    shapes, own = [], model.forward

    @functools.wraps(own)
    def watched(**inputs):
        shapes.append(len(inputs["input_ids"]))
        return own(**inputs)

    monkeypatch.setattr(model, "forward", watched)
    generate(model, encode(processor, range(6)))
    assert shapes == [6] * 4


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_length_keep_rows_together(tiny, calls, monkeypatch, rope_type):
    model, processor = tiny
    parameters = {**model.config.text_config.rope_parameters, "rope_type": rope_type}
    monkeypatch.setattr(model.config.text_config, "rope_parameters", parameters)
    generate(model, encode(processor, range(6)))
    assert calls[0][0] == 6


def test_adapters_chosen_by_row_keep_rows_together():
    model, processor = tiny_model_and_processor()
    adapted = get_peft_model(
        model.eval(), LoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    ).eval()
    names = ["default", "__base__", "default"]
    inputs = encode(processor, range(3))
    together = generate(adapted, {**inputs, "adapter_names": names})
    base = generate(model, {**encode(processor, [0])})  # the adapter is on
    torch.testing.assert_close(torch.stack(together.logits)[:, :1], torch.stack(base.logits), atol=1e-4, rtol=0)


def test_offloaded_weights_are_moved_once(tiny, calls):
    model, processor = tiny_model_and_processor()
    moved = []
    accelerate.cpu_offload(model.eval(), torch.device("cpu"))
    model.model.language_model.register_forward_pre_hook(lambda *_: moved.append(1))
    generate(model, encode(processor, range(6)), max_new_tokens=1, min_new_tokens=1)
    assert moved == [1]
