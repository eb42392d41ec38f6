import json

import pytest
from helpers import read_rows
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tokenflex.data.examples import BadRowError, to_example
from tokenflex.data.options import INSTRUCTION, ask_with_options, find_letter, read_options


COLORS = ["red", "blue", "dark red"]
IMAGE = Image.new("RGB", (8, 8))


@given(st.lists(st.text().filter(str.strip), max_size=26))
def test_options_are_read_from_lists_and_from_texts_that_hold_one(options):
    assert read_options(options) == read_options(str(options)) == options
    if json.loads(json.dumps(options)) == options and "\\u" not in json.dumps(options):
        assert read_options(json.dumps(options)) == options


@pytest.mark.parametrize(
    "value, texts",
    [
        ("[1.50, 007e1, -2]", ["1.50", "007e1", "-2"]),
        ([1, 2.0, "x"], ["1", "2", "x"]),
        ("['$5', None]", ["$5", "None"]),
        (None, []),
        (float("nan"), []),
        ([], []),
        ("[]", []),
        (" ", []),
    ],
)
def test_other_options(value, texts):
    assert read_options(value) == texts


@pytest.mark.parametrize(
    "value, reason",
    [
        ("A. red B. blue", "its options are 'A. red B. blue': a list"),
        ("red, blue", "a list of texts"),
        ("[red", "a list of texts"),
        ({"A": "red"}, "a list of texts"),
        (3, "a list of texts"),
        (["red", None], "its option is None"),
        (["red", ""], "its option is ''"),
        (["x"] * 27, "27 options"),
    ],
)
def test_what_are_no_options_is_refused(value, reason):
    with pytest.raises(BadRowError, match=reason):
        read_options(value)


@pytest.mark.parametrize(
    "answer, options, letter",
    [
        ("B", COLORS, "B"),
        ("(b)", COLORS, "B"),
        ("B.", COLORS, "B"),
        ("blue", COLORS, "B"),
        (" Blue ", COLORS, "B"),
        (1, COLORS, "B"),
        ("1", COLORS, "B"),
        (1.0, COLORS, "B"),
        ("D", ["A", "B", "C", "D"], "D"),
        ("2", ["6", "3", "4", "2"], "D"),
        (2, [6, 3, 4, 2], "D"),
        (4, ["6", "3", "4", "2"], "C"),
        ("$5", ["$4", "$5"], "B"),
    ],
)
def test_answer_means_an_option(answer, options, letter):
    assert find_letter(answer, options) == letter


@pytest.mark.parametrize(
    "answer, options, reason",
    [
        ("green", COLORS, "none of the options .*letter from A to C, nor an index from 0 to 2"),
        ("D", COLORS, "none of the options"),
        (3, COLORS, "none of the options"),
        (-1, COLORS, "none of the options"),
        ("red or blue", COLORS, "none of the options"),
        (2, ["6", "3", "4", "2"], "may mean the options C and D"),
        ("A", ["B", "A"], "may mean the options A and B"),
        ("red", ["red", "red"], "may mean the options A and B"),
        (None, COLORS, "its answer is None"),
        (float("nan"), COLORS, "its answer is nan"),
        (True, COLORS, "its answer is True"),
    ],
)
def test_answer_that_means_none_or_several_is_refused(answer, options, reason):
    with pytest.raises(BadRowError, match=reason):
        find_letter(answer, options)


@given(st.lists(st.text().filter(str.strip), min_size=1, max_size=26, unique_by=lambda text: text.strip().casefold()))
def test_every_letter_means_its_option_or_is_refused(options):
    for letter in map(chr, range(ord("A"), ord("A") + len(options))):
        try:
            assert find_letter(letter, options) == letter
        except BadRowError as error:
            assert "may mean" in str(error)


@pytest.mark.parametrize("column", ["options", "choices"])
@pytest.mark.parametrize("value", [COLORS, str(COLORS)])
def test_options_are_put_into_the_question(column, value):
    example = to_example({"image": IMAGE, "question": "Which?", column: value, "answer": "blue"})
    asked, answer = example.dialogs[0]
    text = f"Which?\nA. red\nB. blue\nC. dark red\n{INSTRUCTION}"
    assert asked["content"] == [{"type": "image"}, {"type": "text", "text": text}]
    assert text == ask_with_options("Which?", COLORS)
    assert answer["content"] == [{"type": "text", "text": "B"}] and example.options == [COLORS]


def test_each_of_several_questions_has_options_or_none():
    row = {"questions": ["a?", "b?"], "answers": [1, "free"], "options": [COLORS, []]}
    example = to_example(row)
    assert example.options == [COLORS, []]
    assert [dialog[1]["content"][0]["text"] for dialog in example.dialogs] == ["B", "free"]
    assert example.dialogs[1][0]["content"] == [{"type": "text", "text": "b?"}]
    for options in (COLORS[:2], COLORS, [COLORS], "x"):
        with pytest.raises(BadRowError, match="options"):
            to_example({**row, "options": options})


def test_question_with_an_empty_list_of_options_is_asked_as_it_is():
    example = to_example({"question": "How many?", "options": [], "answer": "6"})
    assert example == to_example({"question": "How many?", "answer": "6"}) and example.options is None


def test_rows_of_multiple_choice_sets_are_read_whole(tmp_path, caplog):
    IMAGE.save(tmp_path / "0.png")
    rows = [
        {"id": "6", "question": "Which?\n<image1>", "options": ["A", "B", "C"], "answer": "C", "level": 1},
        {"id": "7", "question": "How many?\n<image1>", "options": [], "answer": "6", "level": 2},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, "image": "0.png"}) + "\n" for row in rows))
    first, second = read_rows(str(path))
    assert [part.get("text") for part in first.dialogs[0][0]["content"]] == [
        "Which?", None, f"A. A\nB. B\nC. C\n{INSTRUCTION}",
    ]  # fmt: skip
    assert [part.get("text") for part in second.dialogs[0][0]["content"]] == ["How many?", None]
    assert caplog.text.count("columns that are not used: 'id', 'level'") == 1
