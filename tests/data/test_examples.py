import io
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tokenflex.data.examples import BadRowError, Example, to_example, unused_columns


IMAGE = Image.effect_noise((13, 9), 60).convert("RGB")
QUESTION, ANSWER = "which color is it?", "red"
TURNS = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


PNG = encoded(IMAGE)
INLINE = {"type": "image", "image": IMAGE}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def same(first, second):
    return (
        first.dialogs == second.dialogs
        and [image.size for image in first.images] == [image.size for image in second.images]
        and all(a.convert("RGB").tobytes() == b.convert("RGB").tobytes() for a, b in zip(first.images, second.images))
    )


@pytest.fixture(scope="module")
def image_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "one.png"
    path.write_bytes(PNG)
    return path


@pytest.mark.parametrize(
    "shape", ["pil", "bytes", "path", "string path", "relative path", "datasets bytes", "datasets path"]
)
def test_every_image_shape_gives_the_same_example(shape, image_file):
    value = {
        "pil": IMAGE,
        "bytes": PNG,
        "path": image_file,
        "string path": str(image_file),
        "relative path": image_file.name,
        "datasets bytes": {"bytes": PNG, "path": "elsewhere.png"},
        "datasets path": {"bytes": None, "path": image_file.name},
    }[shape]
    plain = to_example({"image": IMAGE, "question": QUESTION, "answer": ANSWER})
    for key, images in (("image", value), ("images", [value]), ("images", value)):
        row = {key: images, "question": QUESTION, "answer": ANSWER}
        assert same(to_example(row, image_file.parent), plain)


@pytest.mark.parametrize(
    "row",
    [
        {"question": QUESTION, "answer": ANSWER},
        {"question": f"<image>\n{QUESTION}", "answer": ANSWER},
        {"questions": [QUESTION], "answers": [ANSWER]},
        {"messages": TURNS},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
                {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
            ]
        },
        {"messages": [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}, TURNS[1]]},
        {
            "conversations": [
                {"from": "human", "value": f"<image>\n{QUESTION}"},
                {"from": "gpt", "value": ANSWER},
            ]
        },
        {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
        {"question": QUESTION, "answer": ANSWER, "messages": None, "questions": None, "conversations": None},
    ],
)
def test_every_text_shape_gives_the_same_example(row):
    plain = to_example({"image": IMAGE, "question": QUESTION, "answer": ANSWER})
    assert same(to_example({"image": IMAGE, **row}), plain)


