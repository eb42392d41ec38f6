import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflex import TokenFlexConfig, match_vision_token_grid, resolve_vision_token_grid, resolve_vision_tokens
from tokenflex.choices_tokenflex import (
    format_size,
    resolve_named_count,
    resolve_patch_grid,
    sort_choices,
    split_choice,
)
from tokenflex.towers.tiny import tiny_model_and_processor


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
    assert resolve_vision_tokens([64, (2, 3)], 2, TokenFlexConfig()) == ([(8, 8), (2, 3)], [None, None])
    with pytest.raises(ValueError, match="lists 2 counts for 3 images"):
        resolve_vision_tokens([64, 144], 3, TokenFlexConfig())
    with pytest.raises(ValueError, match=r"num_vision_tokens\[1\]"):
        resolve_vision_tokens([64, 65], 2, TokenFlexConfig())


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
    _, processor = tiny_model_and_processor()  # a patch grid of 8 x 8

    def resolve(*args, **kwargs):
        return resolve_vision_tokens(*args, processor, **kwargs)[0]

    assert resolve([4, (2, 3)], 4, num_tiles=[3, 1]) == [(2, 2)] * 3 + [(2, 3)]
    assert resolve([4, 9, 16, 4], 4, num_tiles=[3, 1]) == [(2, 2), (3, 3), (4, 4), (2, 2)]
    with pytest.raises(ValueError, match="lists 3 counts for 2 images cut into 4 tiles"):
        resolve([4, 9, 16], 4, num_tiles=[3, 1])
    with pytest.raises(ValueError, match=r"`num_vision_tokens\[1\]`=5"):
        resolve([4, 5], 4, num_tiles=[3, 1])
    assert resolve([8, (2, 3)], 2, image_shapes=[(10, 20), (10, 20)]) == [(2, 4), (2, 3)]
    with pytest.raises(ValueError, match="`image_shapes` holds 1 sizes for 2 images"):
        resolve(8, 2, image_shapes=[(10, 20)])


@given(st.integers(1, 300), st.integers(1, 30), st.integers(1, 400), st.integers(1, 400))
def test_a_choice_is_a_count_or_grid_with_or_without_a_resolution(count, columns, height, width):
    assert split_choice(count) == (count, None)
    assert split_choice(f"{count}@{height}") == (count, (height, height)) == split_choice(count, height)
    assert (
        split_choice(f"{count}@{height}x{width}") == (count, (height, width)) == split_choice(count, (height, width))
    )
    assert split_choice(f"{count}x{columns}@{height}") == ((count, columns), (height, height))
    assert split_choice(f"{count}@{height}", image_size=height) == (count, (height, height))


@pytest.mark.parametrize(
    "text", ["", "64", "8x12", "@224", "64@", "64@a", "-4@32", "4@32@32", "1x2x3@32", "4@1x2x3", "4 @ 32"]
)
def test_what_is_no_choice_is_refused(text):
    with pytest.raises(ValueError, match="`num_vision_tokens`=.*'64@224', or one of low, high, auto"):
        split_choice(text)


@pytest.mark.parametrize("image_size", [0, -32, 2.5, "224", True, (32,), (32, 0), (32, 32, 32)])
def test_what_is_no_resolution_is_refused(image_size):
    with pytest.raises(ValueError, match="`image_size`=.* give pixels"):
        split_choice(4, image_size)


def test_two_resolutions_are_refused():
    with pytest.raises(ValueError, match="`num_vision_tokens`='4@32' and `image_size`=48 disagree"):
        split_choice("4@32", 48)


def test_choices_are_sorted_by_tokens_then_resolution():
    choices = [36, "16@48", 4, "16@48x32", "4@32"]
    assert sort_choices(choices) == ["4@32", 4, "16@48x32", "16@48", 36]
    assert [resolve_named_count(name, choices) for name in ("low", "high", "auto", 9)] == ["4@32", 36, "auto", 9]


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 20))
def test_a_resolution_is_the_towers_own_or_smaller_multiples_of_the_patch(height, width, patch):
    own = (384, 320)
    if (height, width) == own or (height <= 384 and width <= 320 and height % patch == width % patch == 0):
        assert resolve_patch_grid((height, width), own, (patch, patch)) == (height // patch, width // patch)
        return
    with pytest.raises(ValueError, match=f"`image_size`={format_size((height, width))}:") as error:
        resolve_patch_grid((height, width), own, (patch, patch))
    nearest = str(error.value).rsplit("Nearest: ")[1].rstrip(".").split("x")
    for side, best, most in zip((height, width), map(int, nearest * (3 - len(nearest))), own):
        assert best in (most, min(max(round(side / patch), 1), most // patch) * patch)
