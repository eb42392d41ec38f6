"""The body of a request for a chat completion."""

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError


SMALLEST_TEMPERATURE = 1e-5  # below it the likeliest token is drawn anyway, and logits over it leave float32
# The checkpoint's own, which a request that says how to sample does not name.
UNFILTERED = dict.fromkeys(("top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"))


def only(*values) -> Any:
    """The type of a field of OpenAI's that may say what this server does anyway, and nothing else."""
    reason = "not supported: leave it out" + (f", or give {' or '.join(map(json.dumps, values))}" if values else "")

    def check(value):
        if value is not None and value not in values:
            raise PydanticCustomError("unsupported", "{reason}", {"reason": reason})
        return value

    return Annotated[Any, AfterValidator(check)]


class StreamOptions(BaseModel):
    """What a stream has beside the answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: only(False) = None


class ChatRequest(BaseModel):
    """
    A request for a chat completion, in OpenAI's form and within the limits that `generate` has, with two fields more:
    `num_vision_tokens` and the chat template's variables in `chat_template_kwargs`.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    messages: Annotated[list[dict], Field(min_length=1)]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    logit_bias: dict[Annotated[int, Field(strict=False)], Annotated[float, Field(ge=-100, le=100)]] | None = None
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    num_vision_tokens: Any = None
    chat_template_kwargs: dict[str, Any] | None = None

    audio: only() = None
    best_of: only(1) = None
    frequency_penalty: only(0) = None
    function_call: only("none", "auto") = None
    functions: only([]) = None
    logprobs: only(False) = None
    modalities: only(["text"]) = None
    moderation: only() = None
    n: only(1) = None
    prediction: only() = None
    presence_penalty: only(0) = None
    reasoning_effort: only("none") = None
    response_format: only({"type": "text"}) = None
    service_tier: only("auto", "default") = None
    store: only(False) = None
    tool_choice: only("none", "auto") = None
    tools: only([]) = None
    top_logprobs: only(0) = None
    verbosity: only("medium") = None
    web_search_options: only() = None

    # Taken without effect: no value of theirs changes an answer of this server.
    metadata: Any = None
    parallel_tool_calls: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    user: Any = None

    @property
    def stops(self) -> list[str]:
        """The strings that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def includes_usage(self) -> bool:
        """True if a stream is to end with its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def generation_options(self) -> dict:
        """The arguments of `generate` that the request asks for."""
        options = {
            "max_new_tokens": self.max_completion_tokens or self.max_tokens,
            "sequence_bias": {(token,): bias for token, bias in (self.logit_bias or {}).items()} or None,
        }
        return {name: value for name, value in options.items() if value is not None} | self._sampling()

    def _sampling(self) -> dict:
        """What is said here holds alone: a checkpoint's own temperature or filters would make it another request."""
        if self.temperature is None and self.top_p is None:
            return {}
        if self.temperature is not None and self.temperature < SMALLEST_TEMPERATURE:
            return {"do_sample": False}
        said = {"temperature": self.temperature, "top_p": self.top_p}
        return (
            UNFILTERED | {name: 1.0 if value is None else value for name, value in said.items()} | {"do_sample": True}
        )
