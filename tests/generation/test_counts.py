import copy
import math

import pytest
import torch
from helpers import COUNTS, IMAGES, MIXED, answer, assert_same, encode, generate
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GenerationConfig,
)

from tokenflex.towers.tiny import tiny_model_and_processor


@pytest.fixture(scope="module")
def small():
    model, processor = tiny_model_and_processor(width=32)
    return model.eval(), processor


@pytest.fixture
def tower_passes(tiny):
    passes = []
    hook = tiny[0].model.vision_tower.register_forward_hook(lambda *_: passes.append(1))
    yield passes
    hook.remove()


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("encoded_at", [4, 36])
def test_generating_at_a_count_equals_encoding_at_it(tiny, encoded_at, count, num_beams):
    model, processor = tiny
    images_per_row = [1, 3, 0, 2]
    encoded, expected = encode(processor, images_per_row, encoded_at), encode(processor, images_per_row, count)
    sequences, logits = generate(model, encoded, num_vision_tokens=count, num_beams=num_beams)
    expected_sequences, expected_logits = generate(model, expected, num_beams=num_beams)
    length = encoded["input_ids"].shape[1]
    assert torch.equal(sequences[:, :length], encoded["input_ids"])
    assert torch.equal(sequences[:, length:], expected_sequences[:, expected["input_ids"].shape[1] :])
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=0)
    plain = model.generate(**encoded, num_vision_tokens=count, num_beams=num_beams, max_new_tokens=5, do_sample=False)
    assert torch.equal(plain, sequences)


def test_each_image_can_have_its_own_count(tiny):
    model, processor = tiny
    counts = [4, 64, (2, 5), 16]
    sequences, logits = generate(model, encode(processor, [1, 3]), num_vision_tokens=counts)
    _, expected = generate(model, encode(processor, [1, 3], counts))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_return_sequences_stand_behind_the_callers_prompt(tiny):
    model, processor = tiny
    inputs = encode(processor, [1, 2])
    output = model.generate(
        **inputs, num_vision_tokens=4, num_beams=2, num_return_sequences=2, max_new_tokens=3, do_sample=False
    )
    assert torch.equal(output[:, : inputs["input_ids"].shape[1]], inputs["input_ids"].repeat_interleave(2, dim=0))


def test_precedence_of_counts(tiny):
    _, processor = tiny
    model = tiny_model_and_processor()[0].eval()
    inputs = encode(processor, [1, 2])
    at = {count: generate(model, encode(processor, [1, 2], count))[1] for count in (4, 16, 64)}
    own = GenerationConfig(**model.generation_config.to_dict(), num_vision_tokens=4)
    model.generation_config = own
    torch.testing.assert_close(generate(model, inputs)[1], at[4], atol=1e-4, rtol=0)
    passed = GenerationConfig(
        num_vision_tokens=16, max_new_tokens=5, return_dict_in_generate=True, output_logits=True, do_sample=False
    )
    logits = torch.stack(model.generate(**inputs, generation_config=passed).logits)
    torch.testing.assert_close(logits, at[16], atol=1e-4, rtol=0)
    logits = torch.stack(model.generate(**inputs, generation_config=passed, num_vision_tokens=64).logits)
    torch.testing.assert_close(logits, at[64], atol=1e-4, rtol=0)


def test_hand_built_inputs_without_grids_or_mask(tiny):
    model, processor = tiny
    inputs = encode(processor, [1])
    bare = {"inputs": inputs["input_ids"], "pixel_values": inputs["pixel_values"]}
    _, expected = generate(model, encode(processor, [1], 4))
    torch.testing.assert_close(generate(model, bare, num_vision_tokens=4)[1], expected, atol=1e-4, rtol=0)


def test_a_padded_batch_without_mask_is_recounted_by_its_padding(tiny):
    model, processor = tiny
    inputs, expected = encode(processor, [2, 1]), encode(processor, [2, 1], 4)
    assert inputs.pop("attention_mask").min() == expected.pop("attention_mask").min() == 0
    logits = generate(model, inputs, num_vision_tokens=4)[1]
    torch.testing.assert_close(logits, generate(model, expected)[1], atol=1e-4, rtol=0)


def test_text_only_prompts_have_no_count(tiny):
    model, processor = tiny
    inputs = encode(processor, [0, 0])
    assert torch.equal(generate(model, inputs, num_vision_tokens=4)[0], generate(model, inputs)[0])
    with pytest.raises(ValueError, match="`num_vision_tokens`=5"):
        model.generate(**inputs, num_vision_tokens=5)


@pytest.mark.parametrize("count", [1, 16, (2, 5), (8, 1), MIXED])
def test_each_image_gets_exactly_what_it_gets_alone(tiny, count):
    model, processor = tiny
    counts = count if isinstance(count, list) else [count] * len(IMAGES)
    inputs = encode(processor, [3, 1, 2])
    grids = [count if isinstance(count, tuple) else (math.isqrt(count), math.isqrt(count)) for count in counts]
    together = model.get_image_features(inputs["pixel_values"], num_vision_tokens=count)
    assert together.vision_token_grids == grids
    for i, alone in enumerate(counts):
        features = model.get_image_features(inputs["pixel_values"][i : i + 1], num_vision_tokens=alone).pooler_output
        torch.testing.assert_close(together.pooler_output[i], features[0], atol=1e-5, rtol=0)
    assert_same(answer(model, inputs, num_vision_tokens=count), answer(model, encode(processor, [3, 1, 2], counts)))


