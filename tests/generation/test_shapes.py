"""A tower that sees images in their own shapes: a count chosen in `generate` equals one chosen in encoding."""

import copy

import pytest
import torch
from helpers import IMAGES, answer, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText, AutoProcessor

from tokenflex import at_count
from tokenflex.checkpoints.files import save_checkpoint


SHAPES = [(64, 64), (160, 80), (60, 180), (90, 120)]
CHOICES = [4, 10, 36, 81, (2, 5), "4@32", "12@48x96", "16@128"]


@pytest.fixture(scope="module")
def naflex(pristine_naflex):
    return copy.deepcopy(pristine_naflex)


def photos(shapes):
    return [image.resize(shape[::-1]) for image, shape in zip(IMAGES, shapes)]


def encode(processor, choice, shapes=SHAPES):
    """Two rows of two images, or as many rows as images where there are fewer."""
    images = photos(shapes)
    texts = ["<|image_pad|> or <|image_pad|>: which color?", "<|image_pad|><|image_pad|> hi"]
    texts = texts if len(images) == 4 else ["<|image_pad|> hi"] * len(images)
    return processor(images=images, text=texts, num_vision_tokens=choice, padding=True, return_tensors="pt")


@settings(deadline=None, max_examples=15)
@given(choices=st.lists(st.sampled_from(CHOICES), min_size=4, max_size=4), encoded_at=st.sampled_from(CHOICES))
def test_generating_at_a_choice_equals_encoding_at_it(naflex, choices, encoded_at):
    model, processor = naflex
    got = answer(model, encode(processor, encoded_at), num_vision_tokens=choices)
    assert_same(got, answer(model, encode(processor, choices)))


@pytest.mark.parametrize("choice", [4, 36, "12@48x96"])
def test_a_batch_of_shapes_gives_what_each_image_gives_alone(naflex, choice):
    model, processor = naflex
    together = answer(model, encode(processor, choice, SHAPES[:3]))
    for row, shape in enumerate(SHAPES[:3]):
        image = photos(SHAPES[:3])[row]
        alone = processor(images=image, text="<|image_pad|> hi", num_vision_tokens=choice, return_tensors="pt")
        assert torch.equal(answer(model, alone)[0][0], together[0][row]), shape


def test_each_image_is_seen_in_its_shape(naflex):
    model, processor = naflex
    inputs, seen = encode(processor, 36), []
    hook = model.model.vision_tower.register_forward_hook(
        lambda _, args, kwargs, output: seen.extend(map(tuple, kwargs["spatial_shapes"].tolist())), with_kwargs=True
    )
    sizes = list(map(tuple, inputs["image_resolutions"].tolist()))
    answer(model, inputs)
    hook.remove()
    assert sorted((8 * rows, 8 * columns) for rows, columns in seen) == sorted(sizes)
    for (height, width), (tall, wide) in zip(SHAPES, sizes):
        assert 48 * 64 < tall * wide <= 64 * 64 and abs(tall * width / (wide * height) - 1) < 0.15
    for count in (1, 4, 16, 64):
        again = encode(processor, count)
        assert torch.equal(again["image_resolutions"], inputs["image_resolutions"]), "its shape is the image's alone"
        assert torch.equal(at_count(inputs, count, model.config)["image_resolutions"], again["image_resolutions"])


@pytest.mark.parametrize("shape", [(1, 4000), (4000, 1), (1, 1), (2, 3), (37, 801)])
@pytest.mark.parametrize("count", [1, 10, 64, 100])
def test_images_of_any_shape_have_at_most_the_tokens_asked_for(naflex, shape, count):
    model, processor = naflex
    image = IMAGES[0].resize(shape[::-1])
    inputs = processor(images=image, text="<|image_pad|> hi", num_vision_tokens=count, return_tensors="pt")
    number = int((inputs["input_ids"] == processor.image_token_id).sum())
    assert 1 <= number <= count and processor.count_vision_tokens([shape], num_vision_tokens=count) == [number]
    assert answer(model, inputs)[1].isfinite().all()


def test_kept_features_serve_the_shapes_they_hold(naflex):
    model, processor = naflex
    inputs = encode(processor, 36)
    pixel_values, resolutions = inputs.pop("pixel_values"), inputs["image_resolutions"]
    kept = {"image": model.get_image_features(pixel_values, 1, image_resolutions=resolutions)}
    for count in (4, 36, 64):
        expected = answer(model, {**inputs, "pixel_values": pixel_values}, num_vision_tokens=count)
        assert_same(answer(model, inputs, mm_encoder_outputs=kept, num_vision_tokens=count), expected)
    with pytest.raises(ValueError, match="image 1 as seen at 88x40 pixels, but .* ask for '.*@88x40'"):
        answer(model, inputs, mm_encoder_outputs=kept, num_vision_tokens=[4, "4@32", 4, 4])


def test_it_is_the_same_once_saved_and_loaded(naflex, tmp_path):
    save_checkpoint(tmp_path / "naflex", *naflex)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "naflex")
    processor = AutoProcessor.from_pretrained(tmp_path / "naflex")
    assert model.config.image_size == (128, 128) and processor.match_aspect_ratio
    assert_same(answer(model, encode(processor, 10)), answer(naflex[0], encode(naflex[1], 10)))
