"""`tokenflex serve`: OpenAI-style chat completions, with a vision-token count for each request or image."""

import asyncio
import contextlib
import json
import re
import threading
from argparse import ArgumentParser
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..checkpoints.provenance import is_hub_id
from ..configuration_tokenflex import NAMED_COUNTS, resolve_vision_token_grids
from ..modeling_tokenflex import TokenFlexForConditionalGeneration
from ..placeholders_tokenflex import recount_vision_tokens
from .messages import ImageReader


try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from pydantic import BaseModel, Field, StrictBool, ValidationError
    from starlette.exceptions import HTTPException as AnyHTTPException
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.utils import GenerationState, Modality
except ImportError as error:
    raise ImportError(f'{error}. `tokenflex serve` needs `pip install "tokenflex[serve]"`.') from None


DEFAULT_MAX_TOKENS = 1024


class Sampling(BaseModel):
    """What a request says about generating, with the limits that `generate` has."""

    stream: StrictBool | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(gt=-1, le=2)] | None = None
    logit_bias: dict[int, float] | None = None
    stop: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] | None = None
    seed: int | None = None


class ClientLeft(StoppingCriteria):
    """Ends an answer that nobody waits for any more."""

    def __init__(self):
        self.left = threading.Event()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.left.is_set(), device=input_ids.device)

    async def watch(self, request: Request) -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.5)
        self.left.set()


