"""Chat completions of one model, answered one by one, each at the vision-token count that it asks for."""

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from jinja2 import Environment, defaults, meta
from transformers import AsyncTextIteratorStreamer, StoppingCriteria, StoppingCriteriaList

from ..placeholders_tokenflex import at_count, seen_resolutions
from .chat_request import ChatRequest
from .control_tokens import refuse_control_tokens
from .counts import RequestCounts
from .decoding import ONE_ANSWER
from .kept_features import KeptFeatures
from .messages import MessageReader


DEFAULT_MAX_TOKENS = 1024
# Variables of chat templates that are the server's, or transformers', and not a request's.
KEPT_VARIABLES = {
    *("messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"),
    *defaults.DEFAULT_NAMESPACE,
}


@dataclass(frozen=True)
class Prompt:
    """
    A request that is ready to be answered.

    Args:
        inputs (`dict`): Arguments of `generate` that hold the prompt.
        options (`dict`): Its other arguments.
        tokens (`int`): The length of the prompt, vision tokens included.
        vision_tokens (`list[int]`): Those of each image.
        stops (`list[str]`): The strings that end the answer.
        seed (`int`, *optional*): The seed to sample from.
    """

    inputs: dict
    options: dict
    tokens: int
    vision_tokens: list[int]
    stops: list[str]
    seed: int | None


@dataclass(frozen=True)
class Completion:
    """
    An answer.

    Args:
        text (`str`): The answer, without the string that ended it.
        tokens (`int`): Number of generated tokens.
        finish_reason (`str`): `"stop"`, or `"length"` if it was cut off.
    """

    text: str
    tokens: int
    finish_reason: str


class AnswerEnds(StoppingCriteria):
    """
    Ends an answer that nobody waits for any more, or that holds one of the strings that end it.

    Args:
        prompt ([`Prompt`]): The request.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer.
    """

    def __init__(self, prompt: Prompt, tokenizer):
        self.prompt, self.tokenizer = prompt, tokenizer
        self.left = threading.Event()
        # So many tokens reach back over the longest: each is a byte or more.
        self.reach = 1 + max((len(stop.encode()) for stop in prompt.stops), default=0)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.left.is_set() or self._has_stop(input_ids), device=input_ids.device)

    def _has_stop(self, input_ids: torch.LongTensor) -> bool:
        if not self.prompt.stops:
            return False
        [ids] = input_ids[:, self.prompt.tokens :][:, -self.reach :].tolist()
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return find_stop(self.prompt.stops, text) < len(text)

    async def watch(self, is_disconnected: Callable[[], Awaitable[bool]]) -> None:
        while not await is_disconnected():
            await asyncio.sleep(0.5)
        self.left.set()


