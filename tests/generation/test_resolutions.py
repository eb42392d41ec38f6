import copy

import pytest
import torch
from helpers import IMAGES, answer, assert_same, encode, fill, generate, give_chooser, next_turn
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText, AutoProcessor

from tokenflex import at_count
from tokenflex.checkpoints.files import save_checkpoint


CHOICES = [4, 16, 36, "4@32", "16@48", "4@48", "36@48", "2x3@48x32"]


@pytest.fixture(scope="module")
def pairs(both):
    """A model that was trained at pairs: a count alone means the resolution that its choices name."""
    model, processor = copy.deepcopy(both)
    model.config.vision_token_choices = ["4@32", "16@48", 16, 36]
    model.config.vision_token_weights = [1, 1, 1, 1]
    return model.eval(), processor


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("encoded_at", [36, "4@32"])
@pytest.mark.parametrize("choice", ["4@32", "16@48", "2x3@48x32", 16])
def test_generating_at_a_pair_equals_encoding_at_it(tiny, choice, encoded_at, num_beams):
    model, processor = tiny
    images_per_row = [1, 3, 0, 2]
    got = answer(model, encode(processor, images_per_row, encoded_at), num_vision_tokens=choice, num_beams=num_beams)
    assert_same(got, answer(model, encode(processor, images_per_row, choice), num_beams=num_beams))


@settings(deadline=None, max_examples=12)
@given(choices=st.lists(st.sampled_from(CHOICES), min_size=4, max_size=4), encoded_at=st.sampled_from(CHOICES))
def test_each_image_has_its_own_pair_in_any_batch(tiny, choices, encoded_at):
    model, processor = tiny
    got = answer(model, encode(processor, [1, 3], encoded_at), num_vision_tokens=choices)
    assert_same(got, answer(model, encode(processor, [1, 3], choices)))
    alone = encode(processor, [1], choices[0])
    assert torch.equal(answer(model, alone)[0][0], got[0][0])


def test_the_resolution_is_an_argument_too(tiny):
    model, processor = tiny
    expected = answer(model, encode(processor, [1, 2], "16@48"))
    assert_same(answer(model, encode(processor, [1, 2]), num_vision_tokens=16, image_size=48), expected)
    assert_same(answer(model, encode(processor, [1, 2], 16), image_size=(48, 48)), expected)
    options = {"images": IMAGES[:2], "text": ["<|image_pad|> hi", "<|image_pad|> ho"], "return_tensors": "pt"}
    inputs = processor(**options, num_vision_tokens=16, image_size=48)
    assert torch.equal(
        inputs["image_resolutions"], processor(**options, num_vision_tokens="16@48")["image_resolutions"]
    )
    whole = answer(model, processor(**options, num_vision_tokens=16))
    assert_same(answer(model, inputs, num_vision_tokens=16), whole)
    assert not torch.equal(answer(model, inputs)[1], whole[1])


def test_forward_gives_what_encoding_at_the_pair_gives(tiny):
    model, processor = tiny
    encoded = encode(processor, [1, 2], ["4@32", 16, "9@48"])
    recounted = at_count(encode(processor, [1, 2]), ["4@32", 16, "9@48"], model.config)
    assert torch.equal(recounted["image_resolutions"], torch.tensor([[32, 32], [0, 0], [48, 48]]))
    with torch.no_grad():
        torch.testing.assert_close(model(**recounted).logits, model(**encoded).logits, atol=1e-5, rtol=0)
    assert "image_resolutions" not in at_count(recounted, 16, model.config)


@pytest.mark.parametrize("pixels", [True, False])
def test_kept_features_of_several_resolutions_answer_as_the_images_do(pairs, pixels):
    model, processor = pairs
    encoded = encode(processor, [1, 2])
    pixel_values = encoded.pop("pixel_values")
    kept = [model.get_image_features(pixel_values, 1, image_size=size) for size in (64, 48, 32)]
    for asked in (4, "16@48", [36, 4, "4@48"]):
        expected = answer(model, {**encoded, "pixel_values": pixel_values}, num_vision_tokens=asked)
        assert_same(answer(model, encoded, mm_encoder_outputs={"image": kept}, num_vision_tokens=asked), expected)
    with pytest.raises(ValueError, match="image 0 as seen at 64 pixels, but at 4 vision tokens it is seen at 32"):
        model.generate(**encoded, mm_encoder_outputs={"image": kept[0]}, num_vision_tokens=4)


