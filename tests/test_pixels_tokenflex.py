import io
import tarfile

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPImageProcessorPil, GotOcr2ImageProcessorPil, SiglipImageProcessorPil

from tokenflex.pixels_tokenflex import is_tabulable, tabulate_pixels


@pytest.fixture(autouse=True)
def four_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(threads)


MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr")


def draw_image(mode: str, width: int, height: int, seed: int = 0) -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    image = PIL.Image.fromarray(pixels, mode="RGBA")
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


@settings(deadline=None, max_examples=40)
@given(
    shapes=st.lists(st.tuples(st.sampled_from(MODES), st.integers(4, 90), st.integers(4, 90)), min_size=1, max_size=4),
    size=st.tuples(st.integers(8, 40), st.integers(8, 40)),
    mean=st.floats(0, 1),
    std=st.floats(0.1, 1),
    resample=st.sampled_from([PIL.Image.Resampling.BILINEAR, PIL.Image.Resampling.BICUBIC]),
    steps=st.tuples(st.booleans(), st.booleans()),
)
def test_pixel_values_are_those_of_the_image_processor(shapes, size, mean, std, resample, steps):
    images = [draw_image(*shape, seed) for seed, shape in enumerate(shapes)]
    do_rescale, do_normalize = steps
    stock = SiglipImageProcessorPil(
        size={"height": size[0], "width": size[1]},
        image_mean=[mean, 0.5, 0.25],
        image_std=[std, 0.5, 1.0],
        resample=resample,
        do_rescale=do_rescale,
        do_normalize=do_normalize,
    )
    assert is_tabulable(stock, images, {})
    expected = np.stack(stock(images)["pixel_values"])
    values = tabulate_pixels(stock, images, [1] * len(images))
    assert values.dtype == expected.dtype
    np.testing.assert_array_equal(values, expected)


@settings(deadline=None, max_examples=20)
@given(
    shapes=st.lists(st.tuples(st.sampled_from(("RGB", "RGBA", "L")), st.integers(5, 200), st.integers(5, 200))),
    crop=st.lists(st.booleans(), min_size=4, max_size=4),
    max_patches=st.integers(1, 6),
)
def test_tiles_are_those_of_the_tiler(shapes, crop, max_patches):
    images = [draw_image(*shape, seed) for seed, shape in enumerate(shapes[:4] or [("RGB", 64, 32)])]
    tiler = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32})
    outputs = [
        tiler([image], crop_to_patches=cut, min_patches=1, max_patches=max_patches) for image, cut in zip(images, crop)
    ]
    expected = np.concatenate([output["pixel_values"] for output in outputs])
    num_tiles = [len(output["pixel_values"]) for output in outputs]
    values = tabulate_pixels(tiler, images, num_tiles, tiler, 1, max_patches)
    np.testing.assert_array_equal(values, expected)


def test_the_processor_gives_the_stock_pixel_values(tiny):
    _, processor = tiny
    images = [draw_image(mode, 50 + 10 * i, 70, i) for i, mode in enumerate(MODES)]
    expected = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    text = [processor.image_token] * len(images)
    assert torch.equal(processor(images=images, text=text, return_tensors="pt")["pixel_values"], expected)
    untyped = processor(images=images, text=text)["pixel_values"]
    assert isinstance(untyped, list)
    np.testing.assert_array_equal(np.stack(untyped), expected.numpy())


def test_a_colour_is_normalised_once_however_many_pixels_have_it(tiny, monkeypatch):
    _, processor = tiny
    kind = type(processor.image_processor)
    normalised = []
    stock = kind.normalize

    def count(self, image, *args, **kwargs):
        normalised.append(image.size)
        return stock(self, image, *args, **kwargs)

    image_processor = type(processor.image_processor)(**processor.image_processor.to_dict())
    images = [draw_image("RGB", 64, 64, seed) for seed in range(8)]
    expected = np.stack(image_processor(images)["pixel_values"])
    monkeypatch.setattr(kind.__mro__[1], "normalize", count)
    monkeypatch.setattr(kind, "normalize", count, raising=False)
    values = tabulate_pixels(image_processor, images, [1] * 8)
    np.testing.assert_array_equal(values, expected)
    assert normalised == [3 * 256]


