"""Processor class for TokenFLEX."""

import difflib
import io
import os
import re
import reprlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Unpack
from urllib.request import urlopen

import numpy as np
import PIL.Image
import torch
import transformers
from PIL import ExifTags, ImageOps
from transformers import GotOcr2ImageProcessorPil
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import get_image_size, is_valid_image, make_flat_list_of_images, to_numpy_array
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin, TextKwargs

from .choices_tokenflex import resolve_patch_grid, resolve_vision_tokens, split_choice


IMAGE_TOKEN = "<|image_pad|>"
VISION_START_TOKEN, VISION_END_TOKEN = "<|vision_start|>", "<|vision_end|>"
_OPTIONS = ("num_vision_tokens", "match_aspect_ratio", "crop_to_patches", "min_patches", "max_patches", "image_size")
NO_VIDEOS = (
    "TokenFLEX takes the frames of videos as images: `tokenflex.data.videos.expand_videos` turns them into such."
)
# Turns the parts of a message into one string, so that any text-only template can follow.
CONTENT_TEMPLATE = """
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message.content is defined and message.content is not none and message.content is not string -%}
{%- set content = namespace(text='') -%}
{%- for part in message.content -%}
{%- if part.type == 'image' or part.image | default(none) is not none or part.image_url | default(none) is not none -%}
{%- set content.text = content.text + 'IMAGE' -%}
{%- elif part.type == 'video' or part.video | default(none) is not none -%}
{{ raise_exception('VIDEO') }}
{%- elif part.type == 'text' or part.text is defined -%}
{%- set content.text = content.text + (part.text or '') -%}
{%- else -%}
{{ raise_exception('A part of a message is a text with its `text`, or an image; this is ' ~ part) }}
{%- endif -%}
{%- endfor -%}
{%- set flat.messages = flat.messages + [dict(message, content=content.text)] -%}
{%- else -%}
{%- set flat.messages = flat.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages %}
""".strip()
CHATML_TEMPLATE = """
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
""".strip()


class TokenFlexImagesKwargs(ImagesKwargs, total=False):
    """
    num_vision_tokens (`int`, `tuple[int, int]`, `str` or a list of these, *optional*):
        A count n*n or grid (rows, columns) for all images, or a list with one per image in order of appearance, each
        also with a resolution (`"64@224"`). Defaults to the processor's `num_vision_tokens`.
    image_size (`int` or `tuple[int, int]`, *optional*):
        The resolution in pixels that the vision tower is to see all images at. Pixels keep their size; the model
        shrinks them.
    match_aspect_ratio, crop_to_patches, min_patches, max_patches (*optional*):
        As for [`TokenFlexProcessor`], and default to the processor's; `crop_to_patches` may be a list with one entry
        per image.
    """

    # Checked by `resolve_vision_tokens`, whose errors name the nearest counts that work.
    num_vision_tokens: Any
    image_size: int | list[int] | tuple[int, int] | None
    match_aspect_ratio: bool | None
    crop_to_patches: bool | list[bool] | None
    min_patches: int | None
    max_patches: int | None


class TokenFlexProcessorKwargs(ProcessingKwargs, total=False):
    # Read by transformers 5.18 to 5.20; later releases read the processor's `text_kwargs`.
    _defaults = {"text_kwargs": {"padding_side": "left"}}

    images_kwargs: TokenFlexImagesKwargs


