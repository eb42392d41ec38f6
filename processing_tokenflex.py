"""Processor class for TokenFLEX."""

import difflib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers import GotOcr2ImageProcessorPil
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput, get_image_size, make_flat_list_of_images
from transformers.processing_utils import (
    ImagesKwargs,
    MultiModalData,
    ProcessingKwargs,
    ProcessorMixin,
    TextKwargs,
)

from .configuration_tokenflex import resolve_vision_token_grids


IMAGE_TOKEN = "<|image_pad|>"
VISION_START_TOKEN, VISION_END_TOKEN = "<|vision_start|>", "<|vision_end|>"
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
{%- elif part.text -%}
{%- set content.text = content.text + part.text -%}
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
    num_vision_tokens (`int`, `tuple[int, int]` or a list of these, *optional*):
        A count n*n or grid (rows, columns) for all images, or a list with one per image in order of appearance.
        Defaults to the processor's `num_vision_tokens`.
    match_aspect_ratio (`bool`, *optional*):
        Whether to take an integer count, then any from 1 to the number of patches, as the most tokens of a grid that
        follows the image's shape. Defaults to the processor's.
    crop_to_patches (`bool` or `list[bool]`, *optional*):
        Whether to cut images into tiles of the tower's size beside a thumbnail, each with that count; a list has one
        entry per image. Defaults to the processor's.
    min_patches, max_patches (`int`, *optional*):
        The fewest and most tiles of an image, thumbnail not counted. Default to the processor's.
    """

    # Checked by `resolve_vision_token_grids`, whose errors name the nearest counts that work.
    num_vision_tokens: Any
    match_aspect_ratio: bool | None
    crop_to_patches: bool | list[bool] | None
    min_patches: int | None
    max_patches: int | None


class TokenFlexProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {}  # read by transformers 5.18 to 5.20

    images_kwargs: TokenFlexImagesKwargs


class TokenFlexProcessor(ProcessorMixin):
    r"""
    Combines an image processor and a tokenizer; expands each image placeholder to the chosen number of vision tokens.

    Called with `images`, of all prompts in order of appearance or a list per prompt, `text`, with `<|image_pad|>` for
    each image, and options of [`TokenFlexImagesKwargs`], the image processor and the tokenizer, it returns a
    [`~transformers.BatchFeature`] of `input_ids`, `attention_mask`; `pixel_values` of shape `(num_tiles, num_channels,
    height, width)`, an uncut image being one tile, and `vision_token_grids` of shape `(num_tiles, 2)`; with
    `match_aspect_ratio` also `image_sizes` of shape `(num_tiles, 2)`; with `crop_to_patches` also `num_tiles`, one per
    image.

    Args:
        image_processor ([`~transformers.BaseImageProcessor`]):
            The vision tower's image processor. Its `size` must be the tower's image size.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The language model's tokenizer, with the image token `<|image_pad|>` (or its own `image_token`).
        num_vision_tokens (`int` or `tuple[int, int]`, *optional*):
            The vision-token count per image (or tile) when none is asked for. Defaults to the largest that the patch
            grid allows, up to 256.
        patch_size (`int`, *optional*, defaults to 14):
            The tower's patch size in pixels.
        chat_template (`str`, *optional*):
            A Jinja template. Defaults to the tokenizer's own, taught to take images where it does not, else to ChatML.
        match_aspect_ratio (`bool`, *optional*, defaults to `False`):
            Whether to make grids follow the images' shapes, with at most the given count.
        crop_to_patches (`bool`, *optional*, defaults to `False`):
            Whether to cut images into tiles, as GOT-OCR2 and InternVL do.
        min_patches (`int`, *optional*, defaults to 1):
            The fewest tiles.
        max_patches (`int`, *optional*, defaults to 12):
            The most tiles.

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
    text_kwargs = {"padding_side": "left"}

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
    ):
        # Options given to `AutoProcessor.from_pretrained` also reach the tokenizer, whose saved arguments would
        # override this processor's defaults from then on.
        for name in _OPTIONS:
            tokenizer.init_kwargs.pop(name, None)
        self.image_token = getattr(tokenizer, "image_token", None) or IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"`tokenizer` has no token {self.image_token!r}: add it with "
                f"`tokenizer.add_special_tokens({{'additional_special_tokens': ['{self.image_token}']}})`."
            )
        has_marks = not {None, tokenizer.unk_token_id} & {
            tokenizer.convert_tokens_to_ids(token) for token in (VISION_START_TOKEN, VISION_END_TOKEN)
        }
        self.image_placeholder = (
            f"{VISION_START_TOKEN}{self.image_token}{VISION_END_TOKEN}" if has_marks else self.image_token
        )
        if chat_template is None:
            own = tokenizer.chat_template
            own = own.get("default") if isinstance(own, dict) else own
            to_text = CONTENT_TEMPLATE.replace("IMAGE", self.image_placeholder).replace("VIDEO", NO_VIDEOS)
            chat_template = own if own and self.image_token in own else to_text + (own or CHATML_TEMPLATE)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        tokenizer.padding_side = "left"
        self.auto_map = {"AutoProcessor": "processing_tokenflex.TokenFlexProcessor"}  # as saving would set it
        self.patch_size = patch_size
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
    def patch_grid(self) -> tuple[int, int]:
        """`tuple[int, int]`: Rows and columns of the vision tower's patch grid."""
        size = self.image_processor.size
        return size["height"] // self.patch_size, size["width"] // self.patch_size

    @property
    def tiler(self) -> GotOcr2ImageProcessorPil:
        """GOT-OCR2's image processor with this image processor's size and statistics, which cuts images into tiles."""
        own = self.image_processor
        if type(own).__name__.startswith("GotOcr2"):
            return own
        if type(own).__name__.endswith("Pil"):
            kind = GotOcr2ImageProcessorPil
        else:
            from transformers import GotOcr2ImageProcessor as kind
        names = ("size", "resample", "image_mean", "image_std", "do_rescale", "rescale_factor", "do_normalize")
        return kind(**{name: getattr(own, name) for name in names})

    @property
    def model_input_names(self):
        # The Trainer's length sampling and batch-size search take the first name.
        names = self.tokenizer.model_input_names + self.image_processor.model_input_names
        names += ["vision_token_grids"]
        names += ["image_sizes"] if self.match_aspect_ratio else []
        names += ["num_tiles"] if self.crop_to_patches else []
        return list(dict.fromkeys(names))

    def count_vision_tokens(
        self,
        image_sizes: Sequence[tuple[int, int]],
        num_vision_tokens: int | tuple[int, int] | list | None = None,
        match_aspect_ratio: bool | None = None,
        crop_to_patches: bool | list[bool] | None = None,
        min_patches: int | None = None,
        max_patches: int | None = None,
    ) -> list[int]:
        """
        Counts the vision tokens that images will cost, from their sizes alone: nothing is read, resized or tokenized.

        Args:
            image_sizes (sequence of `tuple[int, int]`): (height, width) of each image in pixels.
            num_vision_tokens, match_aspect_ratio, crop_to_patches, min_patches, max_patches (*optional*):
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
        num_tiles, grids, _ = self._arrange(
            image_sizes, num_vision_tokens, match_aspect_ratio, crop_to_patches, min_patches, max_patches
        )
        tokens = iter(rows * columns for rows, columns in grids)
        return [sum(next(tokens) for _ in range(tiles)) for tiles in num_tiles]

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """vLLM's question: [`~TokenFlexProcessor.count_vision_tokens`], and the rows of `pixel_values` per image."""
        if image_sizes is None:
            return MultiModalData()
        options = {**kwargs.get("images_kwargs", {}), **kwargs}
        options = {name: options[name] for name in _OPTIONS if name in options}
        num_tiles, _, _ = self._arrange(image_sizes, **options)
        return MultiModalData(
            num_image_tokens=self.count_vision_tokens(image_sizes, **options), num_image_patches=num_tiles
        )

    def _arrange(
        self,
        image_sizes: Sequence[tuple[int, int] | None],
        num_vision_tokens=None,
        match_aspect_ratio: bool | None = None,
        crop_to_patches: bool | list[bool] | None = None,
        min_patches: int | None = None,
        max_patches: int | None = None,
    ) -> tuple[list[int], list[tuple[int, int]], list[tuple[int, int]]]:
        """
        Returns:
            `tuple`: The number of tiles of each image; the grid of each tile; and the size in pixels that decides the
            shape of each tile's grid.
        """
        if num_vision_tokens is None:
            num_vision_tokens = self.num_vision_tokens
        if match_aspect_ratio is None:
            match_aspect_ratio = self.match_aspect_ratio
        crops = self._crops(crop_to_patches, len(image_sizes))
        limits = self._limits(min_patches, max_patches)
        num_tiles = [1] * len(image_sizes)
        if any(crops):
            count_tiles = self.tiler.get_number_of_image_patches
            limits["crop_to_patches"] = True
            num_tiles = [count_tiles(*size, limits) if crop else 1 for size, crop in zip(image_sizes, crops)]
        # Tiles have the tower's shape, and the last one is the thumbnail, which shows the whole image.
        tile_size = (self.image_processor.size["height"], self.image_processor.size["width"])
        sizes = [shown for size, tiles in zip(image_sizes, num_tiles) for shown in [tile_size] * (tiles - 1) + [size]]
        grids = resolve_vision_token_grids(
            num_vision_tokens,
            len(sizes),
            self.patch_grid,
            image_sizes=sizes if match_aspect_ratio else None,
            num_tiles=num_tiles if any(crops) else None,
        )
        return num_tiles, grids, sizes

    def _crops(self, crop_to_patches: bool | list[bool] | None, num_images: int) -> list[bool]:
        crop_to_patches = self.crop_to_patches if crop_to_patches is None else crop_to_patches
        if not isinstance(crop_to_patches, list):
            return [crop_to_patches] * num_images
        if len(crop_to_patches) != num_images:
            number = len(crop_to_patches)
            raise ValueError(f"`crop_to_patches` has {number} entries for {num_images} images: give one for each.")
        return crop_to_patches

    def _limits(self, min_patches: int | None = None, max_patches: int | None = None, **_) -> dict[str, int]:
        fewest = self.min_patches if min_patches is None else min_patches
        most = self.max_patches if max_patches is None else max_patches
        if not 1 <= fewest <= most:
            raise ValueError(f"`min_patches`={fewest} and `max_patches`={most}: give 1 <= min_patches <= max_patches.")
        return {"min_patches": fewest, "max_patches": most}

    def apply_chat_template(self, conversation, *args, **kwargs):
        """As in transformers; what tables fill in for a part's absent keys, `None`, is absent here too."""
        return super().apply_chat_template(_without_none(conversation), *args, **kwargs)

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        is_nested = isinstance(images, (list, tuple)) and all(isinstance(group, (list, tuple)) for group in images)
        if is_nested and not any(images):
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
        options = {name: options[name] for name in _OPTIONS if not isinstance(options.get(name), list | None)}
        self._arrange([(1, 1)], **options)
        found = [sample.count(self.image_token) for sample in text or () if isinstance(sample, str)]
        if images is None and any(found):
            raise ValueError(f"`text` has {found} image placeholders ({self.image_token}), but no images were passed.")
        if images is not None and text is not None:
            is_nested = isinstance(images, (list, tuple)) and isinstance(images[0], (list, tuple))
            given = [len(group) for group in images] if is_nested else found
            num_images = len(make_flat_list_of_images(images))
            if sum(found) != num_images or given != found:
                raise ValueError(
                    f"The total number of {self.image_token} tokens in the prompts should be the same as the number "
                    f"of images passed: `text` has {found} per prompt, `images` holds "
                    f"{given if is_nested else num_images}."
                )
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def _process_images(self, images: ImageInput, **kwargs):
        images = [_to_rgb(image) for image in make_flat_list_of_images(images)]
        options = {name: kwargs.pop(name, None) for name in _OPTIONS}
        crops = self._crops(options["crop_to_patches"], len(images))
        matched = options["match_aspect_ratio"]
        matched = self.match_aspect_ratio if matched is None else matched
        sizes = [_size(image) for image in images] if matched or any(crops) else [None] * len(images)
        num_tiles, grids, shown = self._arrange(sizes, **options)
        return_tensors = kwargs.pop("return_tensors", None)
        tiles = self._read_tiles(images, crops, self._limits(**options), kwargs)
        processed_images = BatchFeature({"pixel_values": tiles}, tensor_type=return_tensors)
        if any(crops):
            processed_images["num_tiles"] = num_tiles
        processed_images["vision_token_grids"] = [list(grid) for grid in grids]
        if matched:
            processed_images["image_sizes"] = [list(size) for size in shown]
        return processed_images, [self.replace_image_token(processed_images, i) for i in range(len(images))]

    def _read_tiles(self, images: list, crops: list[bool], limits: dict, options: dict) -> list:
        """Runs the image processor on each image, on as many threads as torch computes with."""
        tiler = self.tiler if any(crops) else None

        def read(image, crop: bool) -> list:
            if crop:
                return list(tiler([image], crop_to_patches=True, **limits, **options)["pixel_values"])
            return list(self.image_processor([image], **options)["pixel_values"])

        num_threads = min(len(images), torch.get_num_threads())
        if num_threads < 2:
            return [tile for image, crop in zip(images, crops) for tile in read(image, crop)]
        for image in images:  # several may share one file
            if isinstance(image, PIL.Image.Image):
                image.load()
        with ThreadPoolExecutor(num_threads) as threads:
            return [tile for tiles in threads.map(read, images, crops) for tile in tiles]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        num_tiles = image_inputs.get("num_tiles")
        first, tiles = (image_idx, 1) if num_tiles is None else (sum(num_tiles[:image_idx]), num_tiles[image_idx])
        grids = image_inputs["vision_token_grids"][first : first + tiles]
        return self.image_token * int(sum(rows * columns for rows, columns in grids))


_OPTIONS = ("num_vision_tokens", "match_aspect_ratio", "crop_to_patches", "min_patches", "max_patches")


def _without_none(item):
    """The conversations, conversation or message without the keys of their parts that are `None`."""
    if isinstance(item, (list, tuple)):
        return [_without_none(member) for member in item]
    parts = item.get("content") if isinstance(item, dict) else None
    if not isinstance(parts, (list, tuple)):
        return item
    return {**item, "content": [{key: part[key] for key in part if part[key] is not None} for part in parts]}


def _size(image) -> tuple[int, int]:
    if isinstance(image, PIL.Image.Image):
        return image.height, image.width
    return get_image_size(image)


def _to_rgb(image):
    """Puts transparent images on white and scales deeper gray ones to 8 bits, which PIL would clip to white."""
    if not isinstance(image, PIL.Image.Image):
        return image
    if image.mode == "F":
        raise ValueError(
            "`images` holds an image of PIL mode F (floating point), whose range is unknown: convert it to L."
        )
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.int64).clip(0, 65535)
        deep = image.mode != "I" or pixels.max() > 255
        return PIL.Image.fromarray((pixels >> 8 if deep else pixels).astype(np.uint8))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


TokenFlexProcessor.register_for_auto_class()
