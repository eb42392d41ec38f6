import asyncio
import base64
import io
from contextlib import aclosing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflex.data.synthetic import draw_scene


pytest.importorskip("pydantic")

from tokenflex.inference.chat import ChatModel, Completion, find_stop, until  # noqa: E402
from tokenflex.inference.chat_request import ChatRequest  # noqa: E402


QUESTION = [{"role": "user", "content": "which color is the paper?"}]


@pytest.fixture
def chat(calibrated):
    return ChatModel("model", *calibrated)


async def stays():
    return False


async def collect(pieces):
    return [piece async for piece in pieces]


def answer(chat, **body):
    async def run():
        return await chat.answer(await chat.read(ChatRequest(messages=QUESTION, **body)), stays)

    return asyncio.run(run())


def stream(chat, **body):
    async def run():
        return await collect(chat.stream(await chat.read(ChatRequest(messages=QUESTION, **body))))

    return asyncio.run(run())


@pytest.fixture
def endless(chat):
    """A request for a thousand tokens, none of which ends the answer, and the number of the model's runs."""
    runs = []
    hook = chat.model.register_forward_hook(lambda *_: runs.append(1))
    [end] = {chat.model.generation_config.eos_token_id}
    yield ChatRequest(messages=QUESTION, max_tokens=1000, temperature=0, logit_bias={end: -100}), runs
    hook.remove()


def test_an_answer_that_nobody_waits_for_ends(chat, endless):
    request, _ = endless

    async def left():
        return True

    async def run():
        return await chat.answer(await chat.read(request), left)

    assert asyncio.run(run()).tokens < 1000


def test_a_stream_that_nobody_reads_ends(chat, endless):
    request, runs = endless

    async def run():
        async with aclosing(chat.stream(await chat.read(request))) as pieces:
            await anext(pieces)
        # One thread generates: what is asked of it now waits for the answer's end.
        await asyncio.get_running_loop().run_in_executor(chat.generator, int)

    asyncio.run(run())
    assert 0 < len(runs) < 1000


def test_an_uncalibrated_checkpoint_leaves_auto_to_the_default(tiny, calibrated):
    plain = ChatModel("plain", *tiny, num_vision_tokens=16)
    assert plain.resolve_counts(None, ["auto", "low"]) == [16, 4]
    assert plain.resolve_counts(None, ["auto"]) == [16]
    assert plain.resolve_counts(None, [None]) == 16
    assert ChatModel("able", *calibrated).resolve_counts(None, ["auto"]) == "auto"


def test_a_default_may_be_a_grid_or_a_name(tiny, calibrated):
    assert ChatModel("grid", *tiny, num_vision_tokens="4x6").resolve_counts(None, [None, "low"]) == [(4, 6), 4]
    assert ChatModel("name", *tiny, num_vision_tokens="low").resolve_counts(None, [None, None]) == 4
    auto = ChatModel("auto", *calibrated, num_vision_tokens="auto")
    assert auto.resolve_counts(None, [None]) == "auto"
    assert auto.resolve_counts(None, [None, "low"]) == [36, 4], "one `detail` for all is the model's, others are not"


@pytest.mark.parametrize(
    ("default", "reason"),
    [
        (100, "`num_vision_tokens`=100"),
        ("9x9", "from .*1, 1"),
        ("medium", "'medium': give a count"),
        ("4,4", "2 counts for 1 image"),
        ("auto", "not learned to choose"),
    ],
)
def test_a_default_that_the_model_cannot_do_is_refused(tiny, default, reason):
    with pytest.raises(ValueError, match=reason):
        ChatModel("model", *tiny, num_vision_tokens=default)


def test_seeds_draw_the_same_answer_again(chat):
    drawn = [answer(chat, temperature=1, seed=seed, max_tokens=8).text for seed in range(4)]
    assert len(set(drawn)) > 1
    assert [answer(chat, temperature=1, seed=seed, max_tokens=8).text for seed in range(4)] == drawn
    assert stream(chat, temperature=1, seed=2, max_tokens=8)[-1].text == drawn[2]


@pytest.mark.parametrize("start", [0, 3, 9])
@pytest.mark.parametrize("length", [1, 4])
def test_an_answer_ends_before_its_stop_string(chat, start, length):
    body = {"temperature": 0, "max_tokens": 12, "logit_bias": {chat.model.generation_config.eos_token_id: -100}}
    whole = answer(chat, **body).text
    stop = whole[start : start + length]
    stopped = answer(chat, **body, stop=["not in it", stop])
    assert stopped.text == whole[: whole.find(stop)]
    *pieces, last = stream(chat, **body, stop=stop)
    assert ("".join(pieces), last.text, last.finish_reason) == (stopped.text, stopped.text, "stop")


def test_an_answer_that_is_cut_off_says_so(chat):
    end = chat.model.generation_config.eos_token_id
    assert answer(chat, max_tokens=2, logit_bias={end: -100}).finish_reason == "length"
    assert answer(chat, max_tokens=1, logit_bias={end: 100}) == Completion("", 1, "stop")


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
@settings(deadline=None, derandomize=True)
def test_a_stop_string_is_found_in_whichever_pieces_it_lies(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))

    async def pieces():
        for start, end in zip([0, *cuts], [*cuts, len(text)]):
            yield text[start:end]

    found = "".join(asyncio.run(collect(until(stops, pieces()))))
    assert found == text[: find_stop(stops, text)]
    assert not any(stop in found for stop in stops)


def test_a_prompt_counts_its_tokens_at_the_count_it_is_answered_at(calibrated, encode):
    image = draw_scene(5, 0).image
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION[0]["content"]}]
    for keep_images in (None, 4):
        chat = ChatModel("model", *calibrated, keep_images=keep_images)
        for asked, counts in ((16, [16]), ("4x6", [24]), ("low", [4]), ("auto", [4])):
            request = ChatRequest(messages=[{"role": "user", "content": parts}], num_vision_tokens=asked)
            prompt = asyncio.run(chat.read(request))
            assert prompt.vision_tokens == counts
            expected = encode(calibrated[1], [image], QUESTION[0]["content"], num_vision_tokens=4)
            assert prompt.tokens == expected["input_ids"].shape[1] + counts[0] - 4
