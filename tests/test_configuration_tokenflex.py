import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    IJepaConfig,
    InternVLVisionConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from tokenflex import (
    TokenFlexConfig,
    TokenFlexForConditionalGeneration,
    match_vision_token_grid,
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


@pytest.mark.parametrize("top", [None, True, False])
@pytest.mark.parametrize("text", [True, False])
def test_the_top_level_says_if_the_head_is_tied_else_the_text_config(tmp_path, top, text):
    text_config = Qwen2Config(hidden_size=64, tie_word_embeddings=text)
    said = {} if top is None else {"tie_word_embeddings": top}
    made = TokenFlexConfig(text_config=text_config, **said)
    assert text_config.tie_word_embeddings == text, "the caller's is left alone"
    made.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written["text_config"]["tie_word_embeddings"] = text  # as another program may have written it
    written |= {"tie_word_embeddings": top}
    (tmp_path / "config.json").write_text(json.dumps(written))
    for config in (made, AutoConfig.from_pretrained(tmp_path)):
        assert (config.tie_word_embeddings, config.text_config.tie_word_embeddings) == (top if said else text,) * 2


def test_a_checkpoint_of_another_type_is_refused(tmp_path):
    Qwen2Config(hidden_size=64).save_pretrained(tmp_path)
    for load in (TokenFlexConfig.from_pretrained, TokenFlexForConditionalGeneration.from_pretrained):
        with pytest.raises(ValueError, match="The checkpoint is of type 'qwen2', not 'tokenflex'"):
            load(tmp_path)


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
    before = vision_config.to_dict()
    assert not TokenFlexConfig(vision_config=vision_config).vision_config.vision_use_head
    assert vision_config.to_dict() == before


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


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_matched_grids_are_the_nearest_of_all(data):
    patch_grid = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    count = data.draw(st.integers(1, patch_grid[0] * patch_grid[1]))
    height, width = data.draw(st.tuples(st.integers(1, 5000), st.integers(1, 5000)))
    ideal = math.sqrt(count * height / width), math.sqrt(count * width / height)

    def distance(grid):
        return abs(math.log(grid[0] / ideal[0])) + abs(math.log(grid[1] / ideal[1]))

    grid = match_vision_token_grid(count, (height, width), patch_grid)
    allowed = [
        (rows, columns)
        for rows in range(1, patch_grid[0] + 1)
        for columns in range(1, patch_grid[1] + 1)
        if rows * columns <= count
    ]
    assert grid in allowed
    assert distance(grid) <= min(map(distance, allowed)) + 1e-9
    turned = match_vision_token_grid(count, (width, height), patch_grid[::-1])
    assert distance(turned[::-1]) == pytest.approx(distance(grid)), "turning the image turns the grid"


@pytest.mark.parametrize("side", range(1, 17))
def test_square_images_get_square_grids(side):
    assert match_vision_token_grid(side * side, (640, 640), (27, 27)) == (side, side)


def test_matched_grids_follow_the_image():
    assert match_vision_token_grid(256, (720, 1280), (27, 27)) == (12, 21)
    assert match_vision_token_grid(256, (1280, 720), (27, 27)) == (21, 12)
    assert match_vision_token_grid(64, (10, 10000), (27, 27)) == (1, 27)


@pytest.mark.parametrize("count", [0, 730, 2.5, "64", None, True, [4]])
def test_counts_to_match_are_checked(count):
    with pytest.raises(
        ValueError, match="with `match_aspect_ratio`, a vision-token count is an integer from 1 to 729"
    ):
        match_vision_token_grid(count, (10, 10), (27, 27))


def test_lists_of_counts_stand_for_images_or_tiles():
    resolve = resolve_vision_token_grids
    assert resolve([4, (2, 3)], 4, (8, 8), num_tiles=[3, 1]) == [(2, 2)] * 3 + [(2, 3)]
    assert resolve([4, 9, 16, 4], 4, (8, 8), num_tiles=[3, 1]) == [(2, 2), (3, 3), (4, 4), (2, 2)]
    with pytest.raises(ValueError, match="lists 3 counts for 2 images cut into 4 tiles"):
        resolve([4, 9, 16], 4, (8, 8), num_tiles=[3, 1])
    with pytest.raises(ValueError, match=r"`num_vision_tokens\[1\]`=5"):
        resolve([4, 5], 4, (8, 8), num_tiles=[3, 1])
    assert resolve([8, (2, 3)], 2, (8, 8), image_shapes=[(10, 20), (10, 20)]) == [(2, 4), (2, 3)]
    with pytest.raises(ValueError, match="`image_shapes` holds 1 sizes for 2 images"):
        resolve(8, 2, (8, 8), image_shapes=[(10, 20)])


@pytest.mark.parametrize(
    ("vision_config", "prefix_tokens"),
    [
        (SiglipVisionConfig(), 0),
        (CLIPVisionConfig(), 1),
        (Dinov2Config(image_size=224), 1),
        (Dinov2WithRegistersConfig(image_size=224, num_register_tokens=4), 5),
        (InternVLVisionConfig(), 1),
    ],
)
def test_class_tokens_and_registers_are_counted_by_rule(vision_config, prefix_tokens):
    counts = {"num_vision_tokens": 49, "vision_token_choices": [49], "vision_token_weights": [1.0]}
    assert TokenFlexConfig(vision_config=vision_config, **counts).num_prefix_tokens == prefix_tokens
    with pytest.raises(ValueError, match=f"`num_prefix_tokens`=7 .* it has {prefix_tokens}"):
        TokenFlexConfig(vision_config=vision_config, num_prefix_tokens=7, **counts)


def test_an_unknown_tower_must_say_its_prefix():
    vision_config = IJepaConfig(image_size=224, patch_size=14)
    with pytest.raises(
        ValueError, match="'ijepa': say how many class tokens and registers it has. Known towers: clip"
    ):
        TokenFlexConfig(vision_config=vision_config)
    assert TokenFlexConfig(vision_config=vision_config, num_prefix_tokens=0).num_prefix_tokens == 0
