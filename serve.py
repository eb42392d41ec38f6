"""`tokenflex serve`: transformers' OpenAI-style server, with a vision-token count for each request or image."""

import asyncio
import base64
import binascii
import contextlib
import http.client
import io
import json
from argparse import ArgumentParser
from urllib.request import urlopen

import torch
import transformers
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from .choosing_tokenflex import NAMED_COUNTS
from .configuration_tokenflex import resolve_vision_token_grids
from .modeling_tokenflex import TokenFlexForConditionalGeneration
from .placeholders_tokenflex import recount_vision_tokens


try:
    from fastapi import HTTPException
    from fastapi.responses import JSONResponse
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerationState, Modality
except ImportError as error:
    raise ImportError(f"{error}. Serving needs `pip install tokenflex[serve]`.") from None


IMAGE_PARTS = ("image_url", "input_image")
MAX_DOWNLOAD = 64 * 2**20  # bytes of an image that is fetched


class PinnedModel(ModelManager):
    """The one model that is served."""

    def __init__(self, model_name_or_path: str, **options):
        # transformers looks classes up among its own names.
        transformers.TokenFlexForConditionalGeneration = TokenFlexForConditionalGeneration
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["tokenflex"] = "TokenFlexForConditionalGeneration"
        super().__init__(force_model=model_name_or_path, **options)

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict]:
        return [{"id": self.force_model, "object": "model", "owned_by": "tokenflex", "created": 0}]


class ImageReader:
    """
    Turns the image parts of OpenAI-style messages into images.

    Args:
        max_megapixels (`float`): The largest image that is taken.
    """

    def __init__(self, max_megapixels: float):
        self.max_megapixels = max_megapixels

    def read_messages(self, messages: list[dict]) -> tuple[list[dict], list[str | None]]:
        """
        Args:
            messages (`list[dict]`): As the chat completions or responses API has them.

        Returns:
            `tuple[list[dict], list[str | None]]`: The messages with images in place of their addresses, and each image's
            `detail`.

        Raises:
            ValueError: If a message is malformed, or an image cannot be had.
        """
        read, details = [], []
        for i, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise ValueError(f"`messages[{i}]`={message!r}: a message has a `role` and a `content`.")
            content = message.get("content")
            if isinstance(content, list):
                content = [
                    self._read_part(part, f"messages[{i}].content[{j}]", details) for j, part in enumerate(content)
                ]
            read.append({**message, "content": content})
        return read, details

    def _read_part(self, part: dict, where: str, details: list) -> dict:
        if not isinstance(part, dict) or "type" not in part:
            raise ValueError(f"`{where}`={part!r}: a part has a `type`, such as 'text' or 'image_url'.")
        if part["type"] not in IMAGE_PARTS:
            return part
        source = part.get("image_url")
        detail = source.get("detail") if isinstance(source, dict) else part.get("detail")
        url = source.get("url") if isinstance(source, dict) else source
        if not isinstance(url, str):
            raise ValueError(f"`{where}`: an image part needs `image_url` with a data: or http(s): URL.")
        if detail not in (None, *NAMED_COUNTS):
            raise ValueError(f"`{where}`: `detail`={detail!r}; it is one of {', '.join(NAMED_COUNTS)}.")
        details.append(detail)
        return {"type": part["type"], "image_url": self.read_image(url, where)}

    def read_image(self, url: str, where: str) -> Image.Image:
        """
        The image at a URL. Files of the server's are not read.

        Args:
            url (`str`): A `data:` URL in base64, or one of HTTP.
            where (`str`): What to call it in errors.

        Raises:
            ValueError: If there is no image, or it is too large.
        """
        shown = url if len(url) <= 40 else f"{url[:40]}..."
        if url.startswith("data:"):
            try:
                content = base64.b64decode(url.partition(",")[2], validate=True)
            except binascii.Error as error:
                raise ValueError(f"`{where}`: {shown!r} is no base64 data URL ({error}).") from None
        elif url.startswith(("http://", "https://")):
            try:
                with urlopen(url, timeout=20) as response:
                    content = response.read(MAX_DOWNLOAD)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise ValueError(f"`{where}`: {shown!r} could not be fetched ({error}).") from None
        else:
            raise ValueError(f"`{where}`: {shown!r} is neither a data: nor an http(s): URL.")
        try:
            image = Image.open(io.BytesIO(content))
            megapixels = image.width * image.height / 1e6
            if megapixels > self.max_megapixels:
                raise ValueError(
                    f"`{where}`: an image of {image.width} x {image.height} is {megapixels:.0f} megapixels; at most "
                    f"{self.max_megapixels:g} are taken. Send a smaller one: the model sees far fewer anyway."
                )
            return ImageOps.exif_transpose(image).convert("RGB")
        except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"`{where}`: {shown!r} is no image that can be read ({error}).") from None