class ChatHandler(ChatCompletionHandler):
    """
    Chat completions at the count that a request, or each of its images, asks for. In order: the body's `num_vision_tokens`
    (a count, a list of one per image, `"low"`, `"high"` or `"auto"`), each image's `detail`, the server's default.

    Args:
        name (`str`): What requests call the model.
        model ([`TokenFlexForConditionalGeneration`]): The model.
        processor ([`TokenFlexProcessor`]): Its processor.
        images ([`ImageReader`]): Reads images.
        num_vision_tokens (`int` or `str`, *optional*): The server's default. Defaults to the processor's.

    Raises:
        ValueError: If the model cannot do the default.
    """

    def __init__(self, name: str, model, processor, images: ImageReader, num_vision_tokens: int | str | None = None):
        super().__init__(model_manager=None, generation_state=GenerationState())
        self.name, self.model, self.processor, self.images = name, model, processor, images
        self.num_vision_tokens = num_vision_tokens
        self.manager = self.generation_state.get_manager(name)
        self.readers = ThreadPoolExecutor(16, "image")  # a slow address makes only those wait who name one
        self.encoders = ThreadPoolExecutor(2, "encode")
        default = self.resolve_counts(None, [None])
        if isinstance(default, int):
            resolve_vision_token_grids(default, 1, processor.patch_grid)

    async def handle_request(self, body: dict, request_id: str, request: Request | None = None):
        loop = asyncio.get_running_loop()
        with refusing():
            body, template, asked = self._read_body(body)
            messages, details = await loop.run_in_executor(
                self.readers, self.images.read_messages, body.get("messages")
            )
            counts = self.resolve_counts(asked, details)
            arguments = (messages, template, counts, len(details), body.get("tools"))
            inputs = await loop.run_in_executor(self.encoders, self._encode, *arguments)
            config = self._build_generation_config(body, self.model.generation_config)
            config.max_new_tokens = self._fit(config.max_new_tokens, inputs)
            if counts == "auto" and details:
                inputs = await self.manager.async_submit(choose_count, self.model, inputs)
        criterion = ClientLeft()
        inputs["stopping_criteria"] = StoppingCriteriaList([criterion])
        # The tokenizer decodes as the processor does, and knows its vocabulary, which stop strings need.
        arguments = (request_id, self.model, self.processor.tokenizer, self.name, inputs, config)
        options = {"gen_manager": self.manager, "tools": body.get("tools")}
        if body.get("stream"):  # which sees by itself whether the client has left
            response = self._streaming(*arguments, **options)
        else:
            watch = asyncio.create_task(criterion.watch(request)) if request else None
            try:
                response = await self._non_streaming(*arguments, **options)
            finally:
                if watch:
                    watch.cancel()
        grids = inputs.get("vision_token_grids")
        if grids is not None:
            response.headers["X-Vision-Tokens"] = ",".join(str(rows * columns) for rows, columns in grids.tolist())
        return response

    def _read_body(self, body: dict) -> tuple[dict, dict, int | list | str | None]:
        """The body without what is about counts, the chat template's variables, and the counts asked for."""
        body = dict(body)
        if body.get("model") not in (None, self.name):
            raise ValueError(f"`model`={body['model']!r}: this server is pinned to {self.name!r}.")
        if body.pop("generation_config", None) is not None:
            raise ValueError("`generation_config` is not taken: use the fields of OpenAI's API.")
        template = body.pop("chat_template_kwargs", None) or {}
        if not isinstance(template, dict):
            raise ValueError(f"`chat_template_kwargs`={template!r}: give an object.")
        template = dict(template)
        asked = (body.pop("num_vision_tokens", None), template.pop("num_vision_tokens", None))
        written = self.processor.chat_template
        names = set(re.findall(r"\w+", written if isinstance(written, str) else json.dumps(written)))
        for name in template:
            if name not in names or name in ("messages", "tools", "documents", "add_generation_prompt"):
                raise ValueError(f"`chat_template_kwargs`: the chat template takes no {name!r} from a request.")
        self._validate_request(body)
        said = Sampling.model_validate(body).model_dump(exclude_none=True)
        vocab_size = self.model.config.text_config.vocab_size
        for token in said.get("logit_bias", {}):
            if not 0 <= token < vocab_size:
                raise ValueError(f"`logit_bias`: there is no token {token}; they are 0 to {vocab_size - 1}.")
        return {**body, **said}, template, next((count for count in asked if count is not None), None)

    def _encode(self, messages: list, template: dict, counts, num_images: int, tools: list | None) -> dict:
        if counts == "auto":
            counts = min(self.model.config.vision_token_choices)
        if num_images:
            resolve_vision_token_grids(counts, num_images, self.processor.patch_grid)
        inputs = self.processor.apply_chat_template(
            self.get_processor_inputs_from_messages(messages, Modality.VLM),
            add_generation_prompt=True,
            tools=tools,
            return_tensors="pt",
            return_dict=True,
            tokenize=True,
            processor_kwargs={"num_vision_tokens": counts} if num_images else {},
            **template,
        )
        return dict(inputs.to(self.model.device))

    def _fit(self, max_new_tokens: int | None, inputs: dict) -> int:
        """The longest answer that still fits behind the prompt."""
        length = inputs["input_ids"].shape[1]
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        if limit is None:
            return max_new_tokens
        if length >= limit:
            raise ValueError(
                f"The prompt has {length} tokens, and the model takes {limit} with its answer: shorten it, or use fewer "
                "vision tokens."
            )
        return min(max_new_tokens, limit - length)

    def _build_generation_config(self, body: dict, model_generation_config: GenerationConfig, use_cb: bool = False):
        config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
        asked = body.get("max_completion_tokens") or body.get("max_tokens")
        config.max_new_tokens = asked or model_generation_config.max_new_tokens or DEFAULT_MAX_TOKENS
        return config

    def resolve_counts(self, asked, details: list[str | None]) -> int | list[int] | str:
        """
        The counts of a request's images.

        Args:
            asked (`int`, `list[int]` or `str`, *optional*): The request's `num_vision_tokens`.
            details (`list[str | None]`): Each image's `detail`.

        Returns:
            `int`, `list[int]` or `"auto"`: `"auto"` if the model is to choose.

        Raises:
            ValueError: If `asked` is nothing of that kind, or the model has not learned to choose.
        """
        config = self.model.config
        named = {"low": min(config.vision_token_choices), "high": max(config.vision_token_choices)}
        if asked is None and set(details) <= {None}:
            asked = self.processor.num_vision_tokens if self.num_vision_tokens is None else self.num_vision_tokens
        if asked is not None:
            counts = asked if isinstance(asked, list) else [asked]
            is_named = isinstance(asked, str) and asked in NAMED_COUNTS
            if not is_named and not all(isinstance(count, int) and not isinstance(count, bool) for count in counts):
                raise ValueError(
                    f"`num_vision_tokens`={asked!r}: give a count such as {named['high']}, a list with one for each image, "
                    f"or one of {', '.join(NAMED_COUNTS)}."
                )
            if asked == "auto" and config.vision_token_chooser is None:
                raise ValueError(
                    f"`num_vision_tokens`='auto': this checkpoint has not learned to choose. Run `tokenflex calibrate` on "
                    f"it, or ask for 'low' ({named['low']}), 'high' ({named['high']}) or any count."
                )
            return named.get(asked, asked) if isinstance(asked, str) else asked
        # As OpenAI has it, `auto` leaves the choice to the server: to the model if it has learned to choose.
        if set(details) == {"auto"} and config.vision_token_chooser is not None:
            return "auto"
        default = self.num_vision_tokens
        default = self.processor.num_vision_tokens if default in (None, "auto") else named.get(default, default)
        return [named.get(detail, default) for detail in details]


