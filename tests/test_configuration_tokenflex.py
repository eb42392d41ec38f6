import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, Qwen2Config, SiglipVisionConfig

from tokenflex import (
    TokenFlexConfig,
    TokenFlexForConditionalGeneration,
    resolve_vision_token_grid,
    resolve_vision_token_grids,
)


PATCH_GRID = (27, 27)


@given(st.integers(-5, 1500), st.integers(1, 32), st.integers(1, 32))
def test_a_count_is_taken_exactly_or_refused_with_the_nearest_allowed(count, rows, columns):
    allowed = [side * side for side in range(1, min(rows, columns) + 1)]
    if count in allowed:
        assert resolve_vision_token_grid(count, (rows, columns)) == (math.isqrt(count), math.isqrt(count))
        return
    with pytest.raises(ValueError, match=f"`num_vision_tokens`={count}:") as error:
        resolve_vision_token_grid(count, (rows, columns))
    nearest = min(allowed, key=lambda candidate: abs(candidate - count))
    named = str(error.value).rsplit("Nearest: ")[1].rstrip(".").split(" or ")
    assert str(nearest) in named and set(map(int, named)) <= set(allowed)


@given(st.integers(-2, 40), st.integers(-2, 40))
def test_a_grid_is_taken_when_it_is_within_the_patch_grid(rows, columns):
    if 1 <= rows <= 27 and 1 <= columns <= 27:
        assert resolve_vision_token_grid((rows, columns), PATCH_GRID) == (rows, columns)
    else:
        with pytest.raises(ValueError, match=r"a grid is \(rows, columns\)"):
            resolve_vision_token_grid((rows, columns), PATCH_GRID)


@pytest.mark.parametrize("value", [2.0, "64", True, None, (1, 2, 3), (2.5, 2), ("a", "b")])
def test_what_is_no_integer_is_refused(value):
    with pytest.raises(ValueError, match="num_vision_tokens"):
        resolve_vision_token_grid(value, PATCH_GRID)


def test_integers_of_other_libraries_are_integers():
    assert resolve_vision_token_grid(torch.tensor(64), PATCH_GRID) == (8, 8)


def test_a_list_has_one_count_per_image():
    assert resolve_vision_token_grids([64, (2, 3)], 2, PATCH_GRID) == [(8, 8), (2, 3)]
    with pytest.raises(ValueError, match="lists 2 counts for 3 images"):
        resolve_vision_token_grids([64, 144], 3, PATCH_GRID)
    with pytest.raises(ValueError, match=r"num_vision_tokens\[1\]"):
        resolve_vision_token_grids([64, 65], 2, PATCH_GRID)


def test_defaults_are_the_papers():
    config = TokenFlexConfig()
    assert config.patch_grid == (27, 27)
    assert config.vision_token_choices == [64, 144, 256]
    assert config.vision_token_weights == [0.2, 0.3, 0.5]
    assert (config.vision_config.hidden_size, config.text_config.hidden_size) == (1152, 3584)


def test_towers_are_adjusted_to_what_the_model_needs():
    config = TokenFlexConfig(
        vision_config=SiglipVisionConfig(image_size=384, patch_size=16, vision_use_head=True),
        text_config=Qwen2Config(hidden_size=64, tie_word_embeddings=True),
    )
    assert not config.vision_config.vision_use_head
    assert config.tie_word_embeddings
    assert config.patch_grid == (24, 24)
    assert config.projector_hidden_size == 64


def test_saving_keeps_everything(tmp_path):
    config = TokenFlexConfig(
        vision_token_choices=[16, 49], vision_token_weights=[1, 2], num_vision_tokens=49, projector_hidden_size=77
    )
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == {**config.to_dict(), "_name_or_path": str(tmp_path)} or (
        AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_vision_tokens": 65}, "`num_vision_tokens`=65.*Nearest: 64 or 81"),
        (
            {"vision_token_choices": [64, 1024], "vision_token_weights": [1, 1]},
            r"vision_token_choices\[1\]`=1024.*Nearest: 729",
        ),
        ({"vision_token_choices": [], "vision_token_weights": []}, "`vision_token_choices` is empty"),
        ({"vision_token_choices": [64]}, r"`vision_token_choices`=\[64\].*give both"),
        ({"vision_token_choices": [64, 144], "vision_token_weights": [1.0]}, "1 entries for 2"),
        ({"vision_token_choices": [64, 144], "vision_token_weights": [0.0, 0]}, "not all zero"),
        ({"vision_token_choices": [64, 144], "vision_token_weights": [1, -0.2]}, "not negative"),
        ({"vision_token_choices": [64, 144], "vision_token_weights": [1, float("nan")]}, "finite"),
    ],
)
def test_counts_and_weights_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenFlexConfig(**arguments)


def test_a_towers_config_is_left_as_it_was():
    vision_config = SiglipVisionConfig(image_size=384, patch_size=16)
    assert not TokenFlexConfig(vision_config=vision_config).vision_config.vision_use_head
    assert vision_config.vision_use_head


def test_full_size_model_has_the_right_shapes_and_size():
    with torch.device("meta"):
        model = TokenFlexForConditionalGeneration(TokenFlexConfig())
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.model.named_children()}
    # Qwen2.5-7B's model card: 7.61 billion parameters, 6.53 billion of them outside the embeddings.
    language_model = count["language_model"] + model.lm_head.weight.numel()
    assert language_model == 7_615_616_512
    attention, mlp, norms = 4 * (1152 * 1152 + 1152), 2 * 1152 * 4304 + 4304 + 1152, 4 * 1152
    patches = 14 * 14 * 3 * 1152 + 1152 + 729 * 1152
    assert count["vision_tower"] == 27 * (attention + mlp + norms) + patches + 2 * 1152
    assert count["multi_modal_projector"] == 2 * 1152 * 3584 + 3584 * 3584
    for tokens in (64, 144, 256):
        features = model.get_image_features(torch.empty(2, 3, 384, 384, device="meta"), num_vision_tokens=tokens)
        assert features.pooler_output.shape == (2, tokens, 3584)
        assert features.last_hidden_state.shape == (2, 729, 1152)
