"""Processor class for TokenFLEX."""

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
from transformers import GotOcr2ImageProcessorPil
from transformers.audio_utils import AudioInput
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput, get_image_size, make_flat_list_of_images
from transformers.processing_utils import (
    ImagesKwargs,
    MultiModalData,
    ProcessingKwargs,
    ProcessorMixin,
    TextKwargs,
    Unpack,
)
from transformers.tokenization_utils_base import PreTokenizedInput, TextInput
from transformers.video_utils import VideoInput

from .configuration_tokenflex import resolve_vision_token_grid, resolve_vision_token_grids
from .pixels_tokenflex import is_tabulable, tabulate_pixels
from .video_processing_tokenflex import (
    TokenFlexVideosKwargs,
    VideosAsImagesMixin,
    join_replacements,
    list_videos,
    one_each,
)


IMAGE_TOKEN = "<|image_pad|>"
VIDEO_TOKEN = "<|video_pad|>"
VISION_START_TOKEN, VISION_END_TOKEN = "<|vision_start|>", "<|vision_end|>"
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
{%- set content.text = content.text + 'VIDEO' -%}
{%- elif 'text' in part -%}
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
        Whether an integer count, then any from 1 to the number of patches, is the most tokens of a grid that follows
        the image's shape. Defaults to the processor's.
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
    videos_kwargs: TokenFlexVideosKwargs


