"""Images to pixel values: what the tower's image processor computes, to the last bit, in less time."""

import itertools
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import torch
from transformers import GotOcr2ImageProcessorPil
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import SizeDict


_STEPS = (
    "__call__",
    "preprocess",
    "fetch_images",
    "process_image",
    "convert_to_rgb",
    "resize",
    "rescale",
    "normalize",
    "_standardize_kwargs",
    "_validate_preprocess_kwargs",
    "_prepare_images_structure",
    "_prepare_image_like_inputs",
    "_preprocess_image_like_inputs",
)
_PREPROCESS = (PilBackend._preprocess, GotOcr2ImageProcessorPil._preprocess)


def is_tabulable(image_processor: BaseImageProcessor, images: Sequence, options: dict) -> bool:
    """
    Whether [`tabulate_pixels`] gives what the image processor would: PIL images and no steps but those of transformers'
    PIL backend, resizing to one size, rescaling and normalising.

    Args:
        image_processor ([`~transformers.BaseImageProcessor`]): The tower's image processor.
        images (sequence): The images.
        options (`dict`): What this call asks for beside them.
    """
    kind = type(image_processor)
    return (
        isinstance(image_processor, PilBackend)
        and kind._preprocess in _PREPROCESS
        and all(getattr(kind, step) is getattr(PilBackend, step) for step in _STEPS)
        and all(value is None for value in options.values())
        and dict(image_processor.size).keys() == {"height", "width"}
        and image_processor.do_resize
        and isinstance(image_processor.resample, int)
        and image_processor.do_convert_rgb
        and all(getattr(image_processor, name) is not None for name in ("rescale_factor", "image_mean", "image_std"))
        and not any(getattr(image_processor, name, None) for name in ("do_center_crop", "do_pad", "crop_to_patches"))
        and all(isinstance(image, PIL.Image.Image) for image in images)
    )


def tabulate_pixels(
    image_processor: PilBackend,
    images: Sequence[PIL.Image.Image],
    num_tiles: Sequence[int],
    tiler: GotOcr2ImageProcessorPil | None = None,
    min_patches: int = 1,
    max_patches: int = 1,
) -> np.ndarray:
    """
    Reads and resizes images on as many threads as torch computes with, and looks up what each of the 256 values of a
    colour becomes by rescaling and normalising, instead of computing it for every pixel.

    Args:
        image_processor ([`~transformers.image_processing_backends.PilBackend`]):
            The tower's image processor, for which [`is_tabulable`] holds.
        images (sequence of `PIL.Image.Image`):
            The images.
        num_tiles (sequence of `int`):
            How many tiles each image is cut into; 1 for one that is not.
        tiler ([`~transformers.GotOcr2ImageProcessorPil`], *optional*):
            What cuts images.
        min_patches, max_patches (`int`, *optional*, defaults to 1):
            The fewest and most tiles, for the tiler.

    Returns:
        `np.ndarray` of shape `(total_tiles, 3, height, width)`: Equal to the image processor's own `pixel_values`.
    """
    resample, size = image_processor.resample, SizeDict(**dict(image_processor.size))
    table = _tabulate(image_processor)
    ends = list(itertools.accumulate(num_tiles))
    values = np.empty((ends[-1], 3, size.height, size.width), dtype=table.dtype)

    def fill(index: int) -> None:
        image, tiles = images[index], num_tiles[index]
        if image.mode != "RGB" or image.info.get("transparency") is not None:
            image = PIL.Image.fromarray(image_processor.convert_to_rgb(image))
        if tiles == 1:
            pieces = [_channels_first(image.resize((size.width, size.height), resample=resample))]
        else:
            limits = {"min_patches": min_patches, "max_patches": max_patches}
            pieces = tiler.crop_image_to_patches(_channels_first(image), **limits, patch_size=size, resample=resample)
        for place, piece in enumerate(pieces, ends[index] - tiles):
            for channel in range(3):
                np.take(table[channel], piece[channel], out=values[place, channel], mode="clip")

    num_threads = min(len(images), torch.get_num_threads())
    if num_threads == 1:
        for index in range(len(images)):
            fill(index)
        return values
    # Images may share a file unless it was opened for one of them, and one image may stand in several places.
    for image in images:
        if not getattr(image, "filename", None):
            image.load()
    with ThreadPoolExecutor(num_threads) as threads:
        _finish(threads.map(lambda image: image.load(), {id(image): image for image in images}.values()))
        _finish(threads.map(fill, range(len(images))))
    return values


def _finish(results: Iterable) -> None:
    """Waits for results, and raises the first error."""
    for _ in results:
        pass


def _channels_first(image: PIL.Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


def _tabulate(image_processor: PilBackend) -> np.ndarray:
    """What the image processor makes of each 8-bit value of each colour, of shape `(3, 256)`."""
    values = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    if image_processor.do_rescale:
        values = image_processor.rescale(values, image_processor.rescale_factor)
    if image_processor.do_normalize:
        values = image_processor.normalize(values, image_processor.image_mean, image_processor.image_std)
    return np.ascontiguousarray(values[:, 0])


__all__ = ["is_tabulable", "tabulate_pixels"]