class TokenFlexProcessor(ProcessorMixin):
    r"""
    Combines an image processor and a tokenizer; expands each image placeholder to the chosen number of vision tokens.

    Called with `images`, of all prompts in order of appearance or a list per prompt, `text`, with `<|image_pad|>` for
    each image, and options of [`TokenFlexImagesKwargs`], the image processor and the tokenizer, it returns a
    [`~transformers.BatchFeature`] of `input_ids`, `attention_mask`; `pixel_values` of shape `(num_tiles, num_channels,
    height, width)`, an uncut image being one tile, and `vision_token_grids` of shape `(num_tiles, 2)`; with
    `match_aspect_ratio` also `image_shapes` of shape `(num_tiles, 2)`, with `crop_to_patches` also `num_tiles` of each
    image, and where a resolution is asked for `image_resolutions` of shape `(num_tiles, 2)`.

    Args:
        image_processor ([`~transformers.BaseImageProcessor`]):
            The vision tower's image processor, which has to give images of the tower's size.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The language model's tokenizer, with the image token `<|image_pad|>` (or its own `image_token`).
        num_vision_tokens (`int`, `tuple[int, int]` or `str`, *optional*):
            The vision-token count per image (or tile) when none is asked for. Defaults to the largest that the patch
            grid allows, up to 256.
        patch_size (`int`, *optional*, defaults to 14):
            The size in pixels of the tower's patches, or of the blocks of patches that make one feature.
        chat_template (`str`, *optional*):
            A Jinja template. Defaults to the tokenizer's own, taught to take images where it does not, else to ChatML.
        match_aspect_ratio (`bool`, *optional*, defaults to `False`):
            Whether to take an integer count, then any from 1 to the number of patches, as the most tokens of a grid
            that follows the image's shape.
        crop_to_patches (`bool`, *optional*, defaults to `False`):
            Whether to cut images into tiles of the tower's size beside a thumbnail, each with that count, as GOT-OCR2
            and InternVL do.
        min_patches, max_patches (`int`, *optional*, default to 1 and 12):
            The fewest and most tiles of an image, thumbnail not counted.
        image_size (`list[int]`, *optional*):
            Height and width in pixels of the tower's images. Default to the image processor's `size`.
        max_num_patches (`int`, *optional*):
            The patches that a NaFlex tower sees an image as; with `match_aspect_ratio` it then sees it in its shape.
        image_token (`str`, *optional*):
            The token that stands for an image in prompts, and is repeated. Defaults to the tokenizer's.
        image_start, image_end (`str`, *optional*, default to `""`):
            Text that is put before and behind an image's tokens, beside what the chat template writes.
        add_special_tokens (`bool`, *optional*, defaults to `False`):
            Whether the tokenizer adds its special tokens to prompts that do not begin with them already. By default
            they are the chat template's to write.

    Raises:
        ValueError: If the tokenizer has no image token, placeholders do not match images, or a count is not allowed.

    Example:

    ```python
    >>> from PIL import Image
    >>> from tokenflex.towers.tiny import tiny_model_and_processor

    >>> _, processor = tiny_model_and_processor()
    >>> image, text = Image.new("RGB", (64, 64)), "<|image_pad|> which color is it?"
    >>> [processor(images=image, text=text, num_vision_tokens=n).vision_token_grids for n in (4, 36)]
    [[[2, 2]], [[6, 6]]]
    ```
    """

    valid_processor_kwargs = TokenFlexProcessorKwargs
    text_kwargs = TokenFlexProcessorKwargs._defaults["text_kwargs"]

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_vision_tokens=None,
        patch_size=14,
        chat_template=None,
        match_aspect_ratio=False,
        crop_to_patches=False,
        min_patches=1,
        max_patches=12,
        image_size=None,
        max_num_patches=None,
        image_token=None,
        image_start="",
        image_end="",
        add_special_tokens=False,
    ):
        # Options given to `AutoProcessor.from_pretrained` also reach the tokenizer, whose saved arguments would
        # override this processor's defaults from then on.
        for name in _OPTIONS:
            tokenizer.init_kwargs.pop(name, None)
        self.image_token = image_token or getattr(tokenizer, "image_token", None) or IMAGE_TOKEN
        self.image_start, self.image_end, self.add_special_tokens = image_start, image_end, add_special_tokens
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"`tokenizer` has no token {self.image_token!r}: add it with "
                f"`tokenizer.add_special_tokens({{'additional_special_tokens': ['{self.image_token}']}})`."
            )
        marks = tokenizer.convert_tokens_to_ids([VISION_START_TOKEN, VISION_END_TOKEN])
        has_marks = not {None, tokenizer.unk_token_id} & set(marks)
        self.image_placeholder = (
            f"{VISION_START_TOKEN}{self.image_token}{VISION_END_TOKEN}" if has_marks else self.image_token
        )
        if chat_template is None:
            own = tokenizer.chat_template
            own = own.get("default") if isinstance(own, dict) else own
            to_text = CONTENT_TEMPLATE.replace("IMAGE", self.image_placeholder).replace("VIDEO", NO_VIDEOS)
            begins = "{{ bos_token }}" if tokenizer.bos_token_id in tokenizer("")["input_ids"] else ""
            chat_template = own if own and self.image_token in own else to_text + (own or begins + CHATML_TEMPLATE)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        tokenizer.padding_side = "left"
        self.auto_map = {"AutoProcessor": "processing_tokenflex.TokenFlexProcessor"}  # as saving would set it
        size = image_processor.size
        if isinstance(image_size, int):
            raise ValueError(
                f"`image_size`={image_size}: a processor's is [height, width] of the vision tower's own images. "
                f"Smaller ones are asked for with each call, or by default with `num_vision_tokens`='64@{image_size}'."
            )
        self.image_size = [size["height"], size["width"]] if image_size is None else image_size
        self.patch_size, self.max_num_patches = patch_size, max_num_patches
        if num_vision_tokens is None:
            num_vision_tokens = min(16, *self.patch_grid) ** 2
        # JSON has no tuples: a saved (rows, columns) comes back as a list.
        self.num_vision_tokens = tuple(num_vision_tokens) if isinstance(num_vision_tokens, list) else num_vision_tokens
        self.match_aspect_ratio = match_aspect_ratio
        self.crop_to_patches = crop_to_patches
        self.min_patches = min_patches
        self.max_patches = max_patches
        self._arrange([(1, 1)])

    @property
    def block_size(self) -> tuple[int, int]:
        """`tuple[int, int]`: Height and width in pixels of what makes one feature."""
        return self.patch_size, self.patch_size

    @property
    def patch_grid(self) -> tuple[int, int]:
        """`tuple[int, int]`: Rows and columns of the features that are pooled to vision tokens."""
        return self.patch_grid_at(tuple(self.image_size))

    def patch_grid_at(self, resolution: tuple[int, int], asked: str | None = None) -> tuple[int, int]:
        """
        The patch grid of an image that the model shrinks to a resolution.

        Args:
            resolution (`tuple[int, int]`): (height, width) in pixels.
            asked (`str`, *optional*): The argument and its value, for errors. Defaults to `image_size`.

        Raises:
            ValueError: If a side is no multiple of the patch, or larger than the tower's own.
        """
        return resolve_patch_grid(resolution, tuple(self.image_size), self.block_size, asked)

    @property
    def tiler(self) -> GotOcr2ImageProcessorPil:
        """GOT-OCR2's image processor with this image processor's size and statistics, which cuts images into tiles."""
        own = self.image_processor
        kind = GotOcr2ImageProcessorPil if type(own).__name__.endswith("Pil") else transformers.GotOcr2ImageProcessor
        names = ("resample", "image_mean", "image_std", "do_rescale", "rescale_factor", "do_normalize")
        size = dict(zip(("height", "width"), self.image_size))
        return kind(size=size, **{name: getattr(own, name) for name in names})

    @property
    def model_input_names(self):
        # The Trainer's length sampling and batch-size search take the first name.
        names = [*self.tokenizer.model_input_names, "pixel_values", "vision_token_grids"]
        names += ["image_shapes"] if self.match_aspect_ratio else []
        names += ["num_tiles"] if self.crop_to_patches else []
        in_shapes = self.match_aspect_ratio and self.max_num_patches is not None
        names += ["image_resolutions"] if in_shapes or isinstance(self.num_vision_tokens, str) else []
        return list(dict.fromkeys(names))

    def count_vision_tokens(
        self,
        image_sizes: Sequence[tuple[int, int]],
        num_vision_tokens: int | tuple[int, int] | list | None = None,
        match_aspect_ratio: bool | None = None,
        crop_to_patches: bool | list[bool] | None = None,
        min_patches: int | None = None,
        max_patches: int | None = None,
        image_size: int | tuple[int, int] | None = None,
    ) -> list[int]:
        """
        Counts the vision tokens that images will cost, from their sizes alone: nothing is read, resized or tokenized.

        Args:
            image_sizes (sequence of `tuple[int, int]`): (height, width) of each image in pixels.
            num_vision_tokens, match_aspect_ratio, crop_to_patches, min_patches, max_patches, image_size (*optional*):
                As when processing images.

        Returns:
            `list[int]`: The number of tokens of each image, all its tiles included.

        Raises:
            ValueError: If a count is not allowed, as when processing images.

        Example:

        ```python
        >>> from tokenflex.towers.tiny import tiny_model_and_processor

        >>> _, processor = tiny_model_and_processor()
        >>> processor.count_vision_tokens([(480, 640), (1024, 64)], num_vision_tokens=16)
        [16, 16]
        >>> processor.count_vision_tokens([(480, 640), (1024, 64)], num_vision_tokens=16, crop_to_patches=True)
        [208, 208]
        ```
        """
        options = (num_vision_tokens, match_aspect_ratio, crop_to_patches, min_patches, max_patches, image_size)
        return self._arrange(image_sizes, *options)[-1]

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """vLLM's question: the tokens in each image's place, and the rows of `pixel_values` per image."""
        options = {**kwargs.get("images_kwargs", {}), **kwargs}
        num_tiles, *_, num_tokens = self._arrange(image_sizes or (), *map(options.get, _OPTIONS))
        around = len(self.tokenizer(self.image_start + self.image_end, add_special_tokens=False)["input_ids"])
        return MultiModalData(num_image_tokens=[n + around for n in num_tokens], num_image_patches=num_tiles)

    def _arrange(
        self,
        image_sizes: Sequence[tuple[int, int]],
        num_vision_tokens=None,
        match_aspect_ratio: bool | None = None,
        crop_to_patches: bool | list[bool] | None = None,
        min_patches: int | None = None,
        max_patches: int | None = None,
        image_size: int | tuple[int, int] | None = None,
    ) -> tuple[list[int], dict[str, list], list[int]]:
        """
        Returns:
            `tuple`: The number of tiles of each image; of each tile its `vision_token_grids`, where they are asked for
            `image_resolutions`, and with `match_aspect_ratio` the `image_shapes` in pixels that decide the shape of
            its grid; and the number of tokens of each image.
        """
        if num_vision_tokens is None:
            num_vision_tokens = self.num_vision_tokens
            if image_size is not None:
                num_vision_tokens, _ = split_choice(num_vision_tokens)
        if match_aspect_ratio is None:
            match_aspect_ratio = self.match_aspect_ratio
        crops = self._crops(crop_to_patches, len(image_sizes))
        limits = self._limits(min_patches, max_patches)
        num_tiles = [1] * len(image_sizes)
        if any(crops):
            count_tiles = self.tiler.get_number_of_image_patches
            num_tiles = [count_tiles(*size, limits) if crop else 1 for size, crop in zip(image_sizes, crops)]
        # Tiles have the tower's shape, and the last one is the thumbnail, which shows the whole image.
        tile = tuple(self.image_size)
        sizes = [shown for size, tiles in zip(image_sizes, num_tiles) for shown in [tile] * (tiles - 1) + [size]]
        sizes = sizes if match_aspect_ratio else None
        cut = num_tiles if any(crops) else None
        grids, resolutions = resolve_vision_tokens(
            num_vision_tokens, sum(num_tiles), self, image_size=image_size, image_shapes=sizes, num_tiles=cut
        )
        of_tiles = {"vision_token_grids": [list(grid) for grid in grids]}
        if sizes is not None:
            of_tiles["image_shapes"] = [list(size) for size in sizes]
        if any(resolutions):
            of_tiles["image_resolutions"] = [list(size or (0, 0)) for size in resolutions]
        tokens = iter(rows * columns for rows, columns in grids)
        return num_tiles, of_tiles, [sum(next(tokens) for _ in range(tiles)) for tiles in num_tiles]

    def _crops(self, crop_to_patches: bool | list[bool] | None, num_images: int) -> list[bool]:
        asked = self.crop_to_patches if crop_to_patches is None else crop_to_patches
        crops = asked if isinstance(asked, list) else [asked] * num_images
        if len(crops) != num_images:
            raise ValueError(f"`crop_to_patches` has {len(crops)} entries for {num_images} images: give one for each.")
        return crops

    def _limits(self, min_patches: int | None = None, max_patches: int | None = None, **_) -> dict[str, int | bool]:
        fewest = self.min_patches if min_patches is None else min_patches
        most = self.max_patches if max_patches is None else max_patches
        if not 1 <= fewest <= most:
            raise ValueError(f"`min_patches`={fewest} and `max_patches`={most}: give 1 <= min_patches <= max_patches.")
        return {"crop_to_patches": True, "min_patches": fewest, "max_patches": most}

    def __call__(self, images=None, text=None, **kwargs: Unpack[ProcessingKwargs]):
        if text is not None and "add_special_tokens" not in kwargs.get("text_kwargs", {}):
            kwargs.setdefault("add_special_tokens", self.adds_special_tokens_to(text))
        return super().__call__(images, text, **kwargs)

    def adds_special_tokens_to(self, text: str | list[str]) -> bool:
        """Tells whether the tokenizer adds its special tokens to a `text`, which may begin with them already."""
        first = text[0] if isinstance(text, (list, tuple)) and text else text
        begins_with = self.tokenizer.bos_token
        return self.add_special_tokens and not (begins_with and str(first).startswith(begins_with))

    def apply_chat_template(self, conversation, *args, **kwargs):
        """As in transformers; what tables fill in for a part's absent keys, `None`, is absent here too."""
        return super().apply_chat_template(_without_none(conversation), *args, **kwargs)

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        texts = [text] if text is None or isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not all(isinstance(sample, str | None) for sample in texts):
            raise ValueError(f"`text`={reprlib.repr(text)}: give a string or a list of strings, behind the images.")
        if images is not None:
            own = {"do_rescale": self.image_processor.do_rescale}
            images = _read_images(images, {**own, **kwargs.get("images_kwargs", {}), **kwargs}["do_rescale"])
        if isinstance(images, list) and all(isinstance(group, list) and not group for group in images):
            images = None
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if videos is not None and len(videos):
            raise ValueError(f"`videos` is given: {NO_VIDEOS}")
        known = set().union(*(kind.__annotations__ for kind in (TokenFlexImagesKwargs, TextKwargs, ProcessingKwargs)))
        for name in kwargs:
            meant = difflib.get_close_matches(name, _OPTIONS, n=1, cutoff=0.7) if name not in known else None
            if meant:
                raise ValueError(f"Unknown argument `{name}`={kwargs[name]!r}: did you mean `{meant[0]}`?")
        options = {**kwargs.get("images_kwargs", {}), **kwargs}
        is_listed = isinstance(options.get("num_vision_tokens"), list)
        options = {name: options[name] for name in _OPTIONS if not isinstance(options.get(name), list | None)}
        if is_listed:  # what goes with each of its entries is checked where there are images
            options.pop("image_size", None)
        self._arrange([(1, 1)], **options)
        found = [sample.count(self.image_token) for sample in text or ()]
        if images is None and any(found):
            raise ValueError(f"`text` has {found} image placeholders ({self.image_token}), but no images were passed.")
        if images is not None and text is not None:
            is_nested = isinstance(images, list) and isinstance(images[0], list)
            given = [len(group) for group in images] if is_nested else found
            num_images = len(make_flat_list_of_images(images))
            if sum(found) != num_images or given != found:
                raise ValueError(
                    f"The total number of {self.image_token} tokens in the prompts should be the same as the number "
                    f"of images passed: `text` has {found} per prompt, `images` holds "
                    f"{given if is_nested else num_images}."
                )
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def _process_images(self, images, **kwargs):
        images = make_flat_list_of_images(images)
        options = {name: kwargs.pop(name, None) for name in _OPTIONS}
        crops = self._crops(options["crop_to_patches"], len(images))
        sizes = [image.size[::-1] if isinstance(image, PIL.Image.Image) else get_image_size(image) for image in images]
        num_tiles, of_tiles, num_tokens = self._arrange(sizes, **options)
        return_tensors = kwargs.pop("return_tensors", None)
        tiles = self._read_tiles(images, crops, self._limits(**options), kwargs)
        processed_images = BatchFeature({"pixel_values": tiles}, tensor_type=return_tensors)
        if any(crops):
            processed_images["num_tiles"] = num_tiles
        processed_images |= of_tiles
        return processed_images, [self.image_start + self.image_token * n + self.image_end for n in num_tokens]

    def _read_tiles(self, images: list, crops: list[bool], limits: dict, options: dict) -> list:
        """Runs the image processor on each image, on as many threads as torch computes with."""
        tiler = self.tiler if any(crops) else None

        def read(image, crop: bool) -> list:
            if crop:
                return list(tiler([image], **limits, **options)["pixel_values"])
            views = self.image_processor([image], **options)["pixel_values"]
            return [tile for view in views for tile in (view if view.ndim == 4 else [view])]

        num_threads = min(len(images), torch.get_num_threads())
        if num_threads < 2:
            return [tile for image, crop in zip(images, crops) for tile in read(image, crop)]
        with ThreadPoolExecutor(num_threads) as threads:
            return [tile for tiles in threads.map(read, images, crops) for tile in tiles]