@pytest.mark.parametrize(
    "column", [{}, {"image": None}, {"images": None}, {"images": []}, {"images": [], "image": None}]
)
@pytest.mark.parametrize(
    "text",
    [
        {"question": QUESTION, "answer": ANSWER},
        {"questions": [QUESTION], "answers": [ANSWER]},
        {"messages": TURNS},
        {"messages": [user({"type": "text", "text": QUESTION, "image": None}), TURNS[1]]},
        {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
    ],
)
def test_row_without_an_image_is_its_text(column, text):
    with_image = to_example({"image": IMAGE, "question": QUESTION, "answer": ANSWER})
    with_image.dialogs[0][0]["content"].pop(0)
    assert to_example({**column, **text}) == Example([], with_image.dialogs)


def test_questions_without_an_image_are_independent():
    example = to_example({"questions": ["a?", "b?"], "answers": ["c", "d"], "families": ["x", "y"]})
    assert [len(dialog) for dialog in example.dialogs] == [2, 2] and example.families == ["x", "y"]


@pytest.mark.parametrize("column", [{}, {"image": None}, {"images": []}])
@pytest.mark.parametrize("shape", ["image", "bytes", "path as image", "path", "datasets bytes", "datasets path"])
def test_images_in_the_messages_equal_images_in_a_column(column, shape, image_file):
    part = {
        "image": INLINE,
        "bytes": {"type": "image", "image": PNG},
        "path as image": {"type": "image", "image": str(image_file)},
        "path": {"type": "image", "path": image_file.name, "image": None},
        "datasets bytes": {"type": "image", "image": {"bytes": PNG, "path": None}},
        "datasets path": {"type": "image", "image": {"bytes": None, "path": image_file.name}},
    }[shape]
    text = {"type": "text", "text": QUESTION}
    row = {**column, "messages": [user(part, text), TURNS[1]]}
    plain = to_example({"image": IMAGE, "messages": [user({"type": "image"}, text), TURNS[1]]})
    assert same(to_example(row, image_file.parent), plain)
    assert row["messages"][0]["content"][0] is part and part["type"] == "image", "the row is left as it was"


def test_images_in_the_messages_keep_their_order():
    images = [Image.new("RGB", (size, 1)) for size in (1, 2, 3)]
    first, second, third = ({"type": "image", "image": image} for image in images)
    example = to_example({"messages": [user(first, second), TURNS[1], user(third), TURNS[1]]})
    assert [image.size for image in example.images] == [(1, 1), (2, 1), (3, 1)]


def test_image_parts_stand_where_the_row_puts_them():
    text = "first <image> then <image> which?"
    parts = to_example({"images": [IMAGE, IMAGE], "messages": [{"role": "user", "content": text}, TURNS[1]]})
    assert [part["type"] for part in parts.dialogs[0][0]["content"]] == ["text", "image", "text", "image", "text"]


@pytest.mark.parametrize("marker", ["<image1>", "<image 1>", "<image_1>", "<|image_1|>", "<|image|>", "<image>"])
@pytest.mark.parametrize("as_part", [False, True])
def test_markers_of_other_projects_place_the_image(marker, as_part):
    text = f"look at {marker} now"
    content = [{"type": "text", "text": text}] if as_part else text
    row = {"image": IMAGE, "messages": [{"role": "user", "content": content}, TURNS[1]]}
    expected = [{"type": "text", "text": "look at"}, {"type": "image"}, {"type": "text", "text": "now"}]
    assert to_example(row).dialogs[0][0]["content"] == expected


def test_images_are_placed_by_their_numbers():
    images = [Image.new("RGB", (size, 1)) for size in (1, 2, 3)]
    row = {"images": images, "questions": ["<image 3> <image1>, <image_2>?"] * 2, "answers": ["a", "b"]}
    example = to_example(row)
    assert [image.size[0] for image in example.images] == [3, 1, 2]
    assert all(part == {"type": "image"} for part in example.dialogs[1][0]["content"] if part["type"] == "image")
    for questions in (["<image1> <image3> <image2>?", "<image1> <image2> <image3>?"], ["<image><image><image2>?"] * 2):
        with pytest.raises(BadRowError, match="place"):
            to_example({**row, "questions": questions})


def test_white_space_is_kept():
    answer = "    if a:\n\n        return  b \n"
    for row in (
        {"question": " what\n code? ", "answer": answer},
        {"messages": [{"role": "user", "content": " what\n code? "}, {"role": "assistant", "content": answer}]},
        {"conversations": [{"from": "human", "value": " what\n code? "}, {"from": "gpt", "value": answer}]},
    ):
        (asked, answered) = to_example(row).dialogs[0]
        assert asked["content"] == [{"type": "text", "text": " what\n code? "}]
        assert answered["content"] == [{"type": "text", "text": answer}]


def test_columns_that_are_not_used_are_found():
    texts = {"question": QUESTION, "answer": ANSWER, "options": None, "family": "x", "id": 1, "note": float("nan")}
    assert unused_columns({"image": IMAGE, **texts}) == ["id"]
    assert unused_columns({"images": [IMAGE], "image": IMAGE, **texts}) == ["image", "id"]
    assert unused_columns({"messages": TURNS, **texts}) == ["question", "answer", "family", "id"]
    assert unused_columns({"messages": float("nan"), **texts}) == ["id"]
    assert unused_columns({"answers": ["a"], **texts}) == ["answer", "id"]
    assert unused_columns(to_example(texts)) == []


def test_cells_that_are_missing_in_a_table_are_as_if_the_column_were_not_there():
    names = ("messages", "conversations", "questions", "answers", "families", "options", "images", "image")
    row = {"question": QUESTION, "answer": ANSWER, "family": "x"}
    for missing in (None, float("nan")):
        assert to_example({**dict.fromkeys(names, missing), **row}) == to_example(row)


def test_families_are_texts():
    row = {"questions": ["a", "b", "c"], "answers": ["c", "d", "e"], "families": ["x", None, 3]}
    assert to_example(row).families == ["x", "all", "3"]


def test_image_marker_in_an_answer_is_text():
    example = to_example({"image": IMAGE, "question": QUESTION, "answer": "the tag <image>"})
    assert example.dialogs[0][1]["content"] == [{"type": "text", "text": "the tag <image>"}]


def test_example_does_not_alter_the_row():
    row = {"image": IMAGE, "messages": [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}, TURNS[1]]}
    to_example(row)
    assert row["messages"] == [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}, TURNS[1]]


