"""Messages of OpenAI-style requests as chat templates take them, with the images that they name."""

import json

from PIL import Image

from ..configuration_tokenflex import NAMED_COUNTS
from ..data.images import ImageError, decode_upload, fetch


TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image_url", "input_image")


class MessageReader:
    """
    Reads messages, and their images from `data:` URLs and over HTTP, never from the server's own files.

    Args:
        max_megapixels (`float`, *optional*, defaults to 64): Limit on a request's images together.
        max_images (`int`, *optional*, defaults to 32): Limit on their number.
    """

    def __init__(self, max_megapixels: float = 64, max_images: int = 32):
        self.max_megapixels = max_megapixels
        self.max_images = max_images

    def read(self, messages: list[dict]) -> tuple[list[dict], list[str | None]]:
        """
        Args:
            messages (`list[dict]`): As OpenAI's chat completions have them.

        Returns:
            `tuple[list[dict], list[str | None]]`: Messages in transformers' chat format, and each image's `detail`.

        Raises:
            ValueError: If a message is malformed, or an image cannot be had.
        """
        read, images, details = [], [], []
        for i, message in enumerate(messages):
            if not isinstance(message.get("role"), str):
                raise ValueError(f"`messages[{i}]`={message!r:.80}: a message has a `role` and a `content`.")
            content, calls = message.get("content"), message.get("tool_calls")
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            elif content is None and calls:
                content = []
            elif not isinstance(content, list):
                raise ValueError(f"`messages[{i}].content`={content!r:.80}: give a text, or a list of parts.")
            parts = [
                self._read_part(part, f"messages[{i}].content[{j}]", images, details) for j, part in enumerate(content)
            ]
            read.append({"role": message["role"], "content": parts})
            if calls:
                read[-1]["tool_calls"] = _read_calls(calls, f"messages[{i}].tool_calls")
            if "tool_call_id" in message:
                read[-1]["tool_call_id"] = message["tool_call_id"]
        return read, details

    def _read_part(self, part: dict, where: str, images: list[Image.Image], details: list[str | None]) -> dict:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in TEXT_PARTS and isinstance(part.get("text"), str):
            return {"type": "text", "text": part["text"]}
        if kind not in IMAGE_PARTS:
            raise ValueError(f"`{where}`: a part is a text with its `text`, or an `image_url`; this is {part!r:.80}.")
        source = part.get("image_url")
        source = source if isinstance(source, dict) else {"url": source, "detail": part.get("detail")}
        url, detail = source.get("url"), source.get("detail")
        if not isinstance(url, str):
            raise ValueError(f"`{where}`: an image part needs `image_url` with a data: or http(s): URL.")
        if detail is not None and detail not in NAMED_COUNTS:
            raise ValueError(f"`{where}`: `detail`={detail!r}; it is one of {', '.join(NAMED_COUNTS)}.")
        if len(images) == self.max_images:
            raise ValueError(f"`{where}`: a request has at most {self.max_images} images.")
        taken = sum(image.width * image.height for image in images) / 1e6
        try:
            image = decode_upload(fetch(url), self.max_megapixels, taken)
        except ImageError as error:
            raise ValueError(f"`{where}`: {error}.") from None
        images.append(image)
        details.append(detail)
        return {"type": "image", "image": image}


def _read_calls(calls: list[dict], where: str) -> list[dict]:
    """Calls of tools with their arguments as objects, over which chat templates go, and not as JSON."""
    try:
        functions = [dict(call["function"]) for call in calls]
        for function in functions:
            if isinstance(function["arguments"], str):
                function["arguments"] = json.loads(function["arguments"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"`{where}`: a call has a `function` with a name and JSON `arguments` ({error!r}).") from None
    return [{**call, "function": function} for call, function in zip(calls, functions)]