def read_image(source) -> PIL.Image.Image:
    """
    Makes the image that the model sees: upright, RGB of 8 bits, on white. One that is so already is returned itself.

    Args:
        source (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, `str`, `Path`, `bytes` or `dict`):
            An image, its pixels, file, URL, base64 or bytes, or the `{"bytes", "path"}` of `datasets`.

    Raises:
        ValueError: If it cannot be decoded, has no pixels, or its values are not of 8 or 16 bits.
    """
    if isinstance(source, (np.ndarray, torch.Tensor)):
        image = _from_array(to_numpy_array(source))
    else:
        try:
            image = _load(source)
        except Exception as error:  # decoders raise whatever they like on damaged files
            raise ValueError(f"the image cannot be decoded ({type(error).__name__}: {error})") from None
    if 0 in image.size:
        raise ValueError(f"the image has no pixels ({image.width} x {image.height})")
    if image.mode[0] in "IF":
        pixels, hidden = np.asarray(image), image.info.get("transparency")
        image = _from_array(pixels)
        image.paste(255, mask=PIL.Image.fromarray(pixels == hidden))
    if image.has_transparency_data:
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _load(source) -> PIL.Image.Image:
    if isinstance(source, PIL.Image.Image):
        source.load()
        is_upright = source.getexif().get(ExifTags.Base.Orientation, 1) == 1
        return source if is_upright else ImageOps.exif_transpose(source)
    if isinstance(source, dict):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    is_address = isinstance(source, str) and source.startswith(("http://", "https://", "data:"))
    if is_address or (isinstance(source, str) and not os.path.exists(source) and re.fullmatch(r"[\w+/=\s]+", source)):
        with urlopen(source if is_address else f"data:;base64,{source}", timeout=60) as response:
            source = response.read()
    with PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        return _load(image)


