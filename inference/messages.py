"""The images of OpenAI-style messages: from data URLs and over HTTP, within limits, never from the server's own files."""

import base64
import binascii
import http.client
import io
import time
from urllib.request import urlopen

from PIL import Image

from ..configuration_tokenflex import NAMED_COUNTS
from ..data.examples import BadRowError, decode_image


TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image_url", "input_image")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_BYTES = 64 * 2**20  # of an image that is fetched
MAX_SECONDS = 20


class ImageReader:
    """
    Args:
        max_megapixels (`float`): How large a request's images may be together.
        max_images (`int`): How many a request may have.
    """

    def __init__(self, max_megapixels: float = 64, max_images: int = 32):
        self.max_megapixels = max_megapixels
        self.max_images = max_images

    def read_messages(self, messages: list[dict]) -> tuple[list[dict], list[str | None]]:
        """
        Args:
            messages (`list[dict]`): As OpenAI's chat completions have them.

        Returns:
            `tuple[list[dict], list[str | None]]`: The messages with images in place of their URLs, and each image's
            `detail`.

        Raises:
            ValueError: If a message is malformed, or an image cannot be had.
        """
        if not isinstance(messages, list) or not messages:
            raise ValueError("`messages` is empty: give a list with at least one.")
        read, images, details = [], [], []
        for i, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise ValueError(f"`messages[{i}]`={message!r}: a message has a `role` and a `content`.")
            content = message.get("content")
            if isinstance(content, list):
                where = f"messages[{i}].content"
                content = [self._read_part(part, f"{where}[{j}]", images, details) for j, part in enumerate(content)]
            elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
                raise ValueError(f"`messages[{i}].content`={content!r}: give a text, or a list of parts.")
            read.append({**message, "content": content})
        return read, details

    def _read_part(self, part: dict, where: str, images: list, details: list) -> dict:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in TEXT_PARTS and isinstance(part.get("text"), str):
            return part
        if kind not in IMAGE_PARTS:
            raise ValueError(f"`{where}`: a part is a text with its `text`, or an `image_url`; this is {part!r:.80}.")
        source = part.get("image_url")
        detail = source.get("detail") if isinstance(source, dict) else part.get("detail")
        url = source.get("url") if isinstance(source, dict) else source
        if not isinstance(url, str):
            raise ValueError(f"`{where}`: an image part needs `image_url` with a data: or http(s): URL.")
        if detail is not None and detail not in NAMED_COUNTS:
            raise ValueError(f"`{where}`: `detail`={detail!r}; it is one of {', '.join(NAMED_COUNTS)}.")
        if len(images) == self.max_images:
            raise ValueError(f"`{where}`: a request has at most {self.max_images} images.")
        taken = sum(width * height for width, height in images)
        image = self.read_image(url, where, taken)
        images.append(image.size)
        details.append(detail)
        return {"type": kind, "image_url": image}

    def read_image(self, url: str, where: str = "url", taken: int = 0) -> Image.Image:
        """
        The image at a URL.

        Args:
            url (`str`): A `data:` URL in base64, or one of HTTP.
            where (`str`, *optional*, defaults to `"url"`): What to call it in errors.
            taken (`int`, *optional*, defaults to 0): The pixels of the request's other images.

        Raises:
            ValueError: If there is no image, or it is too large.
        """
        shown = repr(url if len(url) <= 40 else f"{url[:40]}...")
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            content = _decode(url, where, shown)
        elif scheme in ("http", "https"):
            content = _fetch(url, where, shown)
        else:
            raise ValueError(f"`{where}`: {shown} is neither a data: nor an http(s): URL.")
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        except Exception:  # decoders raise whatever they like
            raise ValueError(f"`{where}`: {shown} is no image that can be read: send {', '.join(FORMATS)}.") from None
        megapixels = (taken + image.width * image.height) / 1e6
        if megapixels > self.max_megapixels:
            raise ValueError(
                f"`{where}`: with an image of {image.width} x {image.height} the request has {megapixels:.0f} megapixels; at "
                f"most {self.max_megapixels:g} are taken. Send smaller ones: the model sees far fewer anyway."
            )
        try:
            return decode_image(image)
        except BadRowError as error:
            raise ValueError(f"`{where}`: {shown}: {error}.") from None
        except Exception:
            raise ValueError(f"`{where}`: {shown} is a damaged image.") from None


def _decode(url: str, where: str, shown: str) -> bytes:
    text = "".join(url.partition(",")[2].split()).rstrip("=").translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"`{where}`: {shown} is no base64 data URL ({error}).") from None


def _fetch(url: str, where: str, shown: str) -> bytes:
    end, content = time.monotonic() + MAX_SECONDS, b""
    try:
        with urlopen(url, timeout=MAX_SECONDS) as response:
            while chunk := response.read1(2**16):
                content += chunk
                if len(content) > MAX_BYTES or time.monotonic() > end:
                    raise ValueError(f"more than {MAX_BYTES} bytes, or {MAX_SECONDS} seconds")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ValueError(f"`{where}`: {shown} could not be fetched ({error}).") from None
    return content