def test_counts_alone_follow_the_choices_also_when_saved_and_loaded(pairs, tmp_path):
    model, processor = pairs
    for count, meant in ((4, "4@32"), (16, "16@64"), (36, "36@64"), (9, "9@64"), ("low", "4@32"), ("high", "36@64")):
        got = answer(model, encode(processor, [1, 2]), num_vision_tokens=count)
        assert_same(got, answer(model, encode(processor, [1, 2], meant)))
    save_checkpoint(tmp_path / "pairs", model, processor)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "pairs")
    inputs = encode(AutoProcessor.from_pretrained(tmp_path / "pairs"), [1, 2], 4)
    assert loaded.config.vision_token_choices == ["4@32", "16@48", 16, 36]
    assert_same(answer(loaded, inputs), answer(model, encode(processor, [1, 2], "4@32")))


def test_a_default_may_be_a_pair(tiny, tmp_path):
    model, processor = copy.deepcopy(tiny)
    processor.num_vision_tokens = model.config.num_vision_tokens = model.generation_config.num_vision_tokens = "4@32"
    save_checkpoint(tmp_path / "pair", model, processor)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "pair")
    again = AutoProcessor.from_pretrained(tmp_path / "pair")
    assert "image_resolutions" in again.model_input_names
    inputs = again(images=IMAGES[0], text="<|image_pad|> hi", return_tensors="pt")
    expected = answer(
        tiny[0], tiny[1](images=IMAGES[0], text="<|image_pad|> hi", return_tensors="pt"), num_vision_tokens="4@32"
    )
    assert_same(answer(loaded, inputs), expected)
    assert_same(
        answer(loaded, encode(tiny[1], [1], words=("hi",))),
        answer(tiny[0], encode(tiny[1], [1], "4@32", words=("hi",))),
    )


@pytest.mark.parametrize("asked", [{}, {"num_vision_tokens": "16@48"}, {"image_size": 48}])
def test_a_conversation_goes_on_at_its_pairs(tiny, asked):
    model, processor = tiny
    first = encode(processor, [1, 1], "16@48")
    answers = model.generate(**first, max_new_tokens=3, min_new_tokens=3, do_sample=False)[:, -3:]
    later = next_turn(processor, first, answers, [1, 1], new=[1, 1], count=16)
    if not asked:
        later["image_resolutions"] = torch.tensor([[48, 48]] * 4)
    expected = generate(model, later, num_vision_tokens="16@48")
    got = generate(model, later, past_key_values=fill(model, first), **asked)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def chooser(pairs):
    """A model with a random head, which chooses among all pairs."""
    model, processor = copy.deepcopy(pairs)
    choices = model.config.vision_token_choices
    hidden_states = model.read_questions(**encode(processor, [1] * 6))
    spread = (hidden_states - hidden_states.mean(0)).norm(dim=-1).mean()
    weight = torch.randn(4, hidden_states.shape[1], generator=torch.Generator().manual_seed(0)) / spread
    give_chooser(model, choices, weight, bias=-(weight @ hidden_states.mean(0)))
    return model, processor


