import pytest
import torch
from helpers import IMAGES

from tokenflex import at_count
from tokenflex.data.placing import place_images


@pytest.mark.parametrize("options", [{}, {"crop_to_patches": True, "max_patches": 3}], ids=str)
@pytest.mark.parametrize("count", [4, 36])
def test_joined_prompts_are_those_that_were_processed_with_their_images(tiny, options, count):
    processor = tiny[1]
    texts, images = (
        ["<|image_pad|> or <|image_pad|>?", "hi <|image_pad|>"],
        [IMAGES[0].resize((150, 70)), *IMAGES[1:3]],
    )
    together = processor(
        images=images, text=texts, num_vision_tokens=count, padding=True, return_tensors="pt", **options
    )
    prompts = processor.tokenizer(texts, padding=True, return_tensors="pt")
    apart = place_images(prompts, processor(images=images, return_tensors="pt", **options), processor)
    joined = at_count(apart, count, processor)
    assert joined.keys() == together.keys() and all(torch.equal(joined[name], together[name]) for name in together)
