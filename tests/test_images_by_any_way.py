"""An image is one image: whatever kind of file it is and whichever way it takes, the model sees the same pixels."""

import base64
import io
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from tokenflex.data.examples import Example
from tokenflex.data.images import decode_image, decode_upload
from tokenflex.data.videos import expand_videos
from tokenflex.inference.cards import draw_grid
from tokenflex.inference.messages import MessageReader
from tokenflex.processing_tokenflex import read_image
from tokenflex.training import TokenFlexDataCollator


TEXT = "<|image_pad|> which color is it?"
ROWS, COLUMNS = np.mgrid[:60, :100]
PIXELS = np.stack([2 * ROWS + 40, 2 * COLUMNS + 20, 255 - ROWS - COLUMNS], axis=-1).astype(np.uint8)
GRAY, SHOWN = PIXELS[..., 1], COLUMNS < 70
RGB = Image.fromarray(PIXELS)
FEW_COLORS = RGB.quantize(64)
TURNS = Image.Transpose
# Orientation of EXIF: how an upright photo falls on the sensor, and how it is turned back.
ORIENTATIONS = {
    2: (TURNS.FLIP_LEFT_RIGHT, TURNS.FLIP_LEFT_RIGHT),
    3: (TURNS.ROTATE_180, TURNS.ROTATE_180),
    4: (TURNS.FLIP_TOP_BOTTOM, TURNS.FLIP_TOP_BOTTOM),
    5: (TURNS.TRANSPOSE, TURNS.TRANSPOSE),
    6: (TURNS.ROTATE_90, TURNS.ROTATE_270),
    7: (TURNS.TRANSVERSE, TURNS.TRANSVERSE),
    8: (TURNS.ROTATE_270, TURNS.ROTATE_90),
}


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(content):
    return Image.open(io.BytesIO(content))


def photo(orientation, image=RGB, kind="PNG"):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(image.transpose(ORIENTATIONS[orientation][0]), kind, exif=exif)


def three(channel):
    return np.stack([channel] * 3, axis=-1)


def on_white(pixels, shown=SHOWN):
    return np.where(shown[..., None], pixels, 255).astype(np.uint8)


def with_alpha(image):
    image = image.copy()
    image.putalpha(Image.fromarray(np.where(SHOWN, 255, 0).astype(np.uint8)))
    return image


def animation(kind, first, **options):
    return encoded(first, kind, save_all=True, append_images=[first.rotate(180)] * 2, **options)


JPEG, CMYK = photo(6, kind="JPEG"), encoded(RGB.convert("CMYK"), "TIFF")
COLOR, SHADE = tuple(PIXELS[3, 4].tolist()), int(GRAY[0, 9])
INDICES, COLORS = np.asarray(FEW_COLORS), np.asarray(FEW_COLORS.convert("RGB"))
DEEP = 257 * GRAY.astype(np.uint16)
# Of each kind, a file, and what the model is to see.
KINDS = {
    "RGB": (encoded(RGB), PIXELS),
    **{f"orientation {n}": (photo(n), PIXELS) for n in ORIENTATIONS},
    "orientation 6 of a JPEG": (JPEG, np.asarray(opened(JPEG).transpose(ORIENTATIONS[6][1]))),
    "orientation 5 of a TIFF": (photo(5, kind="TIFF"), PIXELS),
    "orientation 8 with alpha": (photo(8, with_alpha(RGB)), on_white(PIXELS)),
    "RGBA": (encoded(with_alpha(RGB)), on_white(PIXELS)),
    "RGB with a transparent color": (
        encoded(RGB, transparency=COLOR),
        on_white(PIXELS, (PIXELS != COLOR).any(-1)),
    ),
    "palette": (encoded(FEW_COLORS), COLORS),
    "palette with a transparent color": (encoded(FEW_COLORS, transparency=5), on_white(COLORS, INDICES != 5)),
    "palette with alpha": (
        encoded(FEW_COLORS, transparency=bytes([0, 255] * 32)),
        on_white(COLORS, INDICES % 2 == 1),
    ),
    "gray": (encoded(Image.fromarray(GRAY)), three(GRAY)),
    "gray with a transparent shade": (
        encoded(Image.fromarray(GRAY), transparency=SHADE),
        on_white(three(GRAY), GRAY != SHADE),
    ),
    "LA": (encoded(with_alpha(Image.fromarray(GRAY))), on_white(three(GRAY))),
    "16 bits gray": (encoded(Image.fromarray(DEEP)), three(GRAY)),
    "16 bits gray with a transparent shade": (
        encoded(Image.fromarray(DEEP), transparency=257 * SHADE),
        on_white(three(GRAY), GRAY != SHADE),
    ),
    "16 bits gray TIFF": (encoded(Image.fromarray(DEEP), "TIFF"), three(GRAY)),
    "32 bits gray TIFF": (encoded(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), three(GRAY)),
    "1 bit": (encoded(Image.fromarray(SHOWN)), three(np.where(SHOWN, 255, 0).astype(np.uint8))),
    "CMYK": (CMYK, np.asarray(opened(CMYK).convert("RGB"))),
    "animated GIF": (animation("GIF", FEW_COLORS), COLORS),
    "animated PNG": (animation("PNG", RGB), PIXELS),
    "animated WebP": (animation("WEBP", with_alpha(RGB), lossless=True), on_white(PIXELS)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for kind, (content, _) in KINDS.items():
        (folder / name_of(kind)).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def address(folder):
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *args: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def name_of(kind):
    return kind.replace(" ", "_")


def data_url(content):
    return f"data:image/any;base64,{base64.b64encode(content).decode()}"


def part_of_a_message(**source):
    def encode(processor, *place):
        part = {"type": "image", **{key: value(*place) for key, value in source.items()}}
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "which color?"}]}]
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return processor.apply_chat_template(messages, **options)["pixel_values"]

    return encode


