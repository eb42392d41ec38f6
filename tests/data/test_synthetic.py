from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflex.data.synthetic import (
    COARSE_FAMILIES,
    COLORS,
    DETAIL_FAMILIES,
    DIGITS,
    FAMILIES,
    PAPERS,
    PLACES,
    SyntheticVQA,
    draw_scene,
)


positions = st.tuples(st.integers(0, 2000), st.integers(0, 10_000))
KNOWN = {**COLORS, **PAPERS}


def color_map(image):
    pixels = np.asarray(image, dtype=int)
    distance = np.abs(pixels[:, :, None] - np.array(list(KNOWN.values()))).max(-1)
    return np.array(list(KNOWN))[distance.argmin(-1)]


def bounding_box(mask):
    rows, columns = np.where(mask.any(1))[0], np.where(mask.any(0))[0]
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def connected_components(mask):
    mask, found = mask.copy(), 0
    while mask.any():
        found += 1
        stack = [tuple(np.argwhere(mask)[0])]
        while stack:
            y, x = stack.pop()
            if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x]:
                mask[y, x] = False
                stack += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    return found


def read_shape(mask):
    box = mask[bounding_box(mask)]
    height, width = box.shape
    if box[0, 0]:
        return "square"
    if box[-1, 0] and box[-1, -1]:
        return "triangle"
    return "circle" if box[height // 4, width // 4] else "cross"


def read_digit(mask):
    bits = "".join("01"[int(bit)] for bit in mask[bounding_box(mask)][::2, ::2].flatten())
    return str(DIGITS.index(bits))


def read_answer(family, question, shown, asked):
    """The answer that the pixels give; `asked` holds what the scene's other questions ask about."""
    words = question.rstrip("?").replace(",", "").split()
    if family == "paper_color":
        return shown[0, 0]
    if family == "cell_color":
        row, column = (int(word) for word in words if word.isdigit())
        return shown[12 * row - 5, 12 * column - 5]
    if family == "dot_count":
        return str(connected_components(shown == words[2]))
    if family in ("bar_value", "tallest_bar"):
        heights = {color: (shown == color).any(1).sum() for color in COLORS if (shown == color).any()}
        return max(heights, key=heights.get) if family == "tallest_bar" else str(heights[words[4]] // 6)
    areas = {color: shown == color for color in COLORS if (shown == color).any()}
    if family == "digit_value":
        return read_digit(areas[words[3]])
    if family == "digit_color":
        return next(color for color in asked["digit_value"] if read_digit(areas[color]) == words[-1])
    big = max(areas, key=lambda color: areas[color].sum())
    if family == "shape_color":
        return big
    if family == "shape_kind":
        return read_shape(areas[big])
    rows, columns = bounding_box(areas[big])
    return PLACES[2 * (rows.start >= 32) + (columns.start >= 32)]


@given(positions)
@settings(deadline=None, max_examples=150)
def test_answers_can_be_read_off_the_pixels(position):
    scene = draw_scene(*position)
    shown = color_map(scene.image)
    asked = defaultdict(list)
    for family, question, _ in scene.questions:
        asked[family].append(question.rstrip("?").split()[-1])
    for family, question, answer in scene.questions:
        assert read_answer(family, question, shown, asked) == answer, question


@given(st.lists(positions, min_size=2, max_size=5, unique=True))
@settings(deadline=None, max_examples=20)
def test_scene_is_a_function_of_seed_and_index(asked):
    first = {position: draw_scene(*position) for position in asked}
    for position in reversed(asked):
        np.random.seed(position[0])
        again = draw_scene(*position)
        assert again.image.tobytes() == first[position].image.tobytes()
        assert again.questions == first[position].questions
        assert (again.labels == first[position].labels).all()


def test_no_two_scenes_are_alike():
    drawn = [draw_scene(seed, index).image.tobytes() for seed in range(5) for index in range(100)]
    assert len(set(drawn)) == len(drawn)


@given(positions)
@settings(deadline=None, max_examples=50)
def test_no_question_is_asked_twice_of_an_image(position):
    questions = [question for _, question, _ in draw_scene(*position).questions]
    assert len(set(questions)) == len(questions)


@pytest.fixture(scope="module")
def answers():
    answers = defaultdict(list)
    for row in SyntheticVQA(3000, seed=11):
        for family, answer in zip(row["families"], row["answers"]):
            answers[family].append(answer)
    return answers


def test_every_family_occurs_often_enough_to_be_scored(answers):
    assert sorted(answers) == sorted(FAMILIES) == sorted({*COARSE_FAMILIES, *DETAIL_FAMILIES})
    assert min(map(len, answers.values())) > 100


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_can_be_guessed(answers, family):
    assert Counter(answers[family]).most_common(1)[0][1] / len(answers[family]) < 0.45


def test_rows_are_plain_indexing_and_iteration():
    rows = SyntheticVQA(12, seed=3, questions_per_image=4)
    assert len(rows) == len(list(rows)) == 12
    for index, row in enumerate(rows):
        assert row["questions"] == rows[index]["questions"]
        assert 1 <= len(row["questions"]) == len(row["answers"]) == len(row["families"]) <= 4
        known = draw_scene(3, index).questions
        assert set(zip(row["families"], row["questions"], row["answers"])) <= set(known)
    for index in (-1, 12):
        with pytest.raises(IndexError):
            rows[index]


def test_fewer_questions_are_a_part_of_more():
    few, many = SyntheticVQA(10, 0, questions_per_image=2), SyntheticVQA(10, 0, questions_per_image=5)
    assert all(set(few[i]["questions"]) <= set(many[i]["questions"]) for i in range(10))
