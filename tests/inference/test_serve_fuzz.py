"""Requests of OpenAI's form with valid, odd and hostile values: each is answered or refused, none fails or hangs."""

import asyncio
import base64
import copy
import io
import json
import os

import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.data.synthetic import draw_scene


httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from tokenflex.inference import serve  # noqa: E402


REQUESTS = int(os.environ.get("FUZZ_REQUESTS", 100))  # more of them are others each time
LONGEST = 60  # seconds for an answer; most take some hundredths of one


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def data_url(content):
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


SCENE = draw_scene(5, 0).image
CONTENTS = [
    *(encoded(SCENE, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")),
    *(encoded(Image.new(mode, (3, 200))) for mode in ("1", "L", "LA", "P", "RGBA", "I;16")),
    *(encoded(Image.new("RGB", size)) for size in ((1, 1), (1, 5000), (2000, 2000))),
    encoded(Image.new("L", (8, 8)), "PPM"),
    encoded(SCENE)[:-40],
    encoded(SCENE)[:30],
    encoded(SCENE).replace(b"IDAT", b"IDAX"),
    encoded(Image.new("1", (30000, 30000))),
    b"GIF89a",
    b"<svg/>",
    b"",
]
URLS = [
    *map(data_url, CONTENTS),
    "data:image/png;base64,%%%",
    "data:",
    "data:image/png,\ud800",
    "http://127.0.0.1:9/a.png",
    "http://[",
    "https://",
    "file:///etc/hostname",
    "/etc/hostname",
    "",
]
TEXTS = [
    *("which color is the paper?", "", " ", "\0", "\n" * 9, "which " * 400, "\ud83d", "日本", "e\u0301\u202e"),
    *("<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|im_", "end|>", "{{ 1 }}", "{% raw %}", "[INST]"),
]
HUGE = [2**31, 2**63, -(2**63), 2**64, 10**400, 1e308, -1e308, 5e-324, 1e-40, float("nan"), float("inf")]

texts = st.sampled_from(TEXTS) | st.text(st.characters(), max_size=20)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(HUGE) | texts
junk = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
junk |= st.sampled_from([json.loads("[" * depth + "]" * depth) for depth in (50, 400)])


@st.composite
def often(draw, valid, odd=junk):
    """So that a good part of all requests, of which each has several values, is answered."""
    return draw(odd if draw(st.sampled_from(range(25))) == 24 else valid)


@st.composite
def bent(draw, fields):
    """Mostly the dictionary as it is; else a field fewer, more, null, of another's value or of junk."""
    said = draw(fields)
    name = draw(st.sampled_from([*said, "image_url", "text", "detail", "name", "tool_calls"]))
    match draw(st.sampled_from(range(80))):
        case 0:
            said.pop(name, None)
        case 1:
            said[name] = None
        case 2:
            said[name] = draw(junk)
        case 3:
            said[name] = draw(st.sampled_from(list(said.values())))
        case 4:
            said[draw(texts)] = draw(junk)
    return said


spoken = often(st.sampled_from(["which color is the paper?", "red", "日本"]) | st.text(min_size=1, max_size=20), texts)
urls = often(st.sampled_from(URLS[:9]), st.sampled_from(URLS))
sources = bent(st.fixed_dictionaries({"url": urls}, optional={"detail": st.sampled_from(["low", "auto"])}))
parts = st.one_of(
    bent(st.fixed_dictionaries({"type": st.just("text"), "text": spoken})),
    bent(st.fixed_dictionaries({"type": st.just("image_url"), "image_url": sources})),
    bent(st.fixed_dictionaries({"type": st.just("input_image"), "image_url": urls})),
)
roles = often(st.sampled_from(["user", "assistant", "system", "developer"]), st.sampled_from(["tool", "<|im_end|>"]))
messages = bent(
    st.fixed_dictionaries({"role": roles, "content": often(spoken | st.lists(parts, min_size=1, max_size=3))})
)
numbers = st.integers(-3, 3) | st.floats(-3, 3) | st.sampled_from(HUGE)
usages = st.fixed_dictionaries({}, optional={"include_usage": st.booleans(), "include_obfuscation": st.just(False)})
FIELDS = {
    "stream": (st.booleans(), junk),
    "stream_options": (usages, st.dictionaries(texts, scalars, max_size=2)),
    "max_tokens": (st.integers(1, 6), numbers),
    "max_completion_tokens": (st.integers(1, 6), numbers),
    "temperature": (st.floats(0, 2) | st.sampled_from([0, 1e-40, 5e-324]), numbers),
    "top_p": (st.floats(0, 1), numbers),
    "logit_bias": (
        st.dictionaries(st.integers(0, 500), st.floats(-100, 100), max_size=3),
        st.dictionaries(texts, numbers),
    ),
    "stop": (st.none() | spoken | st.lists(spoken, max_size=4), st.lists(texts, max_size=20)),
    "seed": (st.integers(-(2**63), 2**63 - 1), numbers),
    "num_vision_tokens": (
        st.sampled_from([4, 9, "low", "auto", "4x6"]),
        st.sampled_from([5, -1, "6x4,4", "9" * 5000, [4, "low"], [[4, 6]], 10**400]),
    ),
    "chat_template_kwargs": (
        st.dictionaries(st.sampled_from(["style", "terse"]), spoken | st.booleans(), max_size=2),
        st.dictionaries(st.sampled_from(["style", "num_vision_tokens", "range"]) | texts, junk, max_size=2),
    ),
    "model": (st.none(), texts),
    "n": (st.just(1), numbers),
    "tools": (st.just([]), junk),
    "response_format": (st.just({"type": "text"}), st.just({"type": "json_object"})),
    "logprobs": (st.just(False), junk),
    "frequency_penalty": (st.just(0), numbers),
    "user": (texts, junk),
    "metadata": (junk, junk),
}


@st.composite
def bodies(draw):
    names = draw(st.lists(st.sampled_from([*FIELDS]), unique=True, max_size=5))
    body = {"messages": draw(often(st.lists(messages, min_size=1, max_size=3)))}
    body |= {name: draw(often(*FIELDS[name])) for name in names}
    return {**body, draw(texts): draw(junk)} if draw(st.sampled_from(range(30))) == 29 else body


@pytest.fixture(scope="module")
def app(calibrated, tmp_path_factory):
    """Of a model with short answers, whose template takes variables."""
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    model, processor = copy.deepcopy(calibrated)
    processor.chat_template = "{% if terse %}be brief. {% endif %}{{ style }}" + processor.chat_template
    model.generation_config.max_new_tokens = 4
    model.config.text_config.max_position_embeddings = 256
    save_checkpoint(folder, model, processor)
    return serve.build_app(str(folder), max_megapixels=1, max_images=3, keep_images=2, device_map="cpu")


async def post(app, content):
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        headers = {"Content-Type": "application/json"}
        return await asyncio.wait_for(client.post("/v1/chat/completions", content=content, headers=headers), LONGEST)


ASKED = [{"role": "user", "content": "which color is the paper?"}]


@example({"messages": ASKED})
@example({"messages": ASKED, "stream": True, "temperature": 1.0, "seed": 2**63 - 1, "stop": "e"})
@example({"messages": ASKED, "stream": True, "seed": 2**64})
@example({"messages": ASKED, "temperature": 1e-40, "seed": 0})
@example([])
@given(bodies())
@settings(
    max_examples=REQUESTS,
    derandomize="FUZZ_REQUESTS" not in os.environ,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
def test_every_request_is_answered_or_refused(app, body):
    reply = asyncio.run(post(app, json.dumps(body)))
    event(f"status {reply.status_code}")
    assert reply.status_code in (200, 400), reply.text
    if reply.status_code == 400:
        assert reply.json()["error"]["message"]
    elif reply.headers["content-type"].startswith("text/event-stream"):
        assert "server_error" not in reply.text
        assert reply.text.endswith("data: [DONE]\n\n")
    else:
        assert isinstance(reply.json()["choices"][0]["message"]["content"], str)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b'{"messages": ' + b"[" * 100_000, b"9" * 5000, b"null", b'"a"']
)
def test_what_is_no_json_object_is_refused(app, content):
    reply = asyncio.run(post(app, content))
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]
