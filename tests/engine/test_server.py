"""vLLM's server behind this package's middleware: what is asked is what is answered, or refused with the reason."""

import base64
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from helpers import chat_prompt
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import tokenflex  # noqa: F401
from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.data.synthetic import draw_scene
from tokenflex.inference.counts import RequestCounts
from tokenflex.inference.vllm_middleware import FIELDS


REQUESTS = int(os.environ.get("FUZZ_REQUESTS", 500))
PORT = 18231
NEW_TOKENS = 8
IMAGES = [draw_scene(5, index).image for index in range(6)]
QUESTIONS = ["which color is the paper?", "how many dots are there?", "which shape is it?"]


@pytest.fixture(scope="module")
def checkpoint(pristine, tmp_path_factory):
    path = Path(os.environ.get("TOKENFLEX_DEMO", "outputs/demo/checkpoint"))
    if not path.is_dir():
        path = tmp_path_factory.mktemp("server") / "checkpoint"
        save_checkpoint(path, *pristine)
    return path


@pytest.fixture(scope="module")
def reference(checkpoint):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    return model, processor, RequestCounts(processor, model.config, 36)


@pytest.fixture(scope="module")
def server(checkpoint):
    command = [sys.executable, "-m", "tokenflex", "serve", "--engine", "vllm", "--model_name_or_path", str(checkpoint)]
    command += ["--port", str(PORT), "--num_vision_tokens", "36", "--max_images", "4", "--max_megapixels", "1"]
    command += ["--dtype", "float32", "--", "--enforce-eager", "--max-model-len", "1024"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = []
    for line in running.stdout:
        said.append(line)
        if "Application startup complete" in line:
            break
    else:
        pytest.fail("".join(said))
    log = Path(checkpoint).parent / "server.log"
    once = httpx.Limits(max_keepalive_connections=0)  # vLLM closes what is idle for 5 s
    with log.open("w") as rest, subprocess.Popen(["cat"], stdin=running.stdout, stdout=rest):
        with httpx.Client(base_url=f"http://localhost:{PORT}", timeout=120, limits=once) as client:
            yield client
        assert running.poll() is None, log.read_text()[-5000:]
        running.terminate()
        running.wait(60)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def part(url, detail=None):
    return {"type": "image_url", "image_url": {"url": url, **({} if detail is None else {"detail": detail})}}


def body(urls, question=QUESTIONS[0], details=None, **fields):
    parts = [part(url, detail) for url, detail in zip(urls, details or [None] * len(urls))]
    message = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
    return {"messages": [message], "max_tokens": NEW_TOKENS, "temperature": 0, "return_token_ids": True, **fields}


def ask(server, asked):
    content = asked if isinstance(asked, bytes) else json.dumps(asked)
    return server.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})


def expected(reference, images, question, counts=None, details=None, **options):
    """The ids of the prompt, and those that `generate` answers with."""
    model, processor, resolver = reference
    text = chat_prompt(processor, images, question)
    matches = options.get("match_aspect_ratio")
    resolved = resolver.resolve(counts, details or [None] * len(images), matches)
    options = {"num_vision_tokens": resolved, **options} if images else {}
    inputs = processor(images=images or None, text=text, return_tensors="pt", **options)
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    length = inputs["input_ids"].shape[1]
    return output[0, :length].tolist(), output[0, length:].tolist()


def assert_answered(server, asked, wanted):
    reply = ask(server, asked)
    assert reply.status_code == 200, (reply.text, asked)
    found = reply.json()
    assert (found["prompt_token_ids"], found["choices"][0]["token_ids"]) == wanted, asked


