import copy

import pytest
import torch
from helpers import give_chooser
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.data.synthetic import draw_scene
from tokenflex.generation_tokenflex import smallest_sufficient


CHOICES = [4, 16, 36]


@pytest.fixture(scope="module")
def chooser(both):
    """A model with a random head, which chooses among all counts."""
    model, processor = both
    hidden_states = model.eval().read_questions(**encode(processor, range(12)))
    spread = (hidden_states - hidden_states.mean(0)).norm(dim=-1).mean()
    weight = torch.randn(3, hidden_states.shape[1], generator=torch.Generator().manual_seed(0)) / spread
    give_chooser(model, CHOICES, weight, bias=-(weight @ hidden_states.mean(0)))
    return model.eval(), processor


def encode(processor, indices, count=36, images_per_prompt=1):
    scenes = [draw_scene(5, index) for index in indices for _ in range(images_per_prompt)]
    prompts = []
    for index in indices:
        content = [{"type": "image"}] * images_per_prompt
        content.append({"type": "text", "text": draw_scene(5, index).questions[index % 3 - 1][1]})
        prompts.append(
            processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        )
    return processor(
        images=[scene.image for scene in scenes], text=prompts, num_vision_tokens=count, padding=True,
        add_special_tokens=False, return_tensors="pt",
    )  # fmt: skip


@given(st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=1, max_size=5), st.floats(0, 1))
@settings(deadline=None)
def test_the_smallest_count_within_the_tolerance_is_taken(chances, tolerance):
    chosen = smallest_sufficient(torch.tensor(chances, dtype=torch.double), CHOICES, tolerance)
    for row, count in zip(chances, chosen):
        sufficient = [n for n, chance in zip(CHOICES, row) if chance >= max(row) - tolerance]
        assert count == sufficient[0]


def test_auto_gives_the_answers_of_the_counts_it_chooses(chooser):
    model, processor = chooser
    inputs = encode(processor, range(12))
    chosen = model.choose_vision_tokens(**inputs)
    assert set(chosen) == set(CHOICES)
    passes = []
    handle = model.model.vision_tower.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    output = model.generate(**inputs, num_vision_tokens="auto", max_new_tokens=4, return_dict_in_generate=True)
    handle.remove()
    assert passes == [12], "one pass of the tower"
    assert output.num_vision_tokens.tolist() == chosen
    for count in CHOICES:
        fixed = model.generate(**inputs, num_vision_tokens=count, max_new_tokens=4)
        rows = torch.tensor(chosen) == count
        assert torch.equal(output.sequences[rows], fixed[rows])


def test_a_choice_depends_neither_on_the_batch_nor_on_the_encoded_count(chooser):
    model, processor = chooser
    together = model.choose_vision_tokens(**encode(processor, range(9)))
    assert [model.choose_vision_tokens(**encode(processor, [i], count=4))[0] for i in range(9)] == together
    assert model.choose_vision_tokens(**encode(processor, list(range(9))[::-1], count=16)) == together[::-1]
    hidden = model.read_questions(**encode(processor, range(9)))
    for i in range(9):
        alone = model.read_questions(**encode(processor, [i], count=16))
        torch.testing.assert_close(alone[0], hidden[i], atol=1e-4, rtol=1e-4)