class ChatHandler(ChatCompletionHandler):
    """
    Chat completions at the count that a request, or each of its images, asks for. In order: the body's `num_vision_tokens`
    (a count, a list of one per image, `"low"`, `"high"` or `"auto"`), each image's `detail`, the server's default.

    Args:
        images ([`ImageReader`]): Reads images.
        num_vision_tokens (`int` or `str`, *optional*): The server's default. Defaults to the processor's.
        kwargs: As for transformers' handler.
    """

    def __init__(self, images: ImageReader, num_vision_tokens: int | str | None = None, **kwargs):
        super().__init__(**kwargs)
        self.images = images
        self.num_vision_tokens = num_vision_tokens

    async def handle_request(self, body: dict, request_id: str):
        body = dict(body)
        template = {**self.chat_template_kwargs, **(body.pop("chat_template_kwargs", None) or {})}
        asked = (body.pop("num_vision_tokens", None), template.pop("num_vision_tokens", None))
        asked = next((count for count in asked if count is not None), None)
        self._validate_request(body)
        model_id, model, processor = self._resolve_model(body)
        manager = self.generation_state.get_manager(model_id)
        with refusing():
            inputs, is_auto = await asyncio.to_thread(self._encode, body, template, asked, model, processor)
            config = self._build_generation_config(body, model.generation_config)
            if is_auto:
                inputs = await manager.async_submit(choose_count, model, inputs)
        options = {"gen_manager": manager, "tools": body.get("tools")}
        arguments = (request_id, model, processor, model_id, inputs, config)
        response = (
            self._streaming(*arguments, **options)
            if body.get("stream")
            else await self._non_streaming(*arguments, **options)
        )
        grids = inputs.get("vision_token_grids")
        if grids is not None:
            response.headers["X-Vision-Tokens"] = ",".join(str(rows * columns) for rows, columns in grids.tolist())
        return response

    def _encode(self, body: dict, template: dict, asked, model, processor) -> tuple[dict, bool]:
        messages, details = self.images.read_messages(body.get("messages") or [])
        if not messages:
            raise ValueError("`messages` is empty: a request has at least one.")
        counts = self.resolve_counts(asked, details, model.config)
        is_auto = counts == "auto" and bool(details)
        if is_auto and model.config.vision_token_chooser is None:
            model.choose_vision_tokens(None)  # says what can be done about it
        if counts is None or isinstance(counts, str):
            counts = min(model.config.vision_token_choices) if is_auto else processor.num_vision_tokens
        if details:
            resolve_vision_token_grids(counts, len(details), processor.patch_grid)
        inputs = processor.apply_chat_template(
            self.get_processor_inputs_from_messages(messages, Modality.VLM),
            add_generation_prompt=True,
            tools=body.get("tools"),
            return_tensors="pt",
            return_dict=True,
            tokenize=True,
            processor_kwargs={"num_vision_tokens": counts} if details else {},
            **template,
        )
        return dict(inputs.to(model.device)), is_auto

    def resolve_counts(self, asked, details: list[str | None], config) -> int | list[int] | str | None:
        """
        The counts of a request's images.

        Args:
            asked (`int`, `list[int]` or `str`, *optional*): The request's `num_vision_tokens`.
            details (`list[str | None]`): Each image's `detail`.
            config ([`TokenFlexConfig`]): The model's.

        Returns:
            `int`, `list[int]`, `"auto"` or `None`: `"auto"` if the model is to choose, `None` for the processor's default.

        Raises:
            ValueError: If `asked` is nothing of that kind.
        """
        default = self.num_vision_tokens
        if asked is None and set(details) <= {None}:
            asked = default
        named = {"low": min(config.vision_token_choices), "high": max(config.vision_token_choices)}
        if asked is not None:
            ints = asked if isinstance(asked, list) else [asked]
            is_named = isinstance(asked, str) and asked in NAMED_COUNTS
            if not is_named and not all(isinstance(count, int) and not isinstance(count, bool) for count in ints):
                raise ValueError(
                    f"`num_vision_tokens`={asked!r}: give a count such as {named['high']}, a list with one for each image, "
                    f"or one of {', '.join(NAMED_COUNTS)}."
                )
            return named.get(asked, asked) if isinstance(asked, str) else asked
        # As OpenAI has it, `auto` leaves the choice to the server: to the model if it has learned to choose.
        if set(details) == {"auto"} and config.vision_token_chooser is not None:
            return "auto"
        fallback = config.num_vision_tokens if default in (None, "auto") else named.get(default, default)
        return [named.get(detail, fallback) for detail in details]


