"""The body of a request for a chat completion."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Fields of OpenAI's API that say nothing to this server, and that clients send all the same.
IGNORED_FIELDS = {
    "audio",
    "function_call",
    "functions",
    "logprobs",
    "metadata",
    "modalities",
    "n",
    "parallel_tool_calls",
    "prediction",
    "presence_penalty",
    "reasoning_effort",
    "response_format",
    "service_tier",
    "store",
    "stream_options",
    "tool_choice",
    "top_logprobs",
    "user",
    "web_search_options",
}


class ChatRequest(BaseModel):
    """
    A request for a chat completion, in OpenAI's form and within the limits that `generate` has, with two fields more:
    `num_vision_tokens` and the chat template's variables in `chat_template_kwargs`.
    """

    model_config = ConfigDict(extra="forbid")

    messages: Annotated[list[dict], Field(min_length=1)]
    model: str | None = None
    stream: StrictBool | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(gt=-1, le=2)] | None = None
    logit_bias: dict[int, float] | None = None
    stop: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] | None = None
    seed: int | None = None
    tools: list[dict] | None = None
    num_vision_tokens: Any = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def drop_ignored_fields(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        if ignored := sorted(IGNORED_FIELDS & body.keys()):
            logger.warning_once(f"Requests have fields that mean nothing to this server: {', '.join(ignored)}.")
        return {name: value for name, value in body.items() if name not in IGNORED_FIELDS}

    @property
    def stops(self) -> list[str]:
        """The strings that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def generation_options(self) -> dict:
        """The arguments of `generate` that the request asks for."""
        options = {
            "max_new_tokens": self.max_completion_tokens or self.max_tokens,
            "do_sample": None if self.temperature is None else self.temperature > 0,
            "temperature": self.temperature or None,
            "top_p": None if self.temperature == 0 else self.top_p,
            "repetition_penalty": None if self.frequency_penalty is None else 1 + self.frequency_penalty,
            "sequence_bias": {(token,): bias for token, bias in (self.logit_bias or {}).items()} or None,
            "stop_strings": self.stops or None,
        }
        return {name: value for name, value in options.items() if value is not None}
