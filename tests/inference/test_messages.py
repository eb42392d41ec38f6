import base64
import io

import pytest
from PIL import Image

from tokenflex.data.synthetic import draw_scene
from tokenflex.inference.messages import MessageReader


IMAGES = [draw_scene(5, index).image for index in range(2)]


def data_url(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def part(image, **more):
    return {"type": "image_url", "image_url": {"url": data_url(image), **more}}


def read(*parts, **limits):
    return MessageReader(**limits).read([{"role": "user", "content": list(parts)}])


def test_messages_become_those_of_chat_templates():
    messages, details = MessageReader().read([
        {"role": "system", "content": "be brief", "name": None},
        {"role": "developer", "content": [{"type": "text", "text": "very", "image_url": None, "detail": None}]},
        {"role": "user", "content": [part(IMAGES[0], detail="low"), {"type": "text", "text": "and"}, part(IMAGES[1])]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "red"}], "refusal": None, "tool_calls": []},
        {"role": "user", "content": [
            {"type": "input_image", "image_url": data_url(IMAGES[1]), "detail": "auto", "text": None},
            {"type": "input_text", "text": "and this?"},
        ]},
        {"role": "assistant", "content": ""},
    ])  # fmt: skip
    assert details == ["low", None, "auto"]
    pictures = [part.pop("image") for message in messages for part in message["content"] if "image" in part]
    assert [image.tobytes() for image in pictures] == [image.tobytes() for image in (*IMAGES, IMAGES[1])]
    assert messages == [
        {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
        {"role": "system", "content": [{"type": "text", "text": "very"}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": ""}]},
    ]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({}, "role`=None: give one of"),
        ({"content": "hello"}, "role`=None: give one of"),
        ({"role": None, "content": "hello"}, "role`=None: give one of"),
        ({"role": "User", "content": "hello"}, "role`='User': give one of system, developer, user, assistant"),
        ({"role": "user<|im_end|>", "content": "hello"}, "role`='user<.im_end.>': give one of"),
        ({"role": ["user"], "content": "hello"}, r"role`=\['user'\]: give one of"),
        ({"role": "tool", "content": "a cat", "tool_call_id": "1"}, "role`='tool': give one of"),
        ({"role": "user"}, "content`=None: give a text"),
        ({"role": "assistant", "content": None}, "content`=None: give a text"),
        ({"role": "user", "content": 3}, "content`=3: give a text"),
        ({"role": "user", "content": {"type": "text", "text": "hello"}}, "content`={.*: give a text, or a list"),
        ({"role": "user", "content": ""}, "content`=.* is empty: give a text"),
        ({"role": "user", "content": []}, "content`=.* is empty: give a text"),
        ({"role": "system", "content": [{"type": "text", "text": ""}]}, "content`=.* is empty: give a text"),
        (
            {"role": "user", "content": "hello", "name": "Ann"},
            "name`='Ann' is not read, only `role`, `content`: leave it out",
        ),
        ({"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, "tool_calls`="),
        ({"role": "assistant", "content": "", "audio": {"id": "1"}}, "audio`="),
    ],
)
def test_a_message_that_would_not_be_read_whole_is_refused_by_its_place(message, reason):
    with pytest.raises(ValueError, match=rf"`messages\[1\]\.{reason}"):
        MessageReader().read([{"role": "user", "content": "hello"}, message])


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (["text"], "a part is a text"),
        ([{"type": "text"}], "a part is a text"),
        ([{"type": "video_url", "video_url": {"url": "/etc/hostname"}}], "a part is a text"),
        ([{"type": "image", "path": "/etc/hostname"}], "a part is a text"),
        ([{"text": "hello"}], "a part is a text"),
        ([{"type": None, "text": "hello"}], "a part is a text"),
        ([{"type": ["text"], "text": "hello"}], "a part is a text"),
        ([{"type": "text", "text": None}], "a part is a text"),
        ([{"type": "text", "image_url": {"url": "data:,"}}], "a part is a text"),
        ([{"type": "text", "text": "hello", "image_url": {"url": "data:,"}}], r"content\[0\].image_url`={"),
        ([{**part(IMAGES[0]), "text": "hello"}], r"content\[0\].text`='hello'"),
        ([{**part(IMAGES[0]), "detail": "low"}], r"content\[0\].detail`='low'"),
        ([part(IMAGES[0], size=4)], r"content\[0\].image_url.size`=4"),
        ([{"type": "image_url"}], "needs `image_url`"),
        ([{"type": "image_url", "image_url": None}], "needs `image_url`"),
        ([{"type": "image_url", "image_url": {"url": None}}], "needs `image_url`"),
        ([{"type": "image_url", "url": "data:,"}], "url`='data:,' is not read, only `type`, `image_url`"),
        ([{"type": "image_url", "image_url": {"url": "/etc/hostname"}}], "neither a data: nor"),
        ([part(IMAGES[0], detail="medium")], "`detail`='medium'; it is one of low, high, auto"),
        ([part(IMAGES[0])] * 3, r"`messages\[0\].content\[2\]`: a request has at most 2 images"),
        ([part(Image.new("L", (700, 1000)))] * 2, r"`messages\[0\].content\[1\]`: .*1.4 megapixels; at most 1 are"),
    ],
)
def test_a_part_that_cannot_be_read_is_refused_by_its_place(parts, reason):
    with pytest.raises(ValueError, match=reason):
        read(*parts, max_megapixels=1, max_images=2)
