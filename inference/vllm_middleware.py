"""Counts of requests to vLLM's server as this package's users write them: for `vllm serve --middleware`."""

import json
import re
from collections.abc import Iterator

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse

from .control_tokens import refuse_control_tokens
from .counts import RequestCounts
from .messages import IMAGE_PARTS, check_detail


CHATS = ("/v1/chat/completions", "/tokenize", "/invocations")
FIELDS = ("num_vision_tokens", "mm_processor_kwargs", "media_io_kwargs")
# What a request may say to the processor beside its count. Others, such as sizes, are the engine's to set.
SHAPES = ("match_aspect_ratio", "crop_to_patches")
TEMPLATED = {"tools", "documents", "chat_template_kwargs"}  # written into prompts, as messages are
# What templates or vLLM would take for an image or a video, whatever the part's type.
SEEN = {"image", "image_url", "image_pil", "image_embeds", "video", "video_url"}


class VisionTokenMiddleware:
    """
    Turns a request's `num_vision_tokens` and its images' `detail` into arguments that vLLM knows, and answers with
    status 400 and the reason where they are wrong. Its server needs `--trust-request-mm-kwargs`; what else that would
    let through is refused here.

    Args:
        app (`Callable`): The ASGI application behind it.
    """

    def __init__(self, app):
        self.app = app
        self.counts = self.max_images = None

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        body = await Request(scope, receive).body()
        try:
            asked = json.loads(body)
        except (ValueError, RecursionError):
            asked = None  # vLLM's to refuse
        if isinstance(asked, dict):
            if self.counts is None:
                config = scope["app"].state.vllm_config.model_config
                self.counts, self.max_images = await run_in_threadpool(load_limits, config)
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            try:
                asked = await run_in_threadpool(translate, asked, path, self.counts, self.max_images)
            except (ValueError, RecursionError) as error:
                message = str(error).encode(errors="backslashreplace").decode()  # it may quote half a character
                refusal = {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}
                return await JSONResponse(refusal, 400)(scope, receive, send)
            body = json.dumps(asked).encode()
            headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
            scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay():
            return messages.pop() if messages else await receive()

        return await self.app(scope, replay, send)


def load_limits(model_config) -> tuple[RequestCounts, int]:
    """The counts that vLLM's engine does, by its processor and defaults, and the images that a request may have."""
    from vllm.transformers_utils.processor import cached_processor_from_config

    processor = cached_processor_from_config(model_config)
    counts = RequestCounts(processor, model_config.hf_config, can_choose=False)
    return counts, model_config.get_multimodal_config().get_limit_per_prompt("image")


def translate(body: dict, path: str, counts: RequestCounts, max_images: int) -> dict:
    """
    The body as vLLM takes it.

    Args:
        body (`dict`): As in OpenAI's chat completions, with `num_vision_tokens` and each image's `detail`.
        path (`str`): The endpoint.
        counts ([`RequestCounts`]): The counts that the engine does.
        max_images (`int`): Limit on the number of images.

    Raises:
        ValueError: If a count is not allowed, is asked for where it would be ignored, there are too many images, or a
            text holds control tokens.
    """
    chat = body.get("messages") if path in CHATS else None
    if not isinstance(chat, list):
        for name in FIELDS:
            if body.get(name) is not None:
                raise ValueError(f"`{name}` is not taken by {path}, only by {CHATS[0]}: leave it out.")
        return body
    for name in TEMPLATED & body.keys():
        refuse_control_tokens(name, json.dumps(body[name], ensure_ascii=False), counts.processor.tokenizer)
    details = read_details(chat, counts.processor.tokenizer)
    if len(details) > max_images:
        raise ValueError(f"The request has {len(details)} images, and this engine takes {max_images}.")
    body, options = dict(body), body.get("mm_processor_kwargs") or {}
    # vLLM adds none to chats unless it is told; templates of adopted models may leave them to the tokenizer.
    if counts.processor.add_special_tokens:
        begun = counts.processor.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": "a"}]}])
        body.setdefault("add_special_tokens", counts.processor.adds_special_tokens_to(begun))
    if body.get("media_io_kwargs"):
        raise ValueError("`media_io_kwargs` is the server's to set: leave it out.")
    if not isinstance(options, dict):
        raise ValueError(f"`mm_processor_kwargs`={options!r:.80}: give names with values.")
    for name, value in options.items():
        if name not in ("num_vision_tokens", *SHAPES) or (name in SHAPES and not isinstance(value, bool | None)):
            known = ", ".join(f"`{known}`" for known in SHAPES)
            raise ValueError(
                f"`mm_processor_kwargs.{name}`={value!r:.80}: a request says `num_vision_tokens`, and true or false "
                f"for {known}; all else is the server's to set."
            )
    template = body.get("chat_template_kwargs")
    ways = [body.pop("num_vision_tokens", None)]
    if isinstance(template, dict) and "num_vision_tokens" in template:
        body["chat_template_kwargs"] = {k: v for k, v in template.items() if k != "num_vision_tokens"}
        ways.append(template["num_vision_tokens"])
    ways.append(options.get("num_vision_tokens"))
    asked = next((way for way in ways if way is not None), None)
    if asked is None and set(details) <= {None}:
        return body
    if asked == "auto":
        raise ValueError(
            "`num_vision_tokens`='auto' needs `tokenflex serve` without an engine: in vLLM no model chooses a count. "
            f"Ask for 'low' ({counts.choices[0]}), 'high' ({counts.choices[-1]}) or any count."
        )
    resolved = counts.resolve(asked, details, options.get("match_aspect_ratio"))
    if details:
        body["mm_processor_kwargs"] = {**options, "num_vision_tokens": as_json(resolved)}
    return body


def as_json(counts):
    """Counts without tuples, of which JSON would make lists."""
    if isinstance(counts, list):
        return [as_json(count) for count in counts]
    return f"{counts[0]}x{counts[1]}" if isinstance(counts, tuple) else counts


def read_details(messages: list, tokenizer) -> list[str | None]:
    """
    Each image's `detail`. What is malformed otherwise is vLLM's to refuse.

    Raises:
        ValueError: If a `detail` is none that there is, or a text holds control tokens.
    """
    details = []
    for i, message in enumerate(messages):
        # Joined, as templates join them: a token may lie across two parts.
        refuse_control_tokens(f"messages[{i}]", "".join(texts_in(message)), tokenizer)
        content = message.get("content") if isinstance(message, dict) else None
        for j, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, dict) and (SEEN & part.keys() or part.get("type") in IMAGE_PARTS):
                source, where = part.get("image_url"), f"messages[{i}].content[{j}]"
                source = source if isinstance(source, dict) else {"url": source, "detail": part.get("detail")}
                if not re.match(r"https?://|data:[^,]*;base64,", str(source.get("url"))):
                    raise ValueError(f"`{where}`: its `image_url` is no http(s): or base64 data: URL.")
                check_detail(source.get("detail"), where)
                details.append(source.get("detail"))
    return details


def texts_in(value) -> Iterator[str]:
    """Every text in a message but for the addresses of images."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name != "url" and not (name == "image_url" and isinstance(item, str)):
                yield from texts_in(item)
