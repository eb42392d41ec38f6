import base64
import io
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tokenflex.data.images import FORMATS, ImageError, decode_image, decode_upload, fetch, is_address


IMAGE = Image.effect_noise((13, 9), 60).convert("RGB")


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


PNG = encoded(IMAGE)


@given(
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP", "PPM", "DDS", "ICO"]),
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4),
    kept=st.floats(0, 1),
)
@settings(deadline=None, max_examples=300, derandomize=True)
def test_damaged_bytes_decode_or_are_refused(kind, changes, kept):
    damaged = bytearray(encoded(IMAGE, kind))
    for position, value in changes:
        damaged[position % min(len(damaged), 64)] = value
    damaged = bytes(damaged[: round(kept * len(damaged))])
    for decode in (decode_image, partial(decode_upload, max_megapixels=1)):
        try:
            image = decode(damaged)
        except ImageError:
            continue
        assert image.getpixel((0, 0)) is not None


def test_truncated_bytes_are_refused():
    for length in range(3 * len(PNG) // 4):
        with pytest.raises(ImageError):
            decode_image(PNG[:length])


@pytest.mark.parametrize("kind", FORMATS)
def test_uploads_of_common_formats_are_what_files_are(kind):
    content = encoded(IMAGE, kind)
    assert decode_upload(content, max_megapixels=1).tobytes() == decode_image(content).tobytes()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no image that can be read: send PNG"),
        (b"not an image", "no image that can be read: send PNG"),
        (encoded(IMAGE, "PPM"), "no image that can be read: send PNG"),
        (PNG[:-60], "cannot be decoded"),
        (encoded(Image.new("1", (2000, 1000))), "2000 x 1000 there are 2 megapixels; at most 1 are taken"),
        (encoded(Image.new("1", (20_000, 10_000))), "200000000 pixels"),
    ],
    ids=["empty", "text", "rare", "truncated", "large", "bomb"],
)
def test_uploads_that_cannot_be_read_are_refused(content, reason):
    with pytest.raises(ImageError, match=reason):
        decode_upload(content, max_megapixels=1)


def test_uploads_share_their_limit():
    image = encoded(Image.new("1", (700, 1000)))
    assert decode_upload(image, max_megapixels=1, taken=0.3).size == (700, 1000)
    with pytest.raises(ImageError, match="there are 1.4 megapixels; at most 1 are taken"):
        decode_upload(image, max_megapixels=1, taken=0.7)


def test_data_urls_come_in_many_shapes():
    url = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    assert fetch(quote(url, safe=":;,")) == PNG
    head, _, content = url.partition(",")
    broken_up = head + "," + "\n".join(content[i : i + 76] for i in range(0, len(content), 76)) + "\n"
    safe = head + "," + content.replace("+", "-").replace("/", "_").rstrip("=")
    for other in (url, safe, broken_up, url.replace("data:", "DATA:")):
        assert is_address(other)
        assert fetch(other) == PNG


def test_http_servers_are_asked(tmp_path):
    (tmp_path / "image.png").write_bytes(PNG)
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *args: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert fetch(f"{url}/image.png") == PNG
        with pytest.raises(ImageError, match=r"could not be fetched \(HTTP Error 404"):
            fetch(f"{url}/missing.png")
        server.shutdown()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("data:image/png;base64,%%%", "no base64 data URL"),
        ("file:///etc/hostname", "neither a data: nor an http"),
        ("/etc/hostname", "neither a data: nor an http"),
        ("http://", "could not be fetched"),
    ],
)
def test_other_addresses_are_refused(url, reason):
    with pytest.raises(ImageError, match=reason):
        fetch(url)


def test_paths_are_no_addresses():
    assert not any(is_address(value) for value in ("image.png", "/data/image.png", "C:\\image.png", PNG, IMAGE, None))