def _from_array(pixels: np.ndarray) -> PIL.Image.Image:
    """Takes truth as 0 and 255, floats as 8 bits, integers as 8 bits or, beyond 255, the upper 8 of 16."""
    is_first = pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4)
    is_last = pixels.ndim == 3 and pixels.shape[2] in (1, 2, 3, 4)
    if pixels.ndim != 2 and is_first == is_last:
        raise ValueError(f"the image has shape {pixels.shape}: make a PIL image of it, whose channels are certain")
    pixels = pixels.transpose(1, 2, 0) if is_first else pixels
    pixels = pixels[..., 0] if pixels.shape[2:] == (1,) else pixels
    pixels = pixels * np.uint8(255) if pixels.dtype == bool else pixels
    low, high, is_float = pixels.min(initial=0), pixels.max(initial=0), pixels.dtype.kind == "f"
    if not 0 <= low <= high <= (255 if is_float else 65535) or (is_float and 0 < high <= 1):
        raise ValueError(
            f"the image holds {pixels.dtype} values from {low} to {high}: give `uint8` values from 0 to 255, or an "
            "RGB array of floats from 0 to 1 with `do_rescale=False`"
        )
    is_deep = high > 255 or pixels.dtype in ("<u2", ">u2")
    return PIL.Image.fromarray((pixels >> 8 if is_deep else pixels.round()).astype(np.uint8))