def argument(make):
    return lambda processor, *place: processor(images=make(*place), text=TEXT, return_tensors="pt")["pixel_values"]


def collated(processor, row):
    return TokenFlexDataCollator(processor, [4], [1.0])([row])["pixel_values"]


def row(make):
    return lambda processor, *place: collated(processor, make(*place))


def question(image):
    return {"image": image, "question": "which color?", "answer": "red"}


def from_a_request(content, *_):
    part = {"type": "image_url", "image_url": {"url": data_url(content)}}
    messages, _ = MessageReader().read([{"role": "user", "content": [part]}])
    return messages[0]["content"][0]["image"]


def frame(content, *_):
    video = {"type": "video", "video": [opened(content)]}
    messages, _ = expand_videos([{"role": "user", "content": [video]}])
    return next(part["image"] for part in messages[0]["content"] if part["type"] == "image")


def example(content, *_):
    answer = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    return Example([opened(content)], [[{"role": "user", "content": [{"type": "image"}]}, answer]])


# Each takes a processor and an image's bytes, path and address to the pixels that the model gets.
WAYS = {
    "PIL": argument(lambda content, *_: opened(content)),
    "bytes": argument(lambda content, *_: content),
    "path": argument(lambda content, path, _: path),
    "path as text": argument(lambda content, path, _: str(path)),
    "URL": argument(lambda content, path, address: address),
    "data URL": argument(lambda content, *_: data_url(content)),
    "bare base64": argument(lambda content, *_: base64.b64encode(content).decode()),
    "datasets' bytes": argument(lambda content, *_: {"bytes": content, "path": None}),
    "datasets' path": argument(lambda content, path, _: {"bytes": None, "path": str(path)}),
    "part with an image": part_of_a_message(image=lambda content, *_: opened(content)),
    "part with a path": part_of_a_message(path=lambda content, path, _: str(path)),
    "part with a URL": part_of_a_message(url=lambda content, path, address: address),
    "part with base64": part_of_a_message(base64=lambda content, *_: base64.b64encode(content).decode()),
    "decoded": argument(lambda content, *_: decode_image(content)),
    "uploaded": argument(lambda content, *_: decode_upload(content, max_megapixels=1)),
    "request": argument(from_a_request),
    "frame": argument(frame),
    "row": row(lambda content, *_: question({"bytes": content, "path": None})),
    "row with PIL": row(lambda content, *_: question(opened(content))),
    "row as an example": row(example),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_shows_the_same_pixels(narrow, folder, address, way, kind):
    processor, (content, pixels) = narrow[1], KINDS[kind]
    expected = processor.image_processor([Image.fromarray(pixels)], return_tensors="pt")["pixel_values"]
    got = WAYS[way](processor, content, folder / name_of(kind), f"{address}/{name_of(kind)}")
    assert torch.equal(got, expected)


ARRAYS = {
    "RGB": (PIXELS, PIXELS),
    "RGBA": (np.asarray(with_alpha(RGB)), on_white(PIXELS)),
    "gray": (GRAY, three(GRAY)),
    "gray with an axis": (GRAY[..., None], three(GRAY)),
    "LA": (np.asarray(with_alpha(Image.fromarray(GRAY))), on_white(three(GRAY))),
    "channels first": (PIXELS.transpose(2, 0, 1), PIXELS),
    "gray, channels first": (GRAY[None], three(GRAY)),
    "RGBA, channels first": (np.asarray(with_alpha(RGB)).transpose(2, 0, 1), on_white(PIXELS)),
    "two rows": (PIXELS[:2], PIXELS[:2]),
    "int64": (PIXELS.astype(np.int64), PIXELS),
    "16 bits": (257 * PIXELS.astype(np.uint16), PIXELS),
    "16 bits, dark": (np.full((9, 7), 200, dtype=np.uint16), np.zeros((9, 7, 3), dtype=np.uint8)),
    "16 bits in int32": (257 * PIXELS.astype(np.int32), PIXELS),
    "truth": (SHOWN, three(np.where(SHOWN, 255, 0).astype(np.uint8))),
    "floats to 255": (PIXELS.astype(np.float32), PIXELS),
    "black floats": (np.zeros((9, 7, 3)), np.zeros((9, 7, 3), dtype=np.uint8)),
}


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["array", "tensor"])
def test_arrays_show_what_images_do(narrow, make, kind):
    processor, (array, pixels) = narrow[1], ARRAYS[kind]
    expected = processor.image_processor([Image.fromarray(pixels)], return_tensors="pt")["pixel_values"]
    array = make(array.copy())
    for images in (array, [array], [[array]], array[None]) if array.ndim == 3 else (array, [array]):
        assert torch.equal(processor(images=images, text=TEXT, return_tensors="pt")["pixel_values"], expected)
    assert torch.equal(collated(processor, question(array)), expected)


