"""`tokenflex serve`: OpenAI-style chat completions, with a vision-token count for each request or image."""

import json
import time
import uuid
from argparse import ArgumentParser
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoModelForImageTextToText

from ..checkpoints.adapters import load_processor
from ..checkpoints.provenance import is_hub_id
from .vllm_command import run_vllm


try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, StreamingResponse
    from starlette.exceptions import HTTPException as AnyHTTPException

    from .chat import ChatModel, Completion, Prompt
    from .chat_request import ChatRequest
    from .messages import MessageReader
except ImportError as error:
    raise ImportError(f'{error}. `tokenflex serve` needs `pip install "tokenflex[serve]"`.') from None


def build_app(
    model_name_or_path: str,
    num_vision_tokens: int | tuple[int, int] | str | None = None,
    max_megapixels: float = 64,
    max_images: int = 32,
    keep_images: int | None = None,
    **model_options,
) -> FastAPI:
    """
    The server's application, with the model loaded.

    Args:
        model_name_or_path (`str`): Checkpoint folder or Hub id.
        num_vision_tokens (`int`, `tuple[int, int]` or `str`, *optional*):
            The count of requests that ask for none: a number, a grid, `"low"`, `"high"` or `"auto"`. Defaults to the
            processor's.
        max_megapixels (`float`, *optional*, defaults to 64): Limit on a request's images together.
        max_images (`int`, *optional*, defaults to 32): Limit on the number of images in a request.
        keep_images (`int`, *optional*):
            Number of images whose tower features to keep for later turns and other questions. Defaults to none, as
            does 0.
        model_options: As for `from_pretrained`.

    Returns:
        `fastapi.FastAPI`: The application.

    Raises:
        ValueError: If there is no such checkpoint, or it cannot do the default count.
    """
    if not Path(model_name_or_path).is_dir() and not is_hub_id(model_name_or_path):
        raise ValueError(f"`model_name_or_path`={model_name_or_path!r}: no such folder, and no id of the Hub's form.")
    processor = load_processor(model_name_or_path)
    model = AutoModelForImageTextToText.from_pretrained(model_name_or_path, **{"device_map": "auto", **model_options})
    messages = MessageReader(max_megapixels, max_images)
    chat = ChatModel(
        model_name_or_path, model.eval(), processor, messages, num_vision_tokens, keep_images=keep_images or None
    )
    app = FastAPI(title="tokenflex", openapi_url=None)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request):
        try:
            prompt = await chat.read(body)
        except (ValueError, TypeError, RecursionError, TemplateError) as error:
            raise HTTPException(400, str(error)) from None
        headers = {"X-Vision-Tokens": ",".join(map(str, prompt.vision_tokens))} if prompt.vision_tokens else {}
        if body.stream:
            events = _events(chat, prompt, body.includes_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        completion = await chat.answer(prompt, request.is_disconnected)
        return JSONResponse(_whole(chat.name, prompt, completion), headers=headers)

    @app.get("/v1/models")
    async def models():
        listed = {"id": model_name_or_path, "object": "model", "owned_by": "tokenflex", "created": 0}
        return {"object": "list", "data": [listed]}

    @app.get("/health")
    async def health():
        return {"status": "ok"}

    @app.exception_handler(AnyHTTPException)
    async def refuse(_, error: AnyHTTPException):
        return JSONResponse(_error(error.status_code, str(error.detail)), error.status_code)

    @app.exception_handler(RequestValidationError)
    async def refuse_body(_, error: RequestValidationError):
        said = []
        for each in error.errors():
            field = ".".join(map(str, each["loc"][1:]))
            said.append(f"`{field or 'body'}`={each['input']!r:.80}: {each['msg']}")
        return JSONResponse(_error(400, "; ".join(said)), 400)

    @app.exception_handler(Exception)
    async def fail(_, error: Exception):
        return JSONResponse(_error(500, f"{type(error).__name__}: {error}"), 500)

    return app


def _head(kind: str, model: str) -> dict:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _usage(prompt: Prompt, completion: Completion) -> dict:
    return {
        "prompt_tokens": prompt.tokens,
        "completion_tokens": completion.tokens,
        "total_tokens": prompt.tokens + completion.tokens,
    }


def _whole(model: str, prompt: Prompt, completion: Completion) -> dict:
    message = {"role": "assistant", "content": completion.text}
    choice = {"index": 0, "message": message, "finish_reason": completion.finish_reason}
    return {**_head("chat.completion", model), "choices": [choice], "usage": _usage(prompt, completion)}


async def _events(chat: ChatModel, prompt: Prompt, includes_usage: bool) -> AsyncIterator[str]:
    """The answer as server-sent events in OpenAI's form, with one behind it for the usage where that is asked for."""
    head = _head("chat.completion.chunk", chat.name) | ({"usage": None} if includes_usage else {})

    def event(delta: dict, finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"

    yield event({"role": "assistant", "content": ""})
    try:
        async with aclosing(chat.stream(prompt)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Completion):
                    yield event({}, piece.finish_reason)
                    if includes_usage:
                        yield f"data: {json.dumps({**head, 'choices': [], 'usage': _usage(prompt, piece)})}\n\n"
                else:
                    yield event({"content": piece})
    except Exception as error:  # the status was sent before it happened
        yield f"data: {json.dumps(_error(500, f'{type(error).__name__}: {error}'))}\n\n"
    yield "data: [DONE]\n\n"


def _error(status: int, message: str) -> dict:
    """An error in the form whose message OpenAI's clients show."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    message = message.encode(errors="backslashreplace").decode()  # it may quote half a character
    return {"error": {"message": message, "type": kind, "code": status}}


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="tokenflex serve", description="Answer OpenAI-style requests over HTTP.")
    parser.add_argument("--model_name_or_path", required=True, help="Checkpoint folder or Hub id.")
    parser.add_argument("--host", default="localhost", help="Address to listen at. Default: %(default)s.")
    parser.add_argument("--port", type=int, default=8000, help="Default: %(default)s.")
    parser.add_argument(
        "--num_vision_tokens",
        help="The count of requests that ask for none: a count, a grid such as 8x12, `low`, `high` or `auto`. "
        "Default: the checkpoint's.",
    )
    parser.add_argument(
        "--max_megapixels",
        type=float,
        default=64,
        help="Of a request's images; with vLLM of each. Default: 64.",
    )
    parser.add_argument("--max_images", type=int, default=32, help="Images of a request. Default: %(default)s.")
    parser.add_argument(
        "--keep_images",
        type=int,
        help="Images whose tower features to keep for later turns and other questions. Default: none.",
    )
    parser.add_argument("--device", default="auto", help="Such as cuda:1 or cpu. Default: %(default)s.")
    parser.add_argument("--dtype", default="auto", help="Default: %(default)s, that of the weights.")
    parser.add_argument("--attn_implementation", help="Such as flash_attention_2. Default: transformers'.")
    parser.add_argument(
        "--engine",
        choices=["vllm"],
        help="Serve by vLLM, which answers many requests at once. Default: none.",
    )
    parser.add_argument("more", nargs="*", help="Behind `--`: arguments of vLLM, such as --tensor-parallel-size 2.")
    args = vars(parser.parse_args(argv))
    if args.pop("engine") == "vllm":
        for name in ("keep_images", "device", "attn_implementation"):
            if args.pop(name) != parser.get_default(name):
                parser.error(f"--{name} is not taken with --engine vllm, which has ways of its own")
        run_vllm(**args)
    if more := args.pop("more"):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    host, port = args.pop("host"), args.pop("port")
    args["device_map"] = args.pop("device")
    app = build_app(**{name: value for name, value in args.items() if value is not None})

    class Server(uvicorn.Server):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            if self.started:
                said = {"serving": args["model_name_or_path"], "base_url": f"http://{host}:{port}/v1"}
                print(json.dumps(said), flush=True)  # noqa: T201

    Server(uvicorn.Config(app, host=host, port=port, log_level="warning")).run()
