"""Images to pixel values: what the tower's image processor computes, to the last bit, in less time."""

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import torch
from transformers import GotOcr2ImageProcessorPil
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BaseImageProcessor


_STEPS = ("preprocess", "process_image", "convert_to_rgb", "resize", "rescale", "normalize")
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
        and image_processor.resample is not None
        and image_processor.do_convert_rgb
        and not getattr(image_processor, "do_center_crop", None)
        and not getattr(image_processor, "do_pad", None)
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
    Resizes images on as many threads as torch computes with, and looks up what each of the 256 values of a colour becomes
    by rescaling and normalising, instead of computing it for every pixel.

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
    resample = image_processor.resample
    height, width = image_processor.size["height"], image_processor.size["width"]
    table = _tabulate(image_processor)
    ends = list(itertools.accumulate(num_tiles))
    values = np.empty((ends[-1], 3, height, width), dtype=table.dtype)
    # A lazily read image must not be read by two threads at once.
    places: dict[int, list[int]] = {}
    for index, image in enumerate(images):
        places.setdefault(id(image), []).append(index)

    def fill(indices: list[int]) -> None:
        image = images[indices[0]]
        if image.mode != "RGB" or image.info.get("transparency") is not None:
            image = PIL.Image.fromarray(image_processor.convert_to_rgb(image))
        for tiles in {num_tiles[index] for index in indices}:
            first, *others = (ends[index] - tiles for index in indices if num_tiles[index] == tiles)
            if tiles == 1:
                resized = image.resize((width, height), resample=resample)
                pieces = [np.asarray(resized).transpose(2, 0, 1)]
            else:
                pixels = np.asarray(image).transpose(2, 0, 1)
                pieces = tiler.crop_image_to_patches(
                    pixels, min_patches, max_patches, patch_size=tiler.size, resample=resample
                )
            for place, piece in enumerate(pieces, first):
                for channel in range(3):
                    np.take(table[channel], piece[channel], out=values[place, channel], mode="clip")
            for other in others:
                values[other : other + tiles] = values[first : first + tiles]

    num_threads = min(len(places), torch.get_num_threads())
    if num_threads == 1:
        for indices in places.values():
            fill(indices)
        return values
    with ThreadPoolExecutor(num_threads) as threads:
        for _ in threads.map(fill, places.values()):
            pass
    return values


def _tabulate(image_processor: PilBackend) -> np.ndarray:
    """What the image processor makes of each 8-bit value of each colour, of shape `(3, 256)`."""
    values = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    if image_processor.do_rescale:
        values = image_processor.rescale(values, image_processor.rescale_factor)
    if image_processor.do_normalize:
        values = image_processor.normalize(values, image_processor.image_mean, image_processor.image_std)
    return np.ascontiguousarray(values[:, 0])


__all__ = ["is_tabulable", "tabulate_pixels"]
