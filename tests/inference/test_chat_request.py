import pytest


pydantic = pytest.importorskip("pydantic")

from tokenflex.inference.chat_request import ChatRequest  # noqa: E402


MESSAGES = [{"role": "user", "content": "hello"}]
UNFILTERED = dict.fromkeys(("top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"))
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


@pytest.mark.parametrize(
    ("body", "options"),
    [
        ({}, {}),
        ({"max_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_tokens": 5, "max_completion_tokens": 6}, {"max_new_tokens": 6}),
        ({"temperature": 0}, {"do_sample": False}),
        ({"temperature": 1e-30, "top_p": 0.5}, {"do_sample": False}),
        ({"temperature": 0.5}, {"do_sample": True, "temperature": 0.5, "top_p": 1, **UNFILTERED}),
        ({"temperature": 2, "top_p": 0}, {"do_sample": True, "temperature": 2, "top_p": 0, **UNFILTERED}),
        ({"top_p": 0.5}, {"do_sample": True, "temperature": 1, "top_p": 0.5, **UNFILTERED}),
        ({"logit_bias": {"7": -100}}, {"sequence_bias": {(7,): -100.0}}),
        ({"logit_bias": {}}, {}),
    ],
)
def test_fields_become_options_of_generate(body, options):
    assert ChatRequest(messages=MESSAGES, **body).generation_options() == options


@pytest.mark.parametrize(
    ("stop", "stops"), [(None, []), ([], []), (".", ["."]), (["."], ["."]), ([".", "!\n"], [".", "!\n"])]
)
def test_stop_is_a_text_or_several_or_none(stop, stops):
    assert ChatRequest(messages=MESSAGES, stop=stop).stops == stops


NEUTRAL = [
    ("n", [1]),
    ("best_of", [1]),
    ("logprobs", [False]),
    ("top_logprobs", [0]),
    ("response_format", [{"type": "text"}]),
    ("tools", [[]]),
    ("tool_choice", ["none", "auto"]),
    ("parallel_tool_calls", [True, False]),
    ("functions", [[]]),
    ("function_call", ["none", "auto"]),
    ("frequency_penalty", [0, 0.0]),
    ("presence_penalty", [0, -0.0]),
    ("audio", []),
    ("modalities", [["text"]]),
    ("moderation", []),
    ("prediction", []),
    ("reasoning_effort", ["none"]),
    ("verbosity", ["medium"]),
    ("web_search_options", []),
    ("service_tier", ["auto", "default"]),
    ("store", [False]),
    ("user", ["somebody"]),
    ("safety_identifier", ["somebody"]),
    ("prompt_cache_key", ["a"]),
    ("prompt_cache_options", [{"mode": "implicit"}]),
    ("prompt_cache_retention", ["24h"]),
    ("metadata", [{"run": "3"}]),
    ("stream_options", [{}, {"include_usage": True}, {"include_usage": None, "include_obfuscation": False}]),
    ("stop", [[]]),
    ("logit_bias", [{}]),
]


@pytest.mark.parametrize(("field", "values"), NEUTRAL)
def test_fields_may_say_what_is_done_anyway(field, values):
    for value in (None, *values):
        request = ChatRequest(**{"messages": MESSAGES, field: value})
        assert (request.generation_options(), request.stops) == ({}, [])


def test_openai_s_fields_are_all_known():
    """So that each is done, or refused with what it may say, and none is called unknown."""
    openai = pytest.importorskip("openai")
    fields = openai.types.chat.completion_create_params.CompletionCreateParamsBase.__annotations__
    assert set(fields) <= set(ChatRequest.model_fields)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("n", 2, "not supported: leave it out, or give 1"),
        ("best_of", 2, "or give 1"),
        ("logprobs", True, "or give false"),
        ("top_logprobs", 3, "or give 0"),
        ("response_format", {"type": "json_object"}, 'or give {"type": "text"}'),
        ("tools", [TOOL], "or give []"),
        ("tool_choice", "required", 'or give "none" or "auto"'),
        ("functions", [TOOL["function"]], "or give []"),
        ("function_call", {"name": "look"}, 'or give "none" or "auto"'),
        ("frequency_penalty", 0.5, "or give 0"),
        ("presence_penalty", -0.5, "or give 0"),
        ("audio", {"voice": "alloy", "format": "wav"}, "not supported: leave it out"),
        ("modalities", ["text", "audio"], 'or give ["text"]'),
        ("moderation", {"model": "m"}, "leave it out"),
        ("prediction", {"type": "content", "content": "red"}, "leave it out"),
        ("reasoning_effort", "high", 'or give "none"'),
        ("verbosity", "low", 'or give "medium"'),
        ("web_search_options", {}, "leave it out"),
        ("service_tier", "priority", 'or give "auto" or "default"'),
        ("store", True, "or give false"),
        ("stream_options", {"include_obfuscation": True}, "or give false"),
    ],
)
def test_what_is_not_done_is_refused_with_what_may_be_said(field, value, reason):
    with pytest.raises(pydantic.ValidationError) as refused:
        ChatRequest(**{"messages": MESSAGES, field: value})
    [error] = refused.value.errors()
    assert error["loc"][0] == field
    assert error["msg"].endswith(reason)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", None),
        ("messages", []),
        ("messages", ["hello"]),
        ("stream", "yes"),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("max_tokens", 10**30),
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", float("nan")),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"1": float("inf")}),
        ("stop", ""),
        ("stop", [""]),
        ("stop", ["."] * 17),
        ("seed", "one"),
        ("seed", True),
        ("seed", 2**63),
        ("stream_options", {"usage": True}),
        ("stream_options", True),
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
