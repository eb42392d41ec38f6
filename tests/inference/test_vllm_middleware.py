import json

import pytest


pytest.importorskip("starlette")

from starlette.applications import Starlette  # noqa: E402
from starlette.responses import JSONResponse  # noqa: E402
from starlette.routing import Route  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from tokenflex.inference import vllm_middleware  # noqa: E402
from tokenflex.inference.counts import RequestCounts, parse_num_vision_tokens  # noqa: E402


CHAT = "/v1/chat/completions"
URL = "data:image/png;base64,AA=="


def part(detail=None, url=URL):
    return {"type": "image_url", "image_url": {"url": url, **({"detail": detail} if detail else {})}}


def body(*parts, text="which color?", **fields):
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}], **fields}


@pytest.fixture(scope="module")
def counts(tiny):
    return RequestCounts(tiny[1], tiny[0].config, 16)


def translate(counts, asked, path=CHAT, max_images=3):
    return vllm_middleware.translate(asked, path, counts, max_images)


@pytest.mark.parametrize(
    ("details", "fields", "expected"),
    [
        ([None], {"num_vision_tokens": 4}, 4),
        ([None], {"num_vision_tokens": "low"}, 4),
        ([None], {"num_vision_tokens": "high"}, 36),
        ([None], {"num_vision_tokens": "2x5"}, "2x5"),
        ([None, None], {"num_vision_tokens": [4, "2x5"]}, [4, "2x5"]),
        ([None], {"chat_template_kwargs": {"num_vision_tokens": 9}}, 9),
        ([None], {"mm_processor_kwargs": {"num_vision_tokens": 9}}, 9),
        (["low", "high", None], {}, [4, 36, 16]),
        (["auto", "low"], {}, [16, 4]),
        (["low"], {"num_vision_tokens": 36}, 36),
        ([None], {"num_vision_tokens": 4, "chat_template_kwargs": {"num_vision_tokens": 36}}, 4),
    ],
)
def test_counts_become_arguments_of_the_processor(counts, details, fields, expected):
    translated = translate(counts, body(*map(part, details), **fields))
    assert translated["mm_processor_kwargs"] == {"num_vision_tokens": expected}
    assert "num_vision_tokens" not in translated
    assert "num_vision_tokens" not in translated.get("chat_template_kwargs", {})
    # What arrives is read as it was meant.
    assert parse_num_vision_tokens(json.loads(json.dumps(expected))) is not None


@pytest.mark.parametrize(
    "asked",
    [body(part()), body(), body(part(), chat_template_kwargs={"thinking": False}), {"prompt": "hi"}, {"messages": 4}],
)
def test_what_asks_for_no_count_stays_as_it_is(counts, asked):
    assert translate(counts, asked) == asked


def test_special_tokens_are_added_where_the_template_leaves_them_to_the_tokenizer(pristine_adopted):
    model, processor = pristine_adopted
    counts = RequestCounts(processor, model.config, 16)
    assert translate(counts, body(part()))["add_special_tokens"] is True
    assert translate(counts, body(part(), add_special_tokens=False))["add_special_tokens"] is False


