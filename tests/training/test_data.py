import io
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tokenflex.training.data import BadRowError, decode_image, to_example


IMAGE = Image.effect_noise((13, 9), 60).convert("RGB")
QUESTION, ANSWER = "which color is it?", "red"
TURNS = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


PNG = encoded(IMAGE)


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


def test_image_parts_stand_where_the_row_puts_them():
    text = "first <image> then <image> which?"
    parts = to_example({"images": [IMAGE, IMAGE], "messages": [{"role": "user", "content": text}, TURNS[1]]})
    assert [part["type"] for part in parts.dialogs[0][0]["content"]] == ["text", "image", "text", "image", "text"]


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
        ({}, "no image"),
        ({"image": IMAGE}, "question is None"),
        ({"image": Image.new("F", (4, 4)), "question": QUESTION, "answer": ANSWER}, "mode F"),
        ({"question": QUESTION, "answer": ANSWER}, "no image"),
        ({"images": [], "question": QUESTION, "answer": ANSWER}, "no image"),
        ({"image": None, "question": QUESTION, "answer": ANSWER}, "no image"),
        ({"image": {"bytes": None, "path": None}, "question": QUESTION, "answer": ANSWER}, "NoneType"),
        ({"image": 3, "question": QUESTION, "answer": ANSWER}, "int"),
        ({"image": IMAGE, "question": QUESTION}, "answer is None"),
        ({"image": IMAGE, "question": QUESTION, "answer": ""}, "answer is ''"),
        ({"image": IMAGE, "question": QUESTION, "answer": " \n"}, "answer is"),
        ({"image": IMAGE, "question": "", "answer": ANSWER}, "question is ''"),
        ({"image": IMAGE, "question": QUESTION, "answer": True}, "answer is True"),
        ({"image": IMAGE, "questions": ["a", "b"], "answers": ["c"]}, "2 questions but 1 answers"),
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


@given(
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP", "PPM", "DDS", "ICO"]),
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4),
    kept=st.floats(0, 1),
)
@settings(deadline=None, max_examples=300, derandomize=True)
def test_damaged_bytes_decode_or_are_refused(kind, changes, kept):
    damaged = bytearray(encoded(IMAGE, kind))
    for position, value in changes:
        damaged[position % min(len(damaged), 64)] = value
    try:
        image = decode_image(bytes(damaged[: round(kept * len(damaged))]))
    except BadRowError:
        return
    assert image.getpixel((0, 0)) is not None


def test_truncated_bytes_are_refused():
    for length in range(3 * len(PNG) // 4):
        with pytest.raises(BadRowError):
            decode_image(PNG[:length])