def _without_none(item):
    """The conversations, conversation or message without the keys of their parts that are `None`."""
    if isinstance(item, (list, tuple)):
        return [_without_none(member) for member in item]
    parts = item.get("content") if isinstance(item, dict) else None
    if not isinstance(parts, (list, tuple)):
        return item
    said = [{k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else part for part in parts]
    return {**item, "content": said}


def _read_images(images, rescales: bool, name: str = "images"):
    """Reads images, however nested; arrays stay as they are where they are RGB of 8 bits, or not to be rescaled."""
    is_array = isinstance(images, (np.ndarray, torch.Tensor))
    if isinstance(images, (list, tuple)) or (is_array and images.ndim == 4):
        return [_read_images(image, rescales, f"{name}[{i}]") for i, image in enumerate(images)]
    if is_array and images.ndim == 3 and 0 not in images.shape:
        channels = [side for side in (images.shape[0], images.shape[2]) if side in (1, 3, 4)]
        if channels == [3] and images.dtype in (np.uint8, torch.uint8) or channels in ([1], [3]) and not rescales:
            return images
    try:
        return read_image(images)
    except (TypeError, ValueError) as error:
        ways = "" if is_valid_image(images) else ": give a PIL image, array, file, URL or bytes; prompts are `text`"
        raise ValueError(f"`{name}`={reprlib.repr(images)}: {error}{ways}.") from None


TokenFlexProcessor.register_for_auto_class()
