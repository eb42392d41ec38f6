import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from tokenflex.prefill_tokenflex import group_by_length
from tokenflex.training.synthetic import draw_scene


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


@given(st.lists(st.integers(1, 500), min_size=1, max_size=30), st.floats(0, 0.5))
def test_no_row_is_padded_much(lengths, max_padding):
    groups = group_by_length(lengths, max_padding)
    assert sorted(row for rows in groups for row in rows) == list(range(len(lengths)))
    for rows in groups:
        longest = max(lengths[row] for row in rows)
        assert lengths[rows[0]] == longest
        assert all(longest <= (1 + max_padding) * lengths[row] for row in rows)
    # Neighbouring groups could not have been one.
    for longer, shorter in zip(groups, groups[1:]):
        assert lengths[longer[0]] > (1 + max_padding) * lengths[shorter[0]]


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
    monkeypatch.setattr(type(model), "_groups", lambda *_: [])
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


def test_rows_padded_on_the_right_stay_together(tiny, calls):
    model, processor = tiny
    inputs = encode(processor, [0, 1])
    mask = inputs["attention_mask"]
    order = torch.argsort(mask, dim=-1, descending=True, stable=True)
    inputs["input_ids"] = inputs["input_ids"].gather(1, order)
    inputs["attention_mask"] = mask.gather(1, order)
    generate(model, inputs)
    assert calls[0][0] == 2