@pytest.mark.parametrize(
    ("counts", "details"),
    [
        (None, None),
        (4, None),
        ("16", None),
        ("2x5", None),
        ("low", None),
        ("high", None),
        ([16, 4], None),
        (["2x5", 36], None),
        (None, ["low", "high"]),
        (None, ["auto", None]),
        (None, ["auto", "low"]),
        (16, ["low", "high"]),
    ],
)
def test_counts_as_users_write_them(server, reference, counts, details):
    images = IMAGES[:2]
    asked = body([encoded(image) for image in images], details=details, num_vision_tokens=counts)
    wanted = expected(reference, images, QUESTIONS[0], counts, details)
    assert_answered(server, asked, wanted)
    if details is None:
        for way in ("chat_template_kwargs", "mm_processor_kwargs"):
            fields = {way: {"num_vision_tokens": counts}} if counts is not None else {}
            assert_answered(server, body([encoded(image) for image in images], **fields), wanted)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_vision_tokens": 5}, "`num_vision_tokens`=5"),
        ({"num_vision_tokens": [16, 4, 4]}, "lists 3 counts for 2 images"),
        ({"num_vision_tokens": "auto"}, "needs `tokenflex serve` without an engine"),
        ({"num_vision_tokens": {"a": 1}}, "give a count such as 64"),
        ({"num_vision_tokens": 64}, "An image has 64 vision tokens, and this engine has reserved 36"),
        ({"details": ["fine", None]}, "`detail`='fine'"),
        ({"mm_processor_kwargs": {"size": {"height": 10, "width": 10}}}, "`mm_processor_kwargs.size`"),
        ({"mm_processor_kwargs": {"crop_to_patches": True}}, "vision tokens, and this engine has reserved 36"),
        ({"media_io_kwargs": {"image": {"image_mode": "L"}}}, "`media_io_kwargs` is the server's"),
        ({"question": "<|im_end|> hi"}, "control token '<|im_end|>'"),
    ],
)
def test_refused_with_the_reason(server, fields, message):
    wide = Image.new("RGB", (300, 64)) if "mm_processor_kwargs" in fields else IMAGES[0]
    reply = ask(server, body([encoded(wide), encoded(IMAGES[1])], **fields))
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]


def test_too_many_images_are_refused_with_both_numbers(server):
    reply = ask(server, body([encoded(IMAGES[0])] * 5))
    assert reply.status_code == 400
    assert {"5", "4"} <= set(reply.json()["error"]["message"].replace(",", " ").replace(".", " ").split())


def test_counts_elsewhere_are_refused(server):
    reply = server.post("/v1/completions", json={"prompt": "hi", "max_tokens": 2, "num_vision_tokens": 4})
    assert reply.status_code == 400
    assert "`num_vision_tokens` is not taken by /v1/completions" in reply.json()["error"]["message"]
    assert server.post("/v1/completions", json={"prompt": "hi", "max_tokens": 2}).status_code == 200


def test_tokens_are_counted_as_they_are_answered(server, reference):
    asked = {
        name: value for name, value in body([encoded(IMAGES[0])], num_vision_tokens=4).items() if name == "messages"
    }
    reply = server.post("/tokenize", json={**asked, "num_vision_tokens": 4})
    assert reply.status_code == 200, reply.text
    assert reply.json()["count"] == len(expected(reference, IMAGES[:1], QUESTIONS[0], 4)[0])


KINDS = [
    lambda image: (image, encoded(image)),
    lambda image: (image, encoded(image, "BMP")),
    lambda image: (image.convert("L"), encoded(image.convert("L"))),
    lambda image: (image.convert("RGBA"), encoded(image.convert("RGBA"))),
    lambda image: (image.convert("P").convert("RGB"), encoded(image.convert("P"))),
    lambda image: deep(image),
    lambda image: clear(image),
    lambda image: turned(image, 6),
    lambda image: turned(image, 3),
]
WRONG = [
    {"num_vision_tokens": 5},
    {"num_vision_tokens": -4},
    {"num_vision_tokens": 0},
    {"num_vision_tokens": True},
    {"num_vision_tokens": 4.0},
    {"num_vision_tokens": 10**30},
    {"num_vision_tokens": [4] * 9},
    {"num_vision_tokens": []},
    {"num_vision_tokens": "9x9"},
    {"num_vision_tokens": "lots"},
    {"num_vision_tokens": "auto"},
    {"num_vision_tokens": {"count": 4}},
    {"num_vision_tokens": 49},
    {"chat_template_kwargs": {"num_vision_tokens": 7}},
    {"mm_processor_kwargs": {"num_vision_tokens": 8}},
    {"mm_processor_kwargs": {"max_patches": 10**9}},
    {"mm_processor_kwargs": {"crop_to_patches": [True]}},
    {"mm_processor_kwargs": {"do_resize": False}},
    {"mm_processor_kwargs": {"images_kwargs": {"num_vision_tokens": 4}}},
    {"mm_processor_kwargs": 4},
    {"messages": []},
    {"messages": "hi"},
    {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]}
        ]
    },
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
    {"messages": [{"role": "user", "content": [part("data:,")]}]},
    {"messages": [{"role": "user", "content": [part("data:image/png;base64,%%%")]}]},
    {"messages": [{"role": "user", "content": [part(None)]}]},
    {"messages": [{"role": "nobody", "content": 4}]},
    {"messages": [{"role": "user", "content": 4}]},
    {"messages": [4]},
    {"messages": [{"role": "user", "content": "<|image_pad|> what?"}]},
    {"messages": [{"role": "user", "content": "<|vision_start|>"}]},
    {"max_tokens": -1},
    {"max_tokens": "many"},
    {"temperature": "warm"},
]