def test_a_choice_is_made_by_the_text_before_any_image_is_seen(chooser):
    model, processor = chooser
    inputs = encode(processor, range(9))
    chosen = model.choose_vision_tokens(**inputs)
    assert model.choose_vision_tokens(inputs["input_ids"], attention_mask=inputs["attention_mask"]) == chosen
    inputs["pixel_values"] = inputs["pixel_values"].flip(0)
    assert (
        model.generate(
            **inputs, num_vision_tokens="auto", max_new_tokens=1, return_dict_in_generate=True
        ).num_vision_tokens.tolist()
        == chosen
    )
    right = processor.tokenizer.pad(
        {"input_ids": [row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"])]},
        padding_side="right",
        return_tensors="pt",
    )
    assert model.choose_vision_tokens(**right) == chosen
    assert model.choose_vision_tokens(inputs["input_ids"]) == chosen, "padding is known by its id"
    del inputs["attention_mask"]
    own, model.generation_config.pad_token_id = model.generation_config.pad_token_id, None
    output = model.generate(
        **inputs, num_vision_tokens="auto", pad_token_id=own, max_new_tokens=1, return_dict_in_generate=True
    )
    model.generation_config.pad_token_id = own
    assert output.num_vision_tokens.tolist() == chosen


def test_all_images_of_a_prompt_share_its_choice(chooser):
    model, processor = chooser
    inputs = encode(processor, range(4), images_per_prompt=2)
    chosen = model.choose_vision_tokens(**inputs)
    output = model.generate(**inputs, num_vision_tokens="auto", max_new_tokens=3)
    per_image = [count for count in chosen for _ in range(2)]
    assert torch.equal(output, model.generate(**inputs, num_vision_tokens=per_image, max_new_tokens=3))


def test_kept_features_serve_as_well_as_pixels(chooser):
    model, processor = chooser
    inputs = encode(processor, range(4))
    expected = model.generate(**inputs, num_vision_tokens="auto", max_new_tokens=3)
    features = model.get_image_features(inputs.pop("pixel_values"), 1)
    again = model.generate(
        **inputs, mm_encoder_outputs={"image": features}, num_vision_tokens="auto", max_new_tokens=3
    )
    assert torch.equal(expected, again)


def test_tolerance_trades_tokens_for_accuracy(chooser):
    model, processor = chooser
    inputs = encode(processor, range(9))
    spent = [sum(model.choose_vision_tokens(**inputs, tolerance=tolerance)) for tolerance in (0.0, 0.1, 0.3, 1.0)]
    assert spent == sorted(spent, reverse=True) and spent[0] > spent[-1] == 9 * 4


@pytest.mark.parametrize(("name", "count"), [("low", 4), ("high", 36)])
def test_names_of_counts(chooser, name, count):
    model, processor = chooser
    inputs = encode(processor, range(2), count=16)
    named = model.generate(**inputs, num_vision_tokens=name, max_new_tokens=3)
    assert torch.equal(named, model.generate(**inputs, num_vision_tokens=count, max_new_tokens=3))
    config = copy.deepcopy(model.generation_config)
    config.num_vision_tokens = name
    assert torch.equal(named, model.generate(**inputs, generation_config=config, max_new_tokens=3))


def test_text_alone_has_nothing_to_choose(chooser):
    model, processor = chooser
    inputs = processor.tokenizer(["hello"], return_tensors="pt")
    auto = model.generate(**inputs, num_vision_tokens="auto", max_new_tokens=3)
    assert torch.equal(auto, model.generate(**inputs, max_new_tokens=3))


def test_what_cannot_be_chosen_is_refused(chooser, tiny):
    inputs = encode(tiny[1], [0])
    with pytest.raises(ValueError, match="Run `tokenflex calibrate` on it, or ask for 'low' .4., 'high' .36."):
        tiny[0].generate(**inputs, num_vision_tokens="auto")
    with pytest.raises(ValueError, match="`num_vision_tokens`='medium': give a number, .* or one of low, high, auto"):
        tiny[0].generate(**inputs, num_vision_tokens="medium")
    model = chooser[0]
    calibrated = model.config.vision_token_chooser
    model.config.vision_token_chooser = {name: calibrated[name] for name in ("choices", "tolerance")}
    with pytest.raises(ValueError, match="learned to choose by its images.*calibrate` on it again"):
        model.generate(**inputs, num_vision_tokens="auto")
    model.config.vision_token_chooser = calibrated
    output = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="no filled `past_key_values`"):
        model.generate(**inputs, past_key_values=output.past_key_values, num_vision_tokens="auto")
    with pytest.raises(ValueError, match="reads each prompt's text, but row 0 of `input_ids` has none"):
        model.choose_vision_tokens(torch.tensor([[model.config.image_token_id] * 4, [5] * 4]))
    for shape in ((1, 4), (2, 5), (2, 1, 4, 4)):
        with pytest.raises(ValueError, match="`attention_mask` has shape .* of `input_ids`, .2, 4."):
            model.choose_vision_tokens(torch.ones(2, 4, dtype=torch.long), attention_mask=torch.ones(shape))
    with pytest.raises(ValueError, match="it takes `input_ids`"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 128), num_vision_tokens="auto")


def test_the_chooser_travels_with_the_checkpoint_and_is_checked(chooser, tmp_path):
    model, processor = chooser
    save_checkpoint(tmp_path / "checkpoint", model, processor)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint")
    inputs = encode(processor, range(6))
    assert loaded.choose_vision_tokens(**inputs) == model.choose_vision_tokens(**inputs)
    weights = load_file(tmp_path / "checkpoint/model.safetensors")
    assert torch.equal(weights["model.vision_token_chooser.weight"], model.model.vision_token_chooser.weight)
    broken = {**model.config.vision_token_chooser, "choices": [16, 4, 36]}
    with pytest.raises(ValueError, match="`vision_token_chooser`=.* needs rising `choices`"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint", vision_token_chooser=broken)
