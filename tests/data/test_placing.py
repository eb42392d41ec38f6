import pytest
import torch
from helpers import IMAGES

from tokenflex import at_count
from tokenflex.data.placing import place_images


@pytest.mark.parametrize("count", [4, 16])
@pytest.mark.parametrize("tiles", [{}, {"crop_to_patches": True, "max_patches": 4}], ids=["uncut", "tiles"])
def test_prompts_and_images_joined_are_as_encoded_together(tiny, tiles, count):
    processor = tiny[1]
    images = [IMAGES[0], IMAGES[1].resize((128, 64))]
    text = ["<|image_pad|> and <|image_pad|>?"]
    expected = processor(images=images, text=text, num_vision_tokens=count, return_tensors="pt", **tiles)
    prompt = processor.tokenizer(text, return_tensors="pt")
    placed = place_images(prompt, processor(images=images, return_tensors="pt", **tiles), processor)
    joined = at_count(placed, count, processor)
    assert len(expected["vision_token_grids"]) > 2 or not tiles
    for name in ("input_ids", "attention_mask", "pixel_values", "vision_token_grids"):
        assert torch.equal(joined[name], expected[name]), name
