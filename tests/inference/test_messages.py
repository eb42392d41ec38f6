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
        {"role": "system", "content": "be brief", "name": "somebody"},
        {"role": "user", "content": [part(IMAGES[0], detail="low"), {"type": "text", "text": "and"}, part(IMAGES[1])]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "red"}]},
        {"role": "user", "content": [
            {"type": "input_image", "image_url": data_url(IMAGES[1]), "detail": "auto"},
            {"type": "input_text", "text": "and this?"},
        ]},
    ])  # fmt: skip
    assert details == ["low", None, "auto"]
    pictures = [part.pop("image") for message in messages for part in message["content"] if "image" in part]
    assert [image.tobytes() for image in pictures] == [image.tobytes() for image in (*IMAGES, IMAGES[1])]
    assert messages == [
        {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and this?"}]},
    ]


def test_calls_of_tools_have_objects_for_arguments():
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"where": "left"}'}}
    messages, _ = MessageReader().read(
        [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "a cat", "tool_call_id": "1"},
        ]
    )
    assert messages[0]["tool_calls"] == [{**call, "function": {"name": "look", "arguments": {"where": "left"}}}]
    assert messages[0]["content"] == []
    assert messages[1] == {"role": "tool", "content": [{"type": "text", "text": "a cat"}], "tool_call_id": "1"}
    for broken in ({}, "look", {"function": {"name": "look"}}, {"function": {"arguments": "{"}}):
        with pytest.raises(ValueError, match=r"`messages\[0\].tool_calls`: a call has a `function`"):
            MessageReader().read([{"role": "assistant", "content": None, "tool_calls": [broken]}])


@pytest.mark.parametrize("message", [{}, {"content": "hello"}, {"role": "user"}, {"role": "user", "content": 3}])
def test_a_message_without_role_or_content_is_refused(message):
    with pytest.raises(ValueError, match=r"messages\[1\]"):
        MessageReader().read([{"role": "user", "content": "hello"}, message])


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (["text"], "a part is a text"),
        ([{"type": "text"}], "a part is a text"),
        ([{"type": "video_url", "video_url": {"url": "/etc/hostname"}}], "a part is a text"),
        ([{"type": "image", "path": "/etc/hostname"}], "a part is a text"),
        ([{"type": "image_url"}], "needs `image_url`"),
        ([{"type": "image_url", "image_url": {"url": "/etc/hostname"}}], "neither a data: nor"),
        ([part(IMAGES[0], detail="medium")], "`detail`='medium'; it is one of low, high, auto"),
        ([part(IMAGES[0])] * 3, r"`messages\[0\].content\[2\]`: a request has at most 2 images"),
        ([part(Image.new("L", (700, 1000)))] * 2, r"`messages\[0\].content\[1\]`: .*1.4 megapixels; at most 1 are"),
    ],
)
def test_a_part_that_cannot_be_read_is_refused_by_its_place(parts, reason):
    with pytest.raises(ValueError, match=reason):
        read(*parts, max_megapixels=1, max_images=2)