def test_images_that_share_a_file_are_not_read_at_once(tmp_path, tiny):
    _, processor = tiny
    path, drawn = tmp_path / "images.tar", [draw_image("RGB", 300, 200, seed) for seed in range(8)]
    with tarfile.open(path, "w") as archive:
        for number, image in enumerate(drawn):
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            member = tarfile.TarInfo(f"{number}.png")
            member.size = buffer.tell()
            buffer.seek(0)
            archive.addfile(member, buffer)
    expected = np.stack(processor.image_processor(drawn)["pixel_values"])
    for _ in range(3):
        with tarfile.open(path) as archive:
            images = [PIL.Image.open(archive.extractfile(member)) for member in archive.getmembers()]
            np.testing.assert_array_equal(tabulate_pixels(processor.image_processor, images, [1] * 8), expected)


def test_an_image_of_a_file_is_read_once_however_often_it_is_shown(tmp_path, tiny):
    _, processor = tiny
    path = tmp_path / "image.png"
    draw_image("RGB", 400, 300).save(path)
    expected = processor.image_processor([PIL.Image.open(path)])["pixel_values"][0]
    for _ in range(10):
        image = PIL.Image.open(path)
        values = tabulate_pixels(processor.image_processor, [image] * 8 + [PIL.Image.open(path)] * 2, [1] * 10)
        assert (values == expected).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_as_many_threads_as_torch_computes_with(tiny, monkeypatch, threads):
    _, processor = tiny
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    asked = []
    from tokenflex import pixels_tokenflex

    pool = pixels_tokenflex.ThreadPoolExecutor
    monkeypatch.setattr(pixels_tokenflex, "ThreadPoolExecutor", lambda n: (asked.append(n), pool(n))[1])
    processor(images=[draw_image("RGB", 20, 20, i) for i in range(5)], text=[processor.image_token] * 5)
    assert asked == ([threads] if threads > 1 else [])


def test_a_size_may_be_a_plain_dictionary():
    tiler = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32})
    images = [draw_image("RGB", 100, 40)]
    expected = tiler(images, crop_to_patches=True, max_patches=4)["pixel_values"]
    tiler.size = {"height": 32, "width": 32}
    assert is_tabulable(tiler, images, {})
    values = tabulate_pixels(tiler, images, [len(expected)], tiler, 1, 4)
    np.testing.assert_array_equal(values, np.stack(expected))


def test_what_the_table_does_not_cover_goes_to_the_image_processor(tiny):
    _, processor = tiny
    stock, image = processor.image_processor, draw_image("RGB", 20, 20)
    assert is_tabulable(stock, [image], {"do_resize": None})
    assert not is_tabulable(stock, [np.asarray(image)], {})
    assert not is_tabulable(stock, [image], {"do_normalize": False})
    assert not is_tabulable(SiglipImageProcessorPil(do_convert_rgb=False), [image], {})
    assert not is_tabulable(CLIPImageProcessorPil(), [image], {})
    assert not is_tabulable(GotOcr2ImageProcessorPil(crop_to_patches=True), [image], {})
    for name in ("image_mean", "image_std", "rescale_factor", "resample"):
        lacking = SiglipImageProcessorPil()
        setattr(lacking, name, None)
        assert not is_tabulable(lacking, [image], {})
    for option in ({"do_pad": True}, {"do_resize": False}, {"size": {"shortest_edge": 32}}):
        assert not is_tabulable(SiglipImageProcessorPil(**option), [image], {})

    class Inverting(SiglipImageProcessorPil):
        def rescale(self, image, scale):
            return super().rescale(255 - image, scale)

    class Calling(SiglipImageProcessorPil):
        def __call__(self, images, **kwargs):
            return super().__call__([image.transpose(0) for image in images], **kwargs)

    assert not is_tabulable(Inverting(), [image], {})
    assert not is_tabulable(Calling(), [image], {})
    options = {"do_normalize": False, "text": [processor.image_token]}
    plain = processor(images=[image], **options)["pixel_values"][0]
    np.testing.assert_array_equal(plain, stock([image], do_normalize=False)["pixel_values"][0])


def test_an_image_that_cannot_be_read_says_so(tmp_path, tiny):
    _, processor = tiny
    path = tmp_path / "broken.jpg"
    draw_image("RGB", 300, 300).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    images = [draw_image("RGB", 20, 20), PIL.Image.open(path)]
    with pytest.raises(OSError, match="truncated"):
        processor(images=images, text=[processor.image_token] * 2)
