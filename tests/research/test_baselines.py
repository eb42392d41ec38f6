import math

import pytest
import torch
from torch import nn

from tokenflex.data.synthetic import SyntheticVQA
from tokenflex.research.baselines import shrink_image, use_gelu
from tokenflex.towers.tiny import tiny_model_and_processor


PROMPT = "<|vision_start|><|image_pad|><|vision_end|>which color?"


def test_gelu_mlp_is_as_large_as_the_swiglu_it_replaces():
    model, _ = tiny_model_and_processor(width=96)
    before = sum(weight.numel() for weight in model.model.multi_modal_projector.parameters())
    state = torch.get_rng_state()
    use_gelu(model, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    projector = model.model.multi_modal_projector
    assert abs(sum(weight.numel() for weight in projector.parameters() if weight.ndim == 2) - before) <= 2 * 96
    features = torch.randn(2, 64, 96)
    mlp = projector.connector
    expected = mlp.down(nn.functional.gelu(mlp.up(features)))
    torch.testing.assert_close(projector(features, [(8, 8)] * 2, [(8, 8)] * 2), expected)
    assert mlp.up.weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.1)


@pytest.mark.parametrize("num_patches", [4, 16, 36])
def test_shrunk_image_has_a_patch_for_each_vision_token(num_patches):
    model, processor = tiny_model_and_processor(width=32)
    small, small_processor = shrink_image(model, processor, num_patches)
    inputs = small_processor(images=SyntheticVQA(1, 0)[0]["image"], text=PROMPT, return_tensors="pt")
    side = 8 * math.isqrt(num_patches)
    assert inputs["pixel_values"].shape == (1, 3, side, side)
    assert (inputs["input_ids"] == small.config.image_token_id).sum() == num_patches
    assert small.model.get_image_features(inputs["pixel_values"]).last_hidden_state.shape[1] == num_patches
    assert small(**inputs).logits.isfinite().all()
    # Of the weights only the positions differ, and the model it was made from is as it was.
    whole = model.state_dict()
    differing = [n for n, w in small.state_dict().items() if w.shape != whole[n].shape or not torch.equal(w, whole[n])]
    assert [name.split(".")[-2] for name in differing] == ["position_embedding"]
    assert model.config.patch_grid == (8, 8) and processor.num_vision_tokens == 36


def test_an_image_of_all_patches_changes_nothing():
    model, processor = tiny_model_and_processor(width=32)
    same, same_processor = shrink_image(model, processor, 64)
    image = SyntheticVQA(1, 0)[0]["image"]
    logits = [
        m(**p(images=image, text=PROMPT, num_vision_tokens=64, return_tensors="pt")).logits
        for m, p in ((model, processor), (same, same_processor))
    ]
    torch.testing.assert_close(*logits)