@pytest.mark.parametrize("kind", ["orientation 6", "orientation 8 with alpha"])
@pytest.mark.parametrize("options", [{"match_aspect_ratio": True}, {"crop_to_patches": True}], ids=str)
def test_shapes_and_tiles_are_those_of_the_upright_image(narrow, kind, options):
    processor, (content, pixels) = narrow[1], KINDS[kind]
    shown, options = Image.fromarray(pixels), {"num_vision_tokens": 16, **options}
    expected = processor(images=shown, text=TEXT, return_tensors="pt", **options)
    got = processor(images=opened(content), text=TEXT, return_tensors="pt", **options)
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)
    [count] = processor.count_vision_tokens([(shown.height, shown.width)], **options)
    assert (got["input_ids"] == processor.image_token_id).sum() == count


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_is_what_the_model_sees(kind):
    content, pixels = KINDS[kind]
    assert draw_grid(opened(content), (1, 1)).tobytes() == draw_grid(Image.fromarray(pixels), (1, 1)).tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_the_callers_image_is_left_as_it_is(kind):
    image, untouched = opened(KINDS[kind][0]), opened(KINDS[kind][0])
    draw_grid(image, (2, 2))
    assert (image.mode, image.size, image.tobytes()) == (untouched.mode, untouched.size, untouched.tobytes())


def test_a_plain_image_is_not_copied(narrow, monkeypatch):
    processor, seen = narrow[1], []
    preprocess = type(processor.image_processor).preprocess

    def watch(self, images, **options):
        seen.extend(images)
        return preprocess(self, images, **options)

    monkeypatch.setattr(type(processor.image_processor), "preprocess", watch)
    plain = Image.fromarray(PIXELS)
    for image in (plain, PIXELS, torch.from_numpy(PIXELS.copy())):
        processor(images=image, text=TEXT)
        assert seen.pop() is image
    assert decode_image(plain) is read_image(plain) is plain
