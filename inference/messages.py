"""Messages of OpenAI-style requests as chat templates take them, with the images that they name."""

from PIL import Image

from ..choices_tokenflex import NAMED_COUNTS
from ..data.images import ImageError, decode_upload, fetch


ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
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
            where = f"messages[{i}]"
            role, content = message.get("role"), message.get("content")
            if role not in list(ROLES):
                raise ValueError(f"`{where}.role`={role!r:.80}: give one of {', '.join(ROLES)}.")
            _refuse_others(message, ("role", "content"), where)
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            elif not isinstance(content, list):
                raise ValueError(f"`{where}.content`={content!r:.80}: give a text, or a list of parts.")
            parts = [self._read_part(part, f"{where}.content[{j}]", images, details) for j, part in enumerate(content)]
            if role != "assistant" and all(part.get("text") == "" for part in parts):
                raise ValueError(f"`{where}.content`={content!r:.80} is empty: give a text, or leave the message out.")
            read.append({"role": ROLES[role], "content": parts})
        return read, details

    def _read_part(self, part: dict, where: str, images: list[Image.Image], details: list[str | None]) -> dict:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in TEXT_PARTS and isinstance(part.get("text"), str):
            _refuse_others(part, ("type", "text"), where)
            return {"type": "text", "text": part["text"]}
        if kind not in IMAGE_PARTS:
            raise ValueError(f"`{where}`: a part is a text with its `text`, or an `image_url`; this is {part!r:.80}.")
        source = part.get("image_url")
        if isinstance(source, dict):
            _refuse_others(part, ("type", "image_url"), where)
            _refuse_others(source, ("url", "detail"), f"{where}.image_url")
        else:
            _refuse_others(part, ("type", "image_url", "detail"), where)
            source = {"url": source, "detail": part.get("detail")}
        url, detail = source.get("url"), source.get("detail")
        if not isinstance(url, str):
            raise ValueError(f"`{where}`: an image part needs `image_url` with a data: or http(s): URL.")
        check_detail(detail, where)
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


def check_detail(detail, where: str) -> None:
    """Refuses an image's `detail` that names no count."""
    if detail is not None and detail not in list(NAMED_COUNTS):
        raise ValueError(f"`{where}`: `detail`={detail!r:.80}; it is one of {', '.join(NAMED_COUNTS)}.")


def _refuse_others(said: dict, names: tuple[str, ...], where: str) -> None:
    """Refuses what would not be read; null and empty lists say nothing."""
    for name, value in said.items():
        if name not in names and value not in (None, []):
            known = ", ".join(f"`{name}`" for name in names)
            raise ValueError(f"`{where}.{name}`={value!r:.80} is not read, only {known}: leave it out.")