def test_auto_chooses_among_pairs(chooser):
    model, processor = chooser
    inputs = encode(processor, [1] * 6)
    chosen = model.choose_vision_tokens(**inputs)
    assert len(set(chosen)) > 1
    output = model.generate(
        **inputs, num_vision_tokens="auto", max_new_tokens=4, do_sample=False, return_dict_in_generate=True
    )
    assert output.num_vision_tokens == chosen
    for choice in set(chosen):
        rows = torch.tensor([other == choice for other in chosen])
        fixed = model.generate(**inputs, num_vision_tokens=choice, max_new_tokens=4, do_sample=False)
        assert torch.equal(output.sequences[rows][:, : fixed.shape[1]], fixed[rows])
    pixel_values = inputs.pop("pixel_values")
    kept = {"image": [model.get_image_features(pixel_values, 1, image_size=size) for size in (32, 48, 64)]}
    again = model.generate(
        **inputs, mm_encoder_outputs=kept, num_vision_tokens="auto", max_new_tokens=4, do_sample=False
    )
    assert torch.equal(again, output.sequences)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_vision_tokens": "16@20"}, "`num_vision_tokens`='16@20': .* Nearest: 16"),
        ({"num_vision_tokens": "16@24"}, "`num_vision_tokens`=16: .* from 1 to 3 .* Nearest: 9"),
        ({"num_vision_tokens": 4, "image_size": 128}, "`image_size`=128: .* Nearest: 64"),
        ({"num_vision_tokens": "4@32", "image_size": 48}, "'4@32' and `image_size`=48 disagree"),
        ({"num_vision_tokens": "auto", "image_size": 48}, "`image_size`=48 with `num_vision_tokens`='auto'"),
        ({"num_vision_tokens": "4@"}, "'4@': give a number"),
        ({"num_vision_tokens": ["4@32", "4@20"]}, r"`num_vision_tokens\[1\]`='4@20': .* Nearest: 16"),
    ],
)
def test_what_no_tower_can_see_is_refused(tiny, asked, message):
    model, processor = tiny
    with pytest.raises(ValueError, match=message):
        model.generate(**encode(processor, [1, 1]), **asked)


def test_a_lone_resolution_goes_with_the_counts_that_are_there(tiny, tmp_path):
    model, processor = copy.deepcopy(tiny)
    inputs, expected = encode(processor, [1, 1], "16@48"), answer(model, encode(processor, [1, 1], "16@32"))
    model.generation_config.num_vision_tokens = "16@48"
    assert_same(answer(model, encode(processor, [1, 1]), image_size=32), expected)
    model.generation_config.num_vision_tokens = None
    assert_same(answer(model, inputs, image_size=32), expected)
    options = {"images": IMAGES[:2], "text": "<|image_pad|> or <|image_pad|>", "return_tensors": "pt"}
    processor.num_vision_tokens = "16@48"
    given = processor(**options, image_size=32)
    assert (
        given["image_resolutions"].tolist() == [[32, 32]] * 2 and given["vision_token_grids"].tolist() == [[4, 4]] * 2
    )
    given = processor(**options, num_vision_tokens=[4, "16@48"], image_size=48)
    assert given["image_resolutions"].tolist() == [[48, 48]] * 2
    with torch.no_grad():
        bare = {name: inputs[name] for name in inputs if name != "image_resolutions"}
        torch.testing.assert_close(model(**bare, image_size=48).logits, model(**inputs).logits)
    with pytest.raises(ValueError, match="`image_size`=48: a processor's is"):
        type(processor)(processor.image_processor, processor.tokenizer, patch_size=8, image_size=48)


def test_forward_takes_of_several_kept_features_those_it_needs(tiny):
    model, processor = tiny
    inputs = encode(processor, [1, 1], ["16@48", 16])
    with torch.no_grad():
        expected = model(**inputs).logits
        pixel_values = inputs.pop("pixel_values")
        kept = [model.get_image_features(pixel_values, 16, image_size=size) for size in (64, 48)]
        got = model(**inputs, mm_encoder_outputs={"image": kept}).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_auto_sees_each_image_at_its_resolution_alone(chooser):
    model, processor = chooser
    inputs, seen = encode(processor, [1] * 6), []
    hook = model.model.vision_tower.register_forward_hook(lambda _, args, output: seen.append(args[0].shape))
    output = model.generate(**inputs, num_vision_tokens="auto", max_new_tokens=1, return_dict_in_generate=True)
    hook.remove()
    sides = {"4@32": 32, "16@48": 48, 16: 64, 36: 64}
    chosen = [sides[choice] for choice in output.num_vision_tokens]
    assert {shape[2]: shape[0] for shape in seen} == {side: chosen.count(side) for side in chosen}