def test_families_go_with_their_questions():
    row = {"image": IMAGE, "questions": ["a", "b"], "answers": ["c", "d"]}
    assert to_example(row).families is None
    assert to_example({**row, "families": ["x", "y"]}).families == ["x", "y"]
    assert to_example({**row, "family": "x"}).families == ["x", "x"]


@pytest.mark.parametrize(
    "row, reason",
    [
        ({}, "question is None"),
        ({"image": IMAGE}, "question is None"),
        ({"image": Image.new("F", (4, 4), 0.5), "question": QUESTION, "answer": ANSWER}, "holds float32 values"),
        ({"question": f"<image>{QUESTION}", "answer": ANSWER}, "its text places 1 images, but it has 0"),
        ({"images": [], "messages": [user({"type": "image"}), TURNS[1]]}, "its text places 1 images, but it has 0"),
        ({"picture": IMAGE, "question": QUESTION, "answer": ANSWER}, "column 'picture'.*rename it to `image`"),
        ({"jpg": {"bytes": PNG, "path": None}, "question": QUESTION, "answer": ANSWER}, "column 'jpg'"),
        ({"image": IMAGE, "messages": [user(INLINE), TURNS[1]]}, "1 images in a column and 1 in its messages"),
        ({"messages": [user(INLINE, {"type": "image"}), TURNS[1]]}, "places 2 images, but it has 1"),
        ({"messages": [user({"type": "image", "url": "https://a.b/c.png"}), TURNS[1]]}, "'url'.*download it"),
        ({"messages": [user({"type": "image", "base64": "abc"}), TURNS[1]]}, "'base64'.*download it"),
        ({"messages": [user({"type": "image_url", "image_url": {"url": "x"}}), TURNS[1]]}, "'image_url'.*download it"),
        ({"messages": [user({"type": "image", "image": "https://a.b/c.png"}), TURNS[1]]}, "address.*download it"),
        ({"messages": [user({"type": "image", "path": "none.png"}), TURNS[1]]}, "none.png"),
        ({"messages": [user({"type": "text", "text": 5}), TURNS[1]]}, "text is 5, not a text"),
        ({"image": "https://a.b/c.png", "question": QUESTION, "answer": ANSWER}, "address.*download it"),
        ({"question": "half a pair \ud83d", "answer": ANSWER}, "surrogate"),
        ({"image": {"bytes": None, "path": None}, "question": QUESTION, "answer": ANSWER}, "NoneType"),
        ({"image": 3, "question": QUESTION, "answer": ANSWER}, "int"),
        ({"image": IMAGE, "question": QUESTION}, "answer is None"),
        ({"image": IMAGE, "question": QUESTION, "answer": ""}, "answer is ''"),
        ({"image": IMAGE, "question": QUESTION, "answer": " \n"}, "answer is"),
        ({"image": IMAGE, "question": "", "answer": ANSWER}, "question is ''"),
        ({"image": IMAGE, "question": QUESTION, "answer": True}, "answer is True"),
        ({"image": IMAGE, "questions": ["a", "b"], "answers": ["c"]}, "2 questions but 1 answers"),
        ({"image": IMAGE, "question": "a", "answers": []}, "question 'a' has no answers"),
        ({"image": IMAGE, "question": "a", "answers": ["b", " "]}, "answer is ' ', not a text"),
        ({"image": IMAGE, "question": "a", "answers": [None, ""]}, "answer is None, not a text"),
        ({"image": IMAGE, "question": "a", "answers": [{"answer_id": 1}]}, "has 'answer_id' but neither"),
        ({"image": IMAGE, "questions": [], "answers": []}, "no questions"),
        ({"image": IMAGE, "questions": ["a", "b"], "answers": ["c", "d"], "families": ["x"]}, "1 families for 2"),
        ({"image": IMAGE, "question": "<image> or <image>?", "answer": ANSWER}, "places 2 images, but it has 1"),
        ({"image": b"", "question": QUESTION, "answer": ANSWER}, "cannot be decoded"),
        ({"image": PNG[: len(PNG) // 2], "question": QUESTION, "answer": ANSWER}, "cannot be decoded"),
        ({"image": b"not an image", "question": QUESTION, "answer": ANSWER}, "cannot be decoded"),
        ({"image": "missing.png", "question": QUESTION, "answer": ANSWER}, "cannot be decoded.*missing.png"),
        ({"image": "null\0byte.png", "question": QUESTION, "answer": ANSWER}, "cannot be decoded"),
        ({"image": Image.new("RGB", (0, 4)), "question": QUESTION, "answer": ANSWER}, "image"),
        ({"image": IMAGE, "messages": []}, "roles"),
        ({"image": IMAGE, "messages": [TURNS[0]]}, "assistant"),
        ({"image": IMAGE, "messages": [TURNS[1]]}, "user"),
        ({"image": IMAGE, "messages": [{"role": "robot", "content": "x"}, TURNS[1]]}, "robot"),
        (
            {"image": IMAGE, "messages": [TURNS[0], {"role": "assistant", "content": ""}]},
            "an assistant's message is empty",
        ),
        ({"image": IMAGE, "messages": [TURNS[0], {"role": "assistant", "content": " "}]}, "empty"),
        (
            {
                "image": IMAGE,
                "messages": [TURNS[0], {"role": "assistant", "content": [{"type": "text", "text": ""}]}],
            },
            "empty",
        ),
        ({"image": IMAGE, "messages": [{"role": "user", "content": None}, TURNS[1]]}, "None"),
        ({"image": IMAGE, "messages": [{"role": "user"}, TURNS[1]]}, "content"),
        ({"image": IMAGE, "messages": ["hello", TURNS[1]]}, "messages"),
        ({"image": IMAGE, "messages": [{"role": "user", "content": ["hello"]}, TURNS[1]]}, ""),
        ({"image": IMAGE, "conversations": "hello"}, "LLaVA"),
        ({"image": IMAGE, "conversations": [{"from": "alien", "value": "x"}]}, "alien"),
        ({"image": IMAGE, "conversations": [{"from": "human"}]}, "value"),
        (
            {"image": IMAGE, "conversations": [{"from": "human", "value": None}, {"from": "gpt", "value": "x"}]},
            "None",
        ),
        ({"image": IMAGE, "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": ""}]}, "empty"),
    ],
)
def test_unusable_row_is_refused_with_its_reason(row, reason):
    with pytest.raises(BadRowError) as caught:
        to_example(row)
    assert re.search(reason, str(caught.value))


def test_image_of_too_many_pixels_is_refused(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(BadRowError, match="DecompressionBombError.*400000000 pixels"):
        to_example({"image": tmp_path / "bomb.png", "question": QUESTION, "answer": ANSWER})


CELLS = st.recursive(
    st.sampled_from(
        [None, True, 3, 0.5, "", "a", "<image>", "user", "assistant", "human", "gpt", "image", "text", b"x"]
    ),
    lambda cells: (
        st.lists(cells, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "type", "text", "image", "path", "url", "bytes"]),
            cells,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(
            ["image", "images", "question", "questions", "answer", "answers", "families", "messages", "conversations"]
        ),
        CELLS,
        max_size=4,
    )
)
@settings(deadline=None, max_examples=500, derandomize=True)
def test_any_row_is_an_example_or_refused(row):
    try:
        example = to_example(row)
    except BadRowError:
        return
    for dialog in example.dialogs:
        parts = [part for message in dialog for part in message["content"]]
        assert sum(part == {"type": "image"} for part in parts) == len(example.images)
        assert all(part["type"] == "image" or isinstance(part["text"], str) for part in parts)


@pytest.mark.parametrize(
    "answers",
    [
        ["2", "two", "two", "2", "3"],
        [{"answer": text, "answer_id": i} for i, text in enumerate(["2", "two", "two", "2", "3"])],
        {"answer": ["2", "two", "two", "2", "3"], "answer_id": [1, 2, 3, 4, 5]},
        {"text": ["2", "two", "two", "2", "3"], "answer_start": [1, 2, 3, 4, 5]},
        ["2", "two", "", "two", None, "2", "3"],
        [2, "two", "two", 2, 3],
    ],
)
def test_of_several_answers_to_a_question_the_commonest_is_trained_on(answers):
    example = to_example({"image": IMAGE, "question": "how many?", "answers": answers})
    assert len(example.dialogs) == 1
    assert example.dialogs[0][1]["content"] == [{"type": "text", "text": "2"}]
    assert example.references == [["2", "two", "two", "2", "3"]]


def test_every_question_of_a_row_may_have_several_answers():
    row = {"image": IMAGE, "questions": ["color?", "shape?"], "answers": [["red", "crimson", "red"], "square"]}
    example = to_example(row)
    assert [dialog[1]["content"][0]["text"] for dialog in example.dialogs] == ["red", "square"]
    assert example.references == [["red", "crimson", "red"], ["square"]]
    assert to_example({**row, "answers": ["red", "square"]}).references is None