def deep(image):
    """Of 16 bits, as scanners save it."""
    gray = image.convert("L")
    return gray, encoded(Image.fromarray(np.asarray(gray).astype(np.uint16) * 256))


def clear(image):
    """Its left half transparent."""
    mask = Image.new("L", image.size, 255)
    mask.paste(0, (0, 0, image.width // 2, image.height))
    shown = Image.composite(image, Image.new("RGB", image.size, "white"), mask)
    image = image.copy()
    image.putalpha(mask)
    return shown, encoded(image)


def turned(image, orientation):
    """A photo as phones save it: the pixels lie as the sensor does, and a tag says how to turn them."""
    back = {6: Image.Transpose.ROTATE_90, 3: Image.Transpose.ROTATE_180}[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    return image, encoded(image.transpose(back), exif=exif)


def draw_request(draw: random.Random):
    """A request, and the arguments of `expected`; or `None` in their place if it is to be refused."""
    images = [
        draw.choice(IMAGES).resize((draw.randint(1, 200), draw.randint(1, 200))) for _ in range(draw.randint(0, 4))
    ]
    pairs = [draw.choice(KINDS)(image) for image in images]
    question, fields, wanted = draw.choice(QUESTIONS), {}, {}

    def count():
        return draw.choice([1, 4, 9, 16, 25, 36, "2x5", "8x1", "16"])

    way = draw.randint(0, 4)
    if way == 1:
        wanted["counts"] = fields["num_vision_tokens"] = draw.choice([count(), "low", "high"])
    elif way == 2 and images:
        wanted["counts"] = fields["num_vision_tokens"] = [count() for _ in images]
    elif way == 3 and images:
        wanted["details"] = fields["details"] = [draw.choice(["low", "high", "auto", None]) for _ in images]
    elif way == 4 and images:
        if draw.random() < 0.5:
            wanted |= {"counts": draw.randint(1, 36), "match_aspect_ratio": True}
        else:
            wanted |= {"counts": 1, "crop_to_patches": True}
        fields["mm_processor_kwargs"] = {
            ("num_vision_tokens" if name == "counts" else name): value for name, value in wanted.items()
        }
    asked = body([url for _, url in pairs], question, **fields)
    if draw.random() < 0.4:
        wrong = draw.choice(WRONG)
        if images or "messages" in wrong or "max_tokens" in wrong or "temperature" in wrong:
            plain = {name: value for name, value in asked.items() if name not in FIELDS}
            return {**plain, **wrong}, None
    return asked, {"images": [image for image, _ in pairs], "question": question, **wanted}


def test_random_requests_are_answered_or_refused(server, reference):
    draw, refused = random.Random(0), 0
    for index in range(REQUESTS):
        asked, wanted = draw_request(draw)
        reply = ask(server, asked)
        shown = json.dumps(asked)[:2000]
        if wanted is None:
            refused += 1
            assert reply.status_code == 400, (index, reply.text, shown)
            assert reply.json()["error"]["message"]
            continue
        assert reply.status_code == 200, (index, reply.text, shown)
        found = reply.json()
        tokens = expected(reference, **wanted)
        assert (found["prompt_token_ids"], found["choices"][0]["token_ids"]) == tokens, (index, shown)
    assert server.get("/health").status_code == 200
    assert REQUESTS / 5 < refused < REQUESTS / 2


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"messages": NaN}', b"\xff\xfe", b"[" * 100_000])
def test_bodies_that_are_no_requests_are_refused(server, content):
    assert ask(server, content).status_code in (400, 422)
    assert server.get("/health").status_code == 200


def test_an_address_that_cannot_be_reached_ends_only_its_request(server):
    assert ask(server, body(["http://127.0.0.1:9/a.png"])).status_code == 500  # vLLM's own answer
    assert ask(server, body([encoded(IMAGES[0])])).status_code == 200
