import pytest


pydantic = pytest.importorskip("pydantic")

from tokenflex.inference.chat_request import ChatRequest  # noqa: E402


MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("body", "options"),
    [
        ({}, {}),
        ({"max_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_tokens": 5, "max_completion_tokens": 6}, {"max_new_tokens": 6}),
        ({"temperature": 0, "top_p": 0.5}, {"do_sample": False}),
        ({"temperature": 0.5, "top_p": 0.5}, {"do_sample": True, "temperature": 0.5, "top_p": 0.5}),
        ({"frequency_penalty": 0.5}, {"repetition_penalty": 1.5}),
        ({"logit_bias": {"7": -100}}, {"sequence_bias": {(7,): -100.0}}),
        ({"stop": "."}, {"stop_strings": ["."]}),
        ({"stop": [".", "!"]}, {"stop_strings": [".", "!"]}),
        ({"stop": None, "max_tokens": None, "seed": None, "tools": None}, {}),
        ({"user": "somebody", "n": 1, "stream_options": {"include_usage": True}}, {}),
    ],
)
def test_fields_become_options_of_generate(body, options):
    assert ChatRequest(messages=MESSAGES, **body).generation_options() == options


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", None),
        ("messages", []),
        ("messages", ["hello"]),
        ("stream", "yes"),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("frequency_penalty", -1),
        ("logit_bias", {"a": 1}),
        ("stop", ""),
        ("stop", [""]),
        ("seed", "one"),
        ("tools", {}),
        ("chat_template_kwargs", "4"),
        ("generation_config", "{}"),
        ("num_vision_token", 4),
    ],
)
def test_other_values_are_refused_by_the_fields_name(field, value):
    with pytest.raises(pydantic.ValidationError) as refused:
        ChatRequest(**{"messages": MESSAGES, field: value})
    assert {error["loc"][0] for error in refused.value.errors()} == {field}
