import asyncio
import base64
import io
from contextlib import aclosing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

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
    assert plain.counts.resolve(None, ["auto", "low"]) == [16, 4]
    assert plain.counts.resolve(None, ["auto"]) == [16]
    assert plain.counts.resolve(None, [None]) == 16
    assert ChatModel("able", *calibrated).counts.resolve(None, ["auto"]) == "auto"


def test_a_default_may_be_a_grid_or_a_name(tiny, calibrated):
    assert ChatModel("grid", *tiny, num_vision_tokens="4x6").counts.resolve(None, [None, "low"]) == [(4, 6), 4]
    assert ChatModel("name", *tiny, num_vision_tokens="low").counts.resolve(None, [None, None]) == 4
    auto = ChatModel("auto", *calibrated, num_vision_tokens="auto")
    assert auto.counts.resolve(None, [None]) == "auto"
    assert auto.counts.resolve(None, [None, "low"]) == [36, 4], "one `detail` for all is the model's, others are not"


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


def test_no_other_request_changes_what_a_seed_draws_nor_does_a_seed_change_others(chat):
    async def run():
        requests = [ChatRequest(messages=QUESTION, temperature=2, seed=seed, max_tokens=8) for seed in (3, None, 3)]
        prompts = [await chat.read(request) for request in requests * 2]
        return [done.text for done in await asyncio.gather(*(chat.answer(prompt, stays) for prompt in prompts))]

    texts = asyncio.run(run())
    alone = answer(chat, temperature=2, seed=3, max_tokens=8).text
    assert [texts[place] for place in (0, 2, 3, 5)] == [alone] * 4
    assert texts[1] != texts[4]


CHECKPOINTS = [
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"do_sample": True, "temperature": 0.1, "top_k": 1, "top_p": 0.001},
    {"do_sample": True, "min_p": 0.9, "typical_p": 0.2, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "top_h": 0.1},
    {"do_sample": True, "num_return_sequences": 2},
    {"num_beams": 3},
    {"return_dict_in_generate": True},
]


@pytest.fixture
def with_config(chat, monkeypatch):
    """Gives the checkpoint other settings of generation."""
    own = chat.model.generation_config

    def with_config(options):
        config = GenerationConfig(**{**own.to_diff_dict(), **options})
        monkeypatch.setattr(chat.model, "generation_config", config)

    return with_config


@pytest.mark.parametrize("config", CHECKPOINTS)
def test_temperature_and_top_p_decide_whatever_the_checkpoint_says(chat, config, with_config):
    bodies = [{"temperature": 0}, {"temperature": 1e-30}, {"temperature": 1, "top_p": 0}]
    bodies += [
        {"temperature": 1.5, "seed": 3},
        {"top_p": 0.99, "seed": 3},
        {"temperature": 2, "top_p": 0.5, "seed": 3},
    ]
    expected = [answer(chat, max_tokens=8, **body).text for body in bodies]
    assert len(set(expected[:3])) == 1 and len(set(expected)) == 4
    with_config(config)
    assert [answer(chat, max_tokens=8, **body).text for body in bodies] == expected
    assert "".join(stream(chat, max_tokens=8, **bodies[3])[:-1]) == expected[3]


def test_what_a_request_does_not_say_is_the_checkpoint_s(chat, with_config):
    with_config({"do_sample": True, "temperature": 3.0})
    assert len({answer(chat, max_tokens=8, seed=seed).text for seed in range(4)}) > 1
    greedy = answer(chat, max_tokens=8, temperature=0).text
    with_config({"max_new_tokens": 2, "repetition_penalty": 9.0})
    assert answer(chat, temperature=0, logit_bias={chat.model.generation_config.eos_token_id: -100}).tokens == 2
    assert answer(chat, max_tokens=8, temperature=0).text != greedy


def test_a_request_sets_the_template_s_variables_and_nothing_else(calibrated, monkeypatch):
    template = "{% if terse %}be brief. {% endif %}{{ style }}" + calibrated[1].chat_template
    monkeypatch.setattr(
        calibrated[1], "chat_template", template + "{% generation %}{{ eos_token }}{% endgeneration %}"
    )
    chat = ChatModel("model", *calibrated)
    assert {"terse", "style"} <= chat.variables

    def read(**variables):
        request = ChatRequest(messages=QUESTION, chat_template_kwargs=variables)
        return chat.processor.decode(asyncio.run(chat.read(request)).inputs["input_ids"][0])

    assert read(terse=True, style="x").startswith("be brief. x<|im_start|>")
    for name in ("eos_token", "namespace", "message", "text", "images", "tokenize"):
        with pytest.raises(ValueError, match=f"takes no '{name}'"):
            read(**{name: "x"})
    for value in ("<|im_end|>", {"a": ["<|im_end|>"]}):
        with pytest.raises(ValueError, match="`chat_template_kwargs`: the control token"):
            read(style=value)


@pytest.mark.parametrize("stop", [None, [], "not in it", ["not in it", "nor this"]])
def test_an_answer_without_its_stop_string_is_whole(chat, stop):
    body = {"temperature": 0, "max_tokens": 12, "logit_bias": {chat.model.generation_config.eos_token_id: -100}}
    assert answer(chat, **body, stop=stop) == answer(chat, **body)


def test_a_stop_string_is_not_looked_for_in_the_prompt(chat):
    """Which ends with a line break, behind the name of the role."""
    token = chat.processor.tokenizer.convert_tokens_to_ids("r")
    whole = answer(chat, temperature=0, max_tokens=4, logit_bias={token: 100})
    assert whole == Completion("rrrr", 4, "length")
    assert answer(chat, temperature=0, max_tokens=4, logit_bias={token: 100}, stop="\nr") == whole


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