class AnswerHandler(ResponseHandler):
    """The responses API, with images read as in chat completions."""

    def __init__(self, images: ImageReader, **kwargs):
        super().__init__(**kwargs)
        self.images = images

    def get_processor_inputs_from_messages(self, messages: list[dict], modality) -> list[dict]:
        with refusing():
            return super().get_processor_inputs_from_messages(self.images.read_messages(messages)[0], modality)


@contextlib.contextmanager
def refusing():
    """What is wrong with a request is answered with status 400 and the reason."""
    try:
        yield
    except (ValueError, TypeError, KeyError) as error:
        reason = f"missing {error}" if isinstance(error, KeyError) else str(error)
        raise HTTPException(status_code=400, detail=reason) from None


@torch.no_grad()
def choose_count(model: TokenFlexForConditionalGeneration, inputs: dict) -> dict:
    """
    Prompts, encoded at any count, at the count that the model chooses, with the features of the tower's only run.

    Args:
        model ([`TokenFlexForConditionalGeneration`]): The model.
        inputs (`dict`): What the processor returned for one prompt.

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
    enable_cors: bool = False,
    **model_options,
):
    """
    The server's application, with the model loaded.

    Args:
        model_name_or_path (`str`): Checkpoint folder or Hub id.
        num_vision_tokens (`int` or `str`, *optional*):
            The count of requests that ask for none: a number, `"low"`, `"high"` or `"auto"`. Defaults to the processor's.
        max_megapixels (`float`, *optional*, defaults to 64): The largest image that is taken.
        enable_cors (`bool`, *optional*, defaults to `False`): Whether pages of other origins may ask.
        model_options: `device`, `dtype`, `attn_implementation` and `quantization` as `transformers serve` takes them.

    Returns:
        `fastapi.FastAPI`: The application.
    """
    manager, images = PinnedModel(model_name_or_path, **model_options), ImageReader(max_megapixels)
    shared = {"model_manager": manager, "generation_state": GenerationState()}
    chat = ChatHandler(images, num_vision_tokens, **shared)
    model, _ = manager.load_model_and_processor(manager.process_model_name(model_name_or_path))
    default = chat.resolve_counts(None, [None], model.config)
    if default == "auto" and model.config.vision_token_chooser is None:
        model.choose_vision_tokens(None)  # says what can be done about it
    if isinstance(default, int):
        resolve_vision_token_grids(default, 1, model.config.patch_grid)
    app = build_server(
        manager,
        chat,
        completion_handler=CompletionHandler(**shared),
        response_handler=AnswerHandler(images, **shared),
        transcription_handler=TranscriptionHandler(manager, shared["generation_state"]),
        systemone_handler=SystemOneHandler(**shared),
        generation_state=shared["generation_state"],
        enable_cors=enable_cors,
    )
    app.add_exception_handler(HTTPException, answer_error)
    return app


async def answer_error(request, error: HTTPException) -> JSONResponse:
    """An error in the form whose message OpenAI's clients show."""
    said = {"message": error.detail, "type": "invalid_request_error", "code": error.status_code}
    return JSONResponse({"error": said}, status_code=error.status_code)


def main(argv: list[str] | None = None) -> None:
    import uvicorn

    parser = ArgumentParser(prog="tokenflex serve", description="Answer OpenAI-style requests over HTTP.")
    parser.add_argument("--model_name_or_path", required=True, help="Checkpoint folder or Hub id.")
    parser.add_argument("--host", default="localhost", help="Where to listen. Default: %(default)s.")
    parser.add_argument("--port", type=int, default=8000, help="Default: %(default)s.")
    parser.add_argument(
        "--num_vision_tokens",
        type=lambda text: int(text) if text.isdecimal() else text,
        help="The count of requests that ask for none, or `low`, `high`, `auto`. Default: the checkpoint's.",
    )
    parser.add_argument("--max_megapixels", type=float, default=64, help="Largest image taken. Default: %(default)s.")
    parser.add_argument("--device", default="auto", help="Default: %(default)s.")
    parser.add_argument("--dtype", default="auto", help="Default: %(default)s, that of the weights.")
    parser.add_argument("--attn_implementation", help="Such as flash_attention_2. Default: transformers'.")
    parser.add_argument("--quantization", choices=["bnb-4bit", "bnb-8bit"], help="Quantise with bitsandbytes.")
    parser.add_argument("--enable_cors", action="store_true", help="Let pages of any origin ask.")
    args = vars(parser.parse_args(argv))
    host, port = args.pop("host"), args.pop("port")
    app = build_app(**args)
    print(json.dumps({"serving": args["model_name_or_path"], "base_url": f"http://{host}:{port}/v1"}), flush=True)  # noqa: T201
    uvicorn.run(app, host=host, port=port, log_level="warning")
