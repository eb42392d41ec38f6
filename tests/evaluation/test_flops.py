import pytest
import torch
from helpers import IMAGES
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokenflex.evaluation.flops import choosing_flops, count_flops


@pytest.mark.parametrize("name", ["pristine", "pristine_adopted", "pristine_naflex"])
@pytest.mark.parametrize("choice", [4, (2, 5), "16@48", 36])
def test_counted_operations_are_those_of_a_run(request, name, choice):
    model, processor = request.getfixturevalue(name)
    options = {"num_vision_tokens": choice, "match_aspect_ratio": False, "return_tensors": "pt"}
    inputs = processor(images=IMAGES[0], text="<|image_pad|> which color?", **options)
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
    with pytest.raises(ValueError, match="`num_vision_tokens`='4@20': .* Nearest: 16"):
        count_flops(config, "4@20")


def test_choosing_reads_the_text_alone(tiny):
    model, processor = tiny
    text = processor.tokenizer("which color is the paper?", return_tensors="pt")
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.read_questions(**text)
    costs = choosing_flops(model.config, [4, "16@48", 36], text["input_ids"].shape[1])
    for choice, flops in costs.items():
        answering = count_flops(model.config, choice, text["input_ids"].shape[1]).total
        assert flops == counter.get_total_flops() + answering
