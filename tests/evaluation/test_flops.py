import pytest
import torch
from helpers import IMAGES
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokenflex.evaluation.flops import choosing_flops, count_flops


@pytest.mark.parametrize("choice", [4, (2, 5), "16@48", 36])
def test_counted_operations_are_those_of_a_run(both, choice):
    model, processor = both
    inputs = processor(
        images=IMAGES[0], text="<|image_pad|> which color?", num_vision_tokens=choice, return_tensors="pt"
    )
    text_tokens = int((inputs["input_ids"] != processor.image_token_id).sum())
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.model(**inputs, use_cache=False)
    flops = count_flops(model.config, choice, text_tokens)
    assert flops.total == counter.get_total_flops()
    assert 0 < flops.vision < flops.total


def test_tokens_cost_the_language_model_and_pixels_the_tower(tiny):
    config = tiny[0].config
    few, many, small = (count_flops(config, choice) for choice in (4, 36, "4@32"))
    assert few.language == small.language < many.language
    assert 4 * small.vision < few.vision < many.vision
    assert count_flops(config, 4, image_size=32) == small
    with pytest.raises(ValueError, match="`image_size`=20: .* Nearest: 16"):
        count_flops(config, "4@20")


def test_choosing_costs_the_reading_and_sees_an_image_again_only_at_another_resolution(tiny):
    config = tiny[0].config
    read = count_flops(config, 4)
    assert choosing_flops(config, [4, 36]) == {
        4: read.total + read.language,
        36: read.total + count_flops(config, 36).language,
    }
    assert choosing_flops(config, ["16@48"])["16@48"] == read.total + count_flops(config, "16@48").total