@contextlib.contextmanager
def refusing():
    """What is wrong with a request is answered with status 400 and the reason."""
    try:
        yield
    except ValidationError as error:
        said = "; ".join(f"`{'.'.join(map(str, e['loc']))}`={e['input']!r}: {e['msg']}" for e in error.errors())
        raise HTTPException(400, said) from None
    except KeyError as error:
        raise HTTPException(400, f"A message or tool call lacks {error}.") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise HTTPException(400, str(error)) from None


@torch.no_grad()
def choose_count(model: TokenFlexForConditionalGeneration, inputs: Mapping) -> dict:
    """
    A prompt, encoded at any count, at the count that the model chooses, with the features of the tower's only run.

    Args:
        model ([`TokenFlexForConditionalGeneration`]): The model.
        inputs (`Mapping`): What the processor returned for one prompt.

    Returns:
        `dict`: The arguments of `generate`.
    """
    inputs = dict(inputs)
    pixel_values = inputs.pop("pixel_values")
    inputs["mm_encoder_outputs"] = {"image": model.get_image_features(pixel_values, 1, return_dict=True)}
    (count,) = model.choose_vision_tokens(**inputs)
    sizes = {name: inputs[name].tolist() for name in ("image_sizes", "num_tiles") if name in inputs}
    grids = resolve_vision_token_grids(count, len(pixel_values), model.config.patch_grid, **sizes)
    return recount_vision_tokens(inputs, grids, model.config.image_token_id, model.generation_config.pad_token_id)


def build_app(
    model_name_or_path: str,
    num_vision_tokens: int | str | None = None,
    max_megapixels: float = 64,
    max_images: int = 32,
    keep_images: int | None = None,
    **model_options,
) -> "FastAPI":
    """
    The server's application, with the model loaded.

    Args:
        model_name_or_path (`str`): Checkpoint folder or Hub id.
        num_vision_tokens (`int` or `str`, *optional*):
            The count of requests that ask for none: a number, `"low"`, `"high"` or `"auto"`. Defaults to the processor's.
        max_megapixels (`float`, *optional*, defaults to 64): How large a request's images may be together.
        max_images (`int`, *optional*, defaults to 32): How many images a request may have.
        keep_images (`int`, *optional*):
            How many images' tower features to keep for later turns and other questions. Defaults to none, as does 0.
        model_options: As for `from_pretrained`.

    Returns:
        `fastapi.FastAPI`: The application.

    Raises:
        ValueError: If there is no such checkpoint, or it cannot do the default count.
    """
    if not Path(model_name_or_path).is_dir() and not is_hub_id(model_name_or_path):
        raise ValueError(f"`model_name_or_path`={model_name_or_path!r}: no such folder, and no id of the Hub's form.")
    processor = AutoProcessor.from_pretrained(model_name_or_path)
    model = AutoModelForImageTextToText.from_pretrained(model_name_or_path, **{"device_map": "auto", **model_options})
    model.keep_image_features(keep_images or None)
    images = ImageReader(max_megapixels, max_images)
    handler = ChatHandler(model_name_or_path, model.eval(), processor, images, num_vision_tokens)
    app = FastAPI(title="tokenflex", openapi_url=None)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: dict, request: Request):
        return await handler.handle_request(body, f"chatcmpl-{id(request):x}", request)

    @app.get("/v1/models")
    async def models():
        listed = {"id": model_name_or_path, "object": "model", "owned_by": "tokenflex", "created": 0}
        return {"object": "list", "data": [listed]}

    @app.get("/health")
    async def health():
        return {"status": "ok"}

    @app.exception_handler(AnyHTTPException)
    async def refuse(_, error: AnyHTTPException):
        return _error(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def refuse_body(_, error: RequestValidationError):
        return _error(400, f"The body is no JSON object: {error.errors()[0]['msg']}.")

    @app.exception_handler(Exception)
    async def fail(_, error: Exception):
        return _error(500, f"{type(error).__name__}: {error}")

    return app


def _error(status: int, message: str) -> "JSONResponse":
    """An error in the form whose message OpenAI's clients show."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status_code=status)


def _count(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="tokenflex serve", description="Answer OpenAI-style requests over HTTP.")
    parser.add_argument("--model_name_or_path", required=True, help="Checkpoint folder or Hub id.")
    parser.add_argument("--host", default="localhost", help="Where to listen. Default: %(default)s.")
    parser.add_argument("--port", type=int, default=8000, help="Default: %(default)s.")
    parser.add_argument(
        "--num_vision_tokens",
        type=_count,
        help="The count of requests that ask for none, or `low`, `high`, `auto`. Default: the checkpoint's.",
    )
    parser.add_argument(
        "--max_megapixels", type=float, default=64, help="Of a request's images together. Default: %(default)s."
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
    args = vars(parser.parse_args(argv))
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