class TokenFlexProcessor(ProcessorMixin, VideosAsImagesMixin):
    r"""
    Combines an image processor and a tokenizer; expands each image placeholder of the text to the chosen number of
    vision tokens. Frames of videos are images, in the place where the text has the video's placeholder `<|video_pad|>`.

    Args:
        image_processor ([`~transformers.BaseImageProcessor`]):
            The vision tower's image processor. Its `size` must be the tower's image size.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The language model's tokenizer, with the image token `<|image_pad|>` (or its own `image_token`) in its
            vocabulary.
        num_vision_tokens (`int` or `tuple[int, int]`, *optional*, defaults to 256):
            The vision-token count per image (or tile) when none is asked for.
        patch_size (`int`, *optional*, defaults to 14):
            The tower's patch size in pixels.
        chat_template (`str`, *optional*):
            A Jinja template. Defaults to the tokenizer's own, which learns to take images and videos if it does not
            know them, else to ChatML.
        num_vision_tokens_per_frame (`int` or `tuple[int, int]`, *optional*):
            The vision-token count per frame of a video when none is asked for. Defaults to the largest square that is
            at most a quarter of `num_vision_tokens`.
        match_aspect_ratio (`bool`, *optional*, defaults to `False`):
            Whether grids follow the images' shapes, with at most the given count.
        crop_to_patches (`bool`, *optional*, defaults to `False`):
            Whether to cut images into tiles, as GOT-OCR2 and InternVL do.
        min_patches (`int`, *optional*, defaults to 1):
            The fewest tiles.
        max_patches (`int`, *optional*, defaults to 12):
            The most tiles.

    Raises:
        ValueError: If the image token is missing from the tokenizer or a default count is not allowed.

    Example:

    ```python
    >>> from PIL import Image
    >>> from tokenflex.towers.tiny import tiny_model_and_processor

    >>> _, processor = tiny_model_and_processor()
    >>> image, text = Image.new("RGB", (64, 64)), "<|image_pad|> which color is it?"
    >>> [processor(images=image, text=text, num_vision_tokens=n).vision_token_grids for n in (4, 36)]
    [[[2, 2]], [[6, 6]]]
    >>> frames = [image] * 3
    >>> processor(videos=frames, text="<|video_pad|> what moves?").vision_token_grids
    [[3, 3], [3, 3], [3, 3]]
    ```
    """

    valid_processor_kwargs = TokenFlexProcessorKwargs
    text_kwargs = {"padding_side": "left"}

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_vision_tokens=256,
        patch_size=14,
        chat_template=None,
        num_vision_tokens_per_frame=None,
        match_aspect_ratio=False,
        crop_to_patches=False,
        min_patches=1,
        max_patches=12,
    ):
        # Options given to `AutoProcessor.from_pretrained` also reach the tokenizer, whose saved arguments would
        # override this processor's defaults from then on.
        for name in ("num_vision_tokens_per_frame", *_OPTIONS):
            tokenizer.init_kwargs.pop(name, None)
        self.image_token = getattr(tokenizer, "image_token", None) or IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"`tokenizer` has no token {self.image_token!r}: add it with "
                f"`tokenizer.add_special_tokens({{'additional_special_tokens': ['{self.image_token}']}})`."
            )
        self.video_token = VIDEO_TOKEN
        has_marks = not {None, tokenizer.unk_token_id} & {
            tokenizer.convert_tokens_to_ids(token) for token in (VISION_START_TOKEN, VISION_END_TOKEN)
        }
        self.image_placeholder = (
            f"{VISION_START_TOKEN}{self.image_token}{VISION_END_TOKEN}" if has_marks else self.image_token
        )
        if chat_template is None:
            own = tokenizer.chat_template
            own = own.get("default") if isinstance(own, dict) else own
            to_text = CONTENT_TEMPLATE.replace("IMAGE", self.image_placeholder).replace("VIDEO", self.video_token)
            chat_template = own if own and self.image_token in own else to_text + (own or CHATML_TEMPLATE)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        tokenizer.padding_side = "left"
        # JSON has no tuples: a saved (rows, columns) comes back as a list.
        if isinstance(num_vision_tokens, list):
            num_vision_tokens = tuple(num_vision_tokens)
        if isinstance(num_vision_tokens_per_frame, list):
            num_vision_tokens_per_frame = tuple(num_vision_tokens_per_frame)
        self.patch_size = patch_size
        self.num_vision_tokens = num_vision_tokens
        self.num_vision_tokens_per_frame = num_vision_tokens_per_frame
        self.match_aspect_ratio = match_aspect_ratio
        self.crop_to_patches = crop_to_patches
        self.min_patches = min_patches
        self.max_patches = max_patches
        self._arrange([(1, 1)], num_vision_tokens)
        if num_vision_tokens_per_frame is not None:
            name = "num_vision_tokens_per_frame"
            resolve_vision_token_grid(num_vision_tokens_per_frame, self.patch_grid, name)

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

    @property
    def unused_input_names(self):
        return ["num_patches"]

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
        How many vision tokens images will cost, from their sizes alone: nothing is read, resized or tokenised.

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
        """What vLLM asks: [`~TokenFlexProcessor.count_vision_tokens`], and the rows of `pixel_values` per image."""
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
        limits = {
            "min_patches": self.min_patches if min_patches is None else min_patches,
            "max_patches": self.max_patches if max_patches is None else max_patches,
        }
        if not 1 <= limits["min_patches"] <= limits["max_patches"]:
            raise ValueError(
                f"`min_patches`={limits['min_patches']} and `max_patches`={limits['max_patches']}: give numbers of tiles "
                "with 1 <= min_patches <= max_patches."
            )
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
        return one_each("crop_to_patches", crop_to_patches, num_images, "images")

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | PreTokenizedInput | list[TextInput] | list[PreTokenizedInput] | None = None,
        videos: VideoInput | None = None,
        audio: AudioInput | None = None,
        **kwargs: Unpack[TokenFlexProcessorKwargs],
    ) -> BatchFeature:
        """
        Args:
            images (`ImageInput`, *optional*):
                The images of all prompts in order of appearance, or a list per prompt.
            text (`str` or `list[str]`, *optional*):
                Prompts, with `<|image_pad|>` for each image and `<|video_pad|>` for each video.
            videos (`VideoInput`, *optional*):
                Videos in order of appearance: each a list of images, a `uint8` array of shape `(num_frames, height,
                width, channels)`, or the path of a file, for which a video decoder must be installed.
            kwargs:
                `num_vision_tokens`, `match_aspect_ratio`, `crop_to_patches`, `min_patches` and `max_patches` (see
                [`TokenFlexImagesKwargs`]); `num_frames`, `fps`, `do_sample_frames`, `video_metadata` and
                `return_metadata`; all else of the image processor and the tokenizer. One `num_vision_tokens` holds for
                images and frames, a list for images alone; inside `images_kwargs` or `videos_kwargs` it holds for
                these alone, and a list in the latter has one entry per video.

        Returns:
            [`~transformers.BatchFeature`]: `input_ids`, `attention_mask`; `pixel_values` of shape `(num_tiles,
            num_channels, height, width)`, where an uncut image is one tile, and `vision_token_grids` of shape
            `(num_tiles, 2)`; with `match_aspect_ratio` also `image_sizes` of shape `(num_tiles, 2)`; with
            `crop_to_patches` also `num_tiles` of shape `(num_images,)`.

        Raises:
            ValueError: If placeholders do not match images and videos, or an argument is not allowed.
        """
        if videos is None or not list_videos(videos):
            return super().__call__(images=images, text=text, audio=audio, **kwargs)
        images, text, spans, metadata, kwargs = self._videos_to_images(images, text, videos, kwargs)
        outputs = super().__call__(images=images, text=text, audio=audio, **kwargs)
        if "text_replacement_offsets" in outputs:
            offsets = outputs["text_replacement_offsets"]
            outputs["text_replacement_offsets"] = [join_replacements(*pair) for pair in zip(spans, offsets)]
        if metadata is not None:
            outputs["video_metadata"] = metadata
        return outputs

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if isinstance(images, (list, tuple)) and not any(
            len(group) if isinstance(group, (list, tuple)) else True for group in images
        ):
            images = None
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        known = {"images_kwargs", "videos_kwargs", "text_kwargs", "common_kwargs"}.union(
            *(kind.__annotations__ for kind in (TokenFlexImagesKwargs, TokenFlexVideosKwargs, TextKwargs)),
            ProcessingKwargs.__annotations__,
        )
        for name in kwargs:
            meant = difflib.get_close_matches(name, _OPTIONS, n=1, cutoff=0.7) if name not in known else None
            if meant:
                raise ValueError(f"Unknown argument `{name}`={kwargs[name]!r}: did you mean `{meant[0]}`?")
        options = {**kwargs.get("images_kwargs", {}), **kwargs}
        options = {name: options[name] for name in _OPTIONS if not isinstance(options.get(name), list | None)}
        self._arrange([(1, 1)], **options)
        if images is not None and text is not None:
            found = [sample.count(self.image_token) for sample in text if isinstance(sample, str)]
            self._check_images(images, found)
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def _check_images(self, images: ImageInput | None, found: list[int]) -> None:
        """Refuses images that do not match the placeholders found in each prompt."""
        nested = isinstance(images, (list, tuple)) and isinstance(images[0], (list, tuple))
        given = [len(group) for group in images] if nested else found
        num_images = 0 if images is None else len(make_flat_list_of_images(images))
        if sum(found) != num_images:
            raise ValueError(
                f"The total number of {self.image_token} tokens in the prompts should be the same as the number of "
                f"images passed: `text` has {sum(found)} (per prompt: {found}), `images` holds {num_images}."
            )
        if given != found:
            raise ValueError(
                f"`text` has {found} image placeholders ({self.image_token}) per prompt, but `images` groups its "
                f"{num_images} images as {given}: give each prompt its own images."
            )

    def _process_images(self, images: ImageInput, **kwargs):
        images = [_to_8_bit(image) for image in make_flat_list_of_images(images)]
        options = {name: kwargs.pop(name, None) for name in _OPTIONS}
        crops = self._crops(options["crop_to_patches"], len(images))
        matched = options["match_aspect_ratio"]
        matched = self.match_aspect_ratio if matched is None else matched
        sizes = [_size(image) for image in images] if matched or any(crops) else [None] * len(images)
        num_tiles, grids, shown = self._arrange(sizes, **options)
        limits = {
            name: getattr(self, name) if options[name] is None else options[name]
            for name in ("min_patches", "max_patches")
        }
        return_tensors = kwargs.pop("return_tensors", None)
        if is_tabulable(self.image_processor, images, kwargs):
            tiler = self.tiler if any(crops) else None
            pixel_values = tabulate_pixels(self.image_processor, images, num_tiles, tiler, **limits)
            pixel_values = list(pixel_values) if return_tensors is None else pixel_values
            processed_images = BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)
        elif any(crops):
            processed_images = self._cut(images, crops, limits, kwargs)
        else:
            processed_images = self.image_processor(images, return_tensors=return_tensors, **kwargs)
        if any(crops):
            processed_images["num_tiles"] = num_tiles
        processed_images["vision_token_grids"] = [list(grid) for grid in grids]
        if matched:
            processed_images["image_sizes"] = [list(size) for size in shown]
        return processed_images, [self.replace_image_token(processed_images, i) for i in range(len(images))]

    def _cut(self, images: list, crops: list[bool], limits: dict, kwargs: dict) -> dict:
        """The tiles of all images in order, uncut images among them."""
        tiler = self.tiler
        tiles = [
            tile
            for image, crop in zip(images, crops)
            for tile in tiler([image], crop_to_patches=crop, **limits, **kwargs)["pixel_values"]
        ]
        return {"pixel_values": tiles}

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        num_tiles = image_inputs.get("num_tiles")
        first, tiles = (image_idx, 1) if num_tiles is None else (sum(num_tiles[:image_idx]), num_tiles[image_idx])
        grids = image_inputs["vision_token_grids"][first : first + tiles]
        return self.image_token * int(sum(rows * columns for rows, columns in grids))


_OPTIONS = ("num_vision_tokens", "match_aspect_ratio", "crop_to_patches", "min_patches", "max_patches")


def _size(image) -> tuple[int, int]:
    if isinstance(image, PIL.Image.Image):
        return image.height, image.width
    return get_image_size(image)


def _to_8_bit(image):
    """Scales deeper grey images to 8 bits; PIL's own conversion to RGB clips them to white instead."""
    if not isinstance(image, PIL.Image.Image) or not image.mode.startswith(("I", "F")):
        return image
    if image.mode == "F":
        raise ValueError(
            "`images` holds an image of PIL mode F (floating point), whose range is unknown: convert it to L."
        )
    pixels = np.asarray(image).astype(np.int64).clip(0, 65535)
    deep = image.mode != "I" or pixels.max() > 255
    return PIL.Image.fromarray((pixels >> 8 if deep else pixels).astype(np.uint8))


TokenFlexProcessor.register_for_auto_class()


__all__ = ["TokenFlexProcessor"]