def draw_counts(data, number):
    return data.draw(st.lists(st.sampled_from([1, 4, 9, 36, 64, (2, 5), (8, 1)]), min_size=number, max_size=number))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_batch_gives_row_by_row_what_single_prompts_give(small, data):
    model, processor = small
    images_per_row = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any))
    words = [f"is it {'very ' * data.draw(st.integers(0, 8))}red?" for _ in images_per_row]
    encoded, counts = (draw_counts(data, sum(images_per_row)) for _ in range(2))
    options = {"max_new_tokens": 2, "min_new_tokens": 2}
    batch = encode(processor, images_per_row, encoded, tuple(words))
    sequences, logits = generate(model, batch, num_vision_tokens=counts, **options)
    never = [processor.image_token_id, processor.tokenizer.eos_token_id]
    first = 0
    for row, (n, word) in enumerate(zip(images_per_row, words)):
        single = encode(processor, [n], counts[first : first + n], (word,), first)
        first += n
        single_sequences, single_logits = generate(model, single, **options)
        for step in (0, 1):
            expected = single_logits[step, 0]
            torch.testing.assert_close(logits[step, row], expected, atol=1e-4, rtol=0)
            best, second = expected.index_fill(0, torch.tensor(never), -torch.inf).topk(2).values
            if best - second < 1e-3:  # either token may win, and the next step depends on it
                break
            assert sequences[row, step - 2] == single_sequences[0, step - 2]


# Kept images


def test_one_tower_pass_serves_every_count_and_question(tiny):
    model, processor = tiny
    passes = []
    hook = model.model.vision_tower.register_forward_hook(lambda *_: passes.append(1))
    try:
        features = model.get_image_features(encode(processor, [2])["pixel_values"])
        for count in (4, 16, 64):
            inputs = encode(processor, [2], words=(f"question {count}",))
            expected = generate(model, encode(processor, [2], count, words=(f"question {count}",)))[1]
            inputs.pop("pixel_values")
            passes.clear()
            kept = {"image": features}
            logits = generate(model, inputs, mm_encoder_outputs=kept, num_vision_tokens=count, num_beams=1)[1]
            assert not passes
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
            assert kept == {"image": features}
        passes.clear()
        generate(model, encode(processor, [2, 1]), num_vision_tokens=4)
        assert len(passes) == 1
    finally:
        hook.remove()


def test_three_counts_and_three_questions_take_one_tower_pass(tiny, tower_passes):
    model, processor = tiny
    questions = ("which color?", "how tall is the red bar?", "where?")
    expected = [
        answer(model, encode(processor, [1], count, (question,))) for count in (4, 16, 64) for question in questions
    ]
    tower_passes.clear()
    kept = {"image": model.get_image_features(encode(processor, [1])["pixel_values"])}
    prompts = [encode(processor, [1], words=(question,)) for question in questions]
    for prompt in prompts:
        prompt.pop("pixel_values")
    got = [
        answer(model, prompt, mm_encoder_outputs=kept, num_vision_tokens=count)
        for count in (4, 16, 64)
        for prompt in prompts
    ]
    assert len(tower_passes) == 1
    for one, other in zip(got, expected):
        assert_same(one, other)


# Saved configs


def test_a_grid_in_a_config_means_the_same_once_saved(tiny, tmp_path):
    model, processor = tiny
    config = GenerationConfig(num_vision_tokens=(2, 5), max_new_tokens=3, do_sample=False, pad_token_id=0)
    config.save_pretrained(tmp_path)
    inputs = encode(processor, [2])
    expected = model.generate(**inputs, num_vision_tokens=(2, 5), max_new_tokens=3, do_sample=False)
    for stored in (config, GenerationConfig.from_pretrained(tmp_path)):
        assert torch.equal(model.generate(**inputs, generation_config=stored), expected)


def test_a_stored_count_for_shapes_leaves_prompts_without_images_alone(small):
    model, processor = copy.deepcopy(small[0]), small[1]
    model.generation_config.num_vision_tokens = 8
    text = encode(processor, [0])
    assert torch.equal(model.generate(**text, max_new_tokens=3), small[0].generate(**text, max_new_tokens=3))
    with pytest.raises(ValueError, match="`num_vision_tokens`=8"):
        model.generate(**encode(processor, [1]), max_new_tokens=3)


@pytest.mark.parametrize("options", [{"match_aspect_ratio": True}, {"crop_to_patches": True, "max_patches": 2}])
def test_shapes_and_tiles_may_be_lists(tiny, options):
    model, processor = tiny
    images = [IMAGES[0].resize((120, 60)), IMAGES[1].resize((60, 120))]
    inputs = processor(images=images, text="<|image_pad|> and <|image_pad|>", return_tensors="pt", **options)
    as_lists = {name: inputs[name].tolist() for name in ("image_shapes", "num_tiles") if name in inputs}
    expected = answer(model, inputs, num_vision_tokens=4)
    assert_same(answer(model, {**inputs, **as_lists}, num_vision_tokens=4), expected)