class ChatModel:
    """
    Answers chats at the count that a request, or each of its images, asks for: see [`RequestCounts`].

    Args:
        name (`str`): The name of the model in requests.
        model ([`TokenFlexForConditionalGeneration`]): The model.
        processor ([`TokenFlexProcessor`]): Its processor.
        messages ([`MessageReader`], *optional*): Reads messages and their images. Defaults to one with default limits.
        num_vision_tokens (`int`, `tuple[int, int]` or `str`, *optional*):
            The count of requests that ask for none. Defaults to the processor's.
        keep_images (`int`, *optional*): Number of images whose tower features to keep. Defaults to none.

    Raises:
        ValueError: If the model cannot do the default.
    """

    def __init__(
        self,
        name: str,
        model,
        processor,
        messages: MessageReader | None = None,
        num_vision_tokens: int | tuple[int, int] | str | None = None,
        keep_images: int | None = None,
    ):
        self.name, self.model, self.processor = name, model, processor
        self.messages = messages or MessageReader()
        self.kept = None if keep_images is None else KeptFeatures(model, keep_images)
        self.counts = RequestCounts(processor, model.config, num_vision_tokens)
        self.variables = _template_variables(processor)
        self.readers = ThreadPoolExecutor(16, "read")  # a slow address makes only those wait who name one
        self.encoders = ThreadPoolExecutor(2, "encode")
        self.generator = ThreadPoolExecutor(1, "generate")

    async def read(self, request: ChatRequest) -> Prompt:
        """
        Reads a request; with `"auto"` the model also chooses its count.

        Raises:
            ValueError: If something is wrong with the request.
        """
        if request.model not in (None, self.name):
            raise ValueError(f"`model`={request.model!r}: this server is pinned to {self.name!r}.")
        loop = asyncio.get_running_loop()
        options, template = request.generation_options(), self._template_variables(request)
        asked = template.pop("num_vision_tokens", None)
        asked = asked if request.num_vision_tokens is None else request.num_vision_tokens
        vocab_size = self.model.config.text_config.vocab_size
        for (token,) in options.get("sequence_bias", {}):
            if not 0 <= token < vocab_size:
                raise ValueError(f"`logit_bias`: there is no token {token}; they are 0 to {vocab_size - 1}.")
        messages, details = await loop.run_in_executor(self.readers, self.messages.read, request.messages)
        counts = self.counts.resolve(asked, details)
        inputs = await loop.run_in_executor(self.encoders, self._encode, messages, counts, len(details), template)
        if details and (counts == "auto" or self.kept is not None):
            inputs = await loop.run_in_executor(self.generator, self._see, inputs)
        tokens, vision_tokens = self._count_tokens(inputs)
        default = self.model.generation_config.max_new_tokens or DEFAULT_MAX_TOKENS
        options["max_new_tokens"] = self._fit(options.get("max_new_tokens", default), tokens)
        return Prompt(inputs, options, tokens, vision_tokens, request.stops, request.seed)

    async def answer(self, prompt: Prompt, is_disconnected: Callable[[], Awaitable[bool]]) -> Completion:
        """
        The whole answer.

        Args:
            prompt ([`Prompt`]): The request.
            is_disconnected (`Callable`): Tells whether the client has left, which ends the answer.
        """
        criterion = AnswerEnds(prompt, self.processor.tokenizer)
        watch = asyncio.create_task(criterion.watch(is_disconnected))
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self.generator, self._generate, prompt, criterion)
        finally:
            criterion.left.set()
            watch.cancel()

    async def stream(self, prompt: Prompt) -> AsyncIterator[str | Completion]:
        """The answer's text, piece by piece, and at its end the whole; whoever closes the iterator ends the answer."""
        tokenizer = self.processor.tokenizer
        criterion = AnswerEnds(prompt, tokenizer)
        streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        loop = asyncio.get_running_loop()
        generating = loop.run_in_executor(self.generator, self._generate, prompt, criterion, streamer)
        try:
            async for piece in until(prompt.stops, streamer):
                yield piece
            yield await generating
        finally:
            criterion.left.set()
            generating.cancel()

    def _template_variables(self, request: ChatRequest) -> dict:
        template = request.chat_template_kwargs or {}
        for name in template:
            if name not in self.variables | {"num_vision_tokens"}:
                raise ValueError(f"`chat_template_kwargs`: the chat template takes no {name!r} from a request.")
        return dict(template)

    def _encode(self, messages: list[dict], counts, num_images: int, template: dict) -> dict:
        tokenizer = self.processor.tokenizer
        for i, message in enumerate(messages):
            # Joined, as templates join them: a token may lie across two parts.
            text = "".join(part.get("text", "") for part in message["content"])
            refuse_control_tokens(f"messages[{i}].content", text, tokenizer)
        refuse_control_tokens("chat_template_kwargs", json.dumps(template, ensure_ascii=False), tokenizer)
        encoded_at = self.counts.choices[0] if counts == "auto" else counts
        inputs = self.processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
            tokenize=True,
            processor_kwargs={"num_vision_tokens": encoded_at} if num_images else {},
            **template,
        )
        return {**inputs.to(self.model.device), **({"num_vision_tokens": counts} if num_images else {})}

    @torch.no_grad()
    def _see(self, inputs: dict) -> dict:
        """The inputs with the tower's features for the pixels, and the count that the model chooses if it is to."""
        pixel_values, counts = inputs.pop("pixel_values"), inputs.pop("num_vision_tokens")
        kept = KeptFeatures(self.model, 2 * len(pixel_values)) if self.kept is None else self.kept
        if counts == "auto":
            [counts] = self.model.choose_vision_tokens(**inputs)
        asked = at_count({**inputs, "pixel_values": pixel_values}, counts, self.model.config)
        features = kept.encode(pixel_values, seen_resolutions(asked, self.model.config))
        return {**inputs, "mm_encoder_outputs": {"image": features}, "num_vision_tokens": counts}

    def _count_tokens(self, inputs: dict) -> tuple[int, list[int]]:
        """The tokens of the prompt at the count it is answered at, and the vision tokens of each image among them."""
        if "vision_token_grids" not in inputs:
            return inputs["input_ids"].shape[1], []
        prompt = at_count(inputs, inputs["num_vision_tokens"], self.model.config)
        return prompt["input_ids"].shape[1], prompt["vision_token_grids"].prod(-1).tolist()

    def _fit(self, max_new_tokens: int, length: int) -> int:
        """The longest answer that still fits behind the prompt."""
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        if limit is None:
            return max_new_tokens
        if length >= limit:
            raise ValueError(
                f"The prompt has {length} tokens, and the model takes {limit} with its answer: shorten it, or use "
                "fewer vision tokens."
            )
        return min(max_new_tokens, limit - length)

    def _generate(
        self, prompt: Prompt, criterion: AnswerEnds, streamer: AsyncTextIteratorStreamer | None = None
    ) -> Completion:
        tokenizer = self.processor.tokenizer
        more = {"stopping_criteria": StoppingCriteriaList([criterion]), "tokenizer": tokenizer, "streamer": streamer}
        more |= {**ONE_ANSWER, "return_dict_in_generate": False}
        # One answer is generated at a time: nobody else draws. The seed of one is not to be the next one's.
        torch.seed() if prompt.seed is None else torch.manual_seed(prompt.seed)
        try:
            output = self.model.generate(**prompt.inputs, **prompt.options, **more)
        except Exception:
            if streamer is not None:
                streamer.end()  # nobody else tells those who read it
            raise
        ids = output[0, prompt.inputs["input_ids"].shape[1] :].tolist()
        text = tokenizer.decode(ids, skip_special_tokens=True)
        answer = text[: find_stop(prompt.stops, text)]
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        is_cut_off = len(ids) >= prompt.options["max_new_tokens"] and ids[-1] not in ends and answer == text
        return Completion(answer, len(ids), "length" if is_cut_off else "stop")


def _template_variables(processor) -> set[str]:
    """The variables of the chat template that a request may set."""
    template = processor.chat_template
    template = template if isinstance(template, str) else "".join(template.values())
    template = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)  # transformers' own tag, which sets nothing
    parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    return meta.find_undeclared_variables(parsed) - KEPT_VARIABLES - set(processor.tokenizer.special_tokens_map)


def find_stop(stops: list[str], text: str) -> int:
    """The place where the first of the strings that end a text begins, or the text's length."""
    return min((text.find(stop) for stop in stops if stop in text), default=len(text))


async def until(stops: list[str], pieces: AsyncIterator[str]) -> AsyncIterator[str]:
    """The pieces of a text up to the first of the strings that end it, in whichever pieces that lies."""
    held, longest = "", max(map(len, stops), default=1)
    async for piece in pieces:
        held += piece
        end = find_stop(stops, held)
        if end < len(held):
            held = held[:end]
            break
        ready = max(0, len(held) - longest + 1)
        if ready:
            yield held[:ready]
            held = held[ready:]
    if held:
        yield held