def test_shapes_are_the_requests_to_choose(counts):
    asked = {"num_vision_tokens": 20, "match_aspect_ratio": True, "crop_to_patches": False}
    assert translate(counts, body(part(), mm_processor_kwargs=asked))["mm_processor_kwargs"] == asked


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (body(part(), num_vision_tokens=5), "`num_vision_tokens`=5: a vision-token count is a square"),
        (body(part(), num_vision_tokens=[4, 4]), "lists 2 counts for 1 images"),
        (
            body(part(), num_vision_tokens="auto"),
            "'auto' needs `tokenflex serve` without an engine",
        ),
        (body(part("fine")), "`messages[0].content[0]`: `detail`='fine'"),
        (body(part(), mm_processor_kwargs={"size": {"height": 9}}), "`mm_processor_kwargs.size`"),
        (
            body(part(), mm_processor_kwargs={"crop_to_patches": [True]}),
            "`mm_processor_kwargs.crop_to_patches`=",
        ),
        (body(part(), mm_processor_kwargs=[4]), "`mm_processor_kwargs`=[4]: give names with values"),
        (body(part(), media_io_kwargs={"image": {}}), "`media_io_kwargs` is the server's to set"),
        (body(*[part()] * 4), "The request has 4 images, and this engine takes 3"),
        (body(part(url="file:///a.png")), "its `image_url` is no http(s): or base64 data: URL"),
        (body(part(url="data:,")), "its `image_url` is no http(s): or base64 data: URL"),
        (body(part(), text="<|im_end|>"), "`messages[0]`: the control token '<|im_end|>'"),
        ({"messages": [{"role": "user", "content": ["<|im_end|>"]}]}, "the control token '<|im_end|>'"),
        ({"messages": [{"role": "user<|im_end|>", "content": "hi"}]}, "the control token '<|im_end|>'"),
        (body({"type": "refusal", "refusal": "<|im_end|>"}), "the control token '<|im_end|>'"),
        (body(chat_template_kwargs={"now": "<|im_end|>"}), "`chat_template_kwargs`: the control token"),
        (body({"type": "text", "text": "x", "image": "y"}), "`messages[0].content[0]`: its `image_url` is no"),
        (body({"type": "image_pil", "image_pil": None, "uuid": "a"}), "its `image_url` is no"),
    ],
)
def test_refused_with_the_reason(counts, asked, message):
    with pytest.raises(ValueError) as error:
        translate(counts, asked)
    assert message in str(error.value)


def test_a_checkpoint_that_chooses_has_the_default_there(calibrated):
    counts = RequestCounts(calibrated[1], calibrated[0].config, can_choose=False)
    assert translate(counts, body(part("auto")))["mm_processor_kwargs"] == {"num_vision_tokens": [36]}
    with pytest.raises(ValueError, match="needs `tokenflex serve` without an engine"):
        translate(counts, body(part(), num_vision_tokens="auto"))


@pytest.mark.parametrize("name", ["num_vision_tokens", "mm_processor_kwargs", "media_io_kwargs"])
def test_where_counts_would_be_ignored_they_are_refused(counts, name):
    with pytest.raises(ValueError, match=f"`{name}` is not taken by /v1/messages, only by {CHAT}"):
        translate(counts, body(part(), **{name: {"a": 4}}), "/v1/messages")


def test_a_prefix_of_all_paths_changes_nothing(counts, monkeypatch):
    app = Starlette(routes=[Route(CHAT, lambda _: JSONResponse({}), methods=["POST"])])
    app.add_middleware(vllm_middleware.VisionTokenMiddleware)
    app.state.vllm_config = type("Config", (), {"model_config": "the engine's"})
    monkeypatch.setattr(vllm_middleware, "load_limits", {"the engine's": (counts, 3)}.__getitem__)
    client = TestClient(app, root_path="/api")
    assert client.post(f"/api{CHAT}", json=body(part(), num_vision_tokens=4)).status_code == 200
    assert client.post(f"/api{CHAT}", json=body(part(), num_vision_tokens=5)).status_code == 400


@pytest.fixture
def client(counts, monkeypatch):
    async def echo(request):
        got = (await request.body()).decode(errors="replace")
        return JSONResponse({"got": got, "length": request.headers["content-length"]})

    app = Starlette(routes=[Route(path, echo, methods=["POST", "GET"]) for path in (CHAT, "/other")])
    app.add_middleware(vllm_middleware.VisionTokenMiddleware)
    app.state.vllm_config = type("Config", (), {"model_config": "the engine's"})
    monkeypatch.setattr(vllm_middleware, "load_limits", {"the engine's": (counts, 3)}.__getitem__)
    return TestClient(app)


def test_the_server_gets_the_new_body_and_its_length(client):
    reply = client.post(CHAT, json=body(part(), num_vision_tokens=4)).json()
    assert json.loads(reply["got"])["mm_processor_kwargs"] == {"num_vision_tokens": 4}
    assert int(reply["length"]) == len(reply["got"])


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff", b"[" * 100_000])
def test_what_is_no_request_is_left_to_the_server(client, content):
    assert client.post(CHAT, content=content).status_code == 200


def test_refusals_have_the_form_of_openais(client):
    reply = client.post(CHAT, json=body(part(), num_vision_tokens=5))
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["code"] == 400 and "`num_vision_tokens`=5" in error["message"]
    assert client.post("/other", json={"num_vision_tokens": 4}).status_code == 400
