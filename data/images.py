"""Images of people's files, uploads and addresses, decoded within limits."""

import base64
import binascii
import http.client
import io
import re
import reprlib
import time
from pathlib import Path
from urllib.parse import unquote
from urllib.request import urlopen

from PIL import Image, UnidentifiedImageError
from transformers.image_utils import is_valid_image

from ..processing_tokenflex import read_image


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # allowed from strangers; PIL reads many more
MAX_BYTES = 64 * 2**20  # of an image that is fetched
MAX_SECONDS = 20


class ImageError(ValueError):
    """An image that cannot be had; the message says why."""


def decode_image(value, image_folder: str | Path | None = None) -> Image.Image:
    """
    Reads an image as [`read_image`] does, but nothing from the network.

    Args:
        value (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, `bytes`, `str`, `Path` or `dict`):
            The image, its pixels, its encoded bytes or file, or the `{"bytes", "path"}` of `datasets`.
        image_folder (`str` or `Path`, *optional*):
            Folder in which relative paths start. Defaults to the working directory.

    Returns:
        `PIL.Image.Image`: Upright, RGB of 8 bits.

    Raises:
        ImageError: If it is missing, on the network, or not a readable image.
    """
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if is_address(value):
        raise ImageError(
            f"the image is the address {reprlib.repr(value)}: images are not fetched from the network, so download it "
            "first and give its path"
        )
    if isinstance(value, (str, Path)):
        value = Path(image_folder or "") / value
    elif not isinstance(value, bytes) and not is_valid_image(value):
        raise ImageError(f"the image is {type(value).__name__}, not an image, bytes or a path")
    try:
        return read_image(value)
    except (TypeError, ValueError) as error:
        raise ImageError(str(error)) from None


def decode_upload(content: bytes, max_megapixels: float, taken: float = 0) -> Image.Image:
    """
    As [`decode_image`], for what a stranger sent: common formats alone, and a size that is checked before it is
    decoded.

    Args:
        content (`bytes`): The encoded image.
        max_megapixels (`float`): The most megapixels.
        taken (`float`, *optional*, defaults to 0): Number of them that other images have taken.

    Raises:
        ImageError: If it is not a readable image, or too large.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise ImageError(f"this is no image that can be read: send {', '.join(FORMATS)}") from None
    except Exception as error:
        raise ImageError(f"the image cannot be decoded ({type(error).__name__}: {error})") from None
    megapixels = taken + image.width * image.height / 1e6
    if megapixels > max_megapixels:
        raise ImageError(
            f"with an image of {image.width} x {image.height} there are {megapixels:.3g} megapixels; at most "
            f"{max_megapixels:g} are taken, so make it smaller: the model sees far fewer anyway"
        )
    return decode_image(image)


def is_address(value) -> bool:
    """True for a text that is a URL of any kind, not a path."""
    return isinstance(value, str) and bool(re.match(r"[a-z][a-z0-9+.-]+://|data:", value, re.IGNORECASE))


def fetch(url: str) -> bytes:
    """
    The bytes that a `data:` URL holds or that an HTTP server sends, at most 64 MiB in 20 seconds.

    Args:
        url (`str`): The URL.

    Raises:
        ImageError: If it is of another kind, no base64, or cannot be fetched.
    """
    shown = repr(url if len(url) <= 40 else f"{url[:40]}...")
    scheme = url.partition(":")[0].lower()
    if scheme == "data":
        text = "".join(unquote(url.partition(",")[2]).split()).rstrip("=").translate(str.maketrans("-_", "+/"))
        try:
            return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        except (binascii.Error, ValueError) as error:
            raise ImageError(f"{shown} is no base64 data URL ({error})") from None
    if scheme not in ("http", "https"):
        raise ImageError(f"{shown} is neither a data: nor an http(s): URL")
    end, content = time.monotonic() + MAX_SECONDS, bytearray()
    try:
        with urlopen(url, timeout=MAX_SECONDS) as response:
            while chunk := response.read1(2**16):
                content += chunk
                if len(content) > MAX_BYTES or time.monotonic() > end:
                    raise ValueError(f"more than {MAX_BYTES} bytes, or {MAX_SECONDS} seconds")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ImageError(f"{shown} could not be fetched ({error})") from None
    return bytes(content)
