import pytest
import torch
from helpers import COUNTS, encode
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflex import TokenFlexConfig, at_count


CONFIG = TokenFlexConfig(image_token_id=99)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_recounting_equals_encoding_at_that_count(tiny, data):
    processor = tiny[1]
    images_per_row = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any))
    draw_counts = st.lists(st.sampled_from(COUNTS), min_size=sum(images_per_row), max_size=sum(images_per_row))
    old, new = data.draw(draw_counts), data.draw(draw_counts)
    encoded, expected = encode(processor, images_per_row, old), encode(processor, images_per_row, new)
    grids = [tuple(grid) for grid in expected["vision_token_grids"].tolist()]
    before = {name: tensor.clone() for name, tensor in encoded.items()}
    pad = processor.tokenizer.pad_token_id
    recounted = at_count(encoded, grids, processor, pad)
    assert all(torch.equal(recounted[name], expected[name]) for name in expected)
    assert all(torch.equal(encoded[name], before[name]) for name in before), "the caller's tensors are left alone"


def test_recounting_keeps_right_padding_labels_and_segments():
    image = CONFIG.image_token_id
    inputs = {
        "input_ids": torch.tensor([[5, image, image, image, image, 6, 7], [image, image, image, image, 8, 0, 0]]),
        "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
        "labels": torch.tensor([[-100] * 5 + [6, 7], [-100] * 4 + [8, -100, -100]]),
        "segment_ids": torch.tensor([[0, 0, 0, 0, 0, 1, 2], [0, 0, 0, 0, 1, -1, -1]]),
        "position_ids": torch.arange(7)[None].expand(2, -1),
        "vision_token_grids": torch.tensor([[2, 2], [2, 2]]),
    }
    output = at_count(inputs, [(1, 1), (1, 3)], CONFIG)
    assert output["input_ids"].tolist() == [[5, image, 6, 7], [image, image, image, 8]]
    assert output["labels"].tolist() == [[-100, -100, 6, 7], [-100, -100, -100, 8]]
    assert output["segment_ids"].tolist() == [[0, 0, 1, 2], [0, 0, 0, 1]]
    output = at_count(inputs, 1, CONFIG, pad_token_id=3)
    assert output["input_ids"].tolist() == [[5, image, 6, 7], [image, 8, 3, 3]]
    assert output["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert output["labels"].tolist()[1] == [-100, 8, -100, -100]
    assert "position_ids" not in output


def test_recounting_refuses_runs_that_do_not_match():
    image = CONFIG.image_token_id
    for ids, grids in [
        ([[5, image, image, image]], [[2, 2]]),
        ([[image, 5, image, image, image]], [[2, 2]]),
        ([[image, image, 5], [image, image, 5]], [[2, 2]]),
        ([[image, image, image, image]], [[2, 2], [1, 1]]),
    ]:
        inputs = {"input_ids": torch.tensor(ids), "vision_token_grids": torch.tensor(grids)}
        with pytest.raises(ValueError, match="Image features and image tokens do not match"):
            at_count(inputs, 1, CONFIG)


@pytest.mark.parametrize("arguments", [(CONFIG, 4), (4, "model"), (4, {}), (4, 4)])
def test_what_is_no_config_is_refused_by_name(narrow, arguments):
    num_vision_tokens, config = (argument if argument != "model" else narrow[0] for argument in arguments)
    with pytest.raises(ValueError, match=f"`config` is a {type(config).__name__}: give the model's config"):
        at_count({"input_ids": torch.tensor([[5]])}, num_vision_tokens, config)
