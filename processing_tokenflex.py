"""Processor class for TokenFLEX."""

import difflib
from typing import Any

import numpy as np
import PIL.Image
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin

from .configuration_tokenflex import resolve_vision_token_grid, resolve_vision_token_grids


IMAGE_TOKEN = "<|image_pad|>"
CHAT_TEMPLATE = """
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'text' in part -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
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
    """

    # Checked by `resolve_vision_token_grids`, whose errors name the nearest counts that work.
    num_vision_tokens: Any


class TokenFlexProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: TokenFlexImagesKwargs
    _defaults = {"text_kwargs": {"padding": False, "padding_side": "left"}}


class TokenFlexProcessor(ProcessorMixin):
    r"""
    Combines an image processor and a tokenizer; expands each image placeholder of the text to the chosen number of
    vision tokens.

    Args:
        image_processor ([`~transformers.BaseImageProcessor`]):
            The vision tower's image processor. Its `size` must be the tower's image size.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The language model's tokenizer, with the image token `<|image_pad|>` (or its own `image_token`) in its
            vocabulary.
        num_vision_tokens (`int`, *optional*, defaults to 256):
            The vision-token count per image when none is asked for.
        patch_size (`int`, *optional*, defaults to 14):
            The tower's patch size in pixels.
        chat_template (`str`, *optional*):
            A Jinja template. Defaults to the tokenizer's own when it knows images, else to ChatML with
            `<|vision_start|><|image_pad|><|vision_end|>` for an image.

    Raises:
        ValueError: If the image token is missing from the tokenizer or the default count is not allowed.

    Example:

    ```python
    >>> from PIL import Image
    >>> from tokenflex.training.tiny import tiny_model_and_processor

    >>> _, processor = tiny_model_and_processor()
    >>> image, text = Image.new("RGB", (64, 64)), "<|image_pad|> which color is it?"
    >>> [processor(images=image, text=text, num_vision_tokens=n).vision_token_grids for n in (4, 36)]
    [[[2, 2]], [[6, 6]]]
    ```
    """

    valid_processor_kwargs = TokenFlexProcessorKwargs

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_vision_tokens=256,
        patch_size=14,
        chat_template=None,
    ):
        # A count given to `AutoProcessor.from_pretrained` also reaches the tokenizer, whose saved arguments would
        # override this processor's default from then on.
        tokenizer.init_kwargs.pop("num_vision_tokens", None)
        self.image_token = getattr(tokenizer, "image_token", None) or IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"`tokenizer` has no token {self.image_token!r}: add it with "
                f"`tokenizer.add_special_tokens({{'additional_special_tokens': ['{self.image_token}']}})`."
            )
        if chat_template is None:
            own_template = tokenizer.chat_template
            knows_images = isinstance(own_template, str) and self.image_token in own_template
            chat_template = own_template if knows_images else CHAT_TEMPLATE.replace(IMAGE_TOKEN, self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        tokenizer.padding_side = "left"
        self.patch_size = patch_size
        self.num_vision_tokens = num_vision_tokens
        resolve_vision_token_grid(num_vision_tokens, self.patch_grid)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """`tuple[int, int]`: Rows and columns of the vision tower's patch grid."""
        size = self.image_processor.size
        return size["height"] // self.patch_size, size["width"] // self.patch_size

    @property
    def model_input_names(self):
        # The Trainer's length sampling and batch-size search take the first name.
        names = self.tokenizer.model_input_names + self.image_processor.model_input_names
        return list(dict.fromkeys([*names, "vision_token_grids"]))

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if isinstance(images, (list, tuple)) and not any(
            len(group) if isinstance(group, (list, tuple)) else True for group in images
        ):
            images = None
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        known = set(TokenFlexImagesKwargs.__annotations__)
        for name in kwargs:
            if (
                name not in known
                and "token" in name
                and difflib.get_close_matches(name, ["num_vision_tokens"], cutoff=0.7)
            ):
                raise ValueError(f"Unknown argument `{name}`={kwargs[name]!r}: did you mean `num_vision_tokens`?")
        count = {**kwargs.get("images_kwargs", {}), **kwargs}.get("num_vision_tokens")
        if count is not None and not isinstance(count, list):
            resolve_vision_token_grid(count, self.patch_grid)
        if images is not None and text is not None:
            num_images = len(make_flat_list_of_images(images))
            found = [sample.count(self.image_token) for sample in text if isinstance(sample, str)]
            if sum(found) != num_images:
                raise ValueError(
                    f"`text` has {sum(found)} image placeholders ({self.image_token}, per prompt: {found}), but "
                    f"`images` holds {num_images} images: give one placeholder per image."
                )
            nested = isinstance(images, (list, tuple)) and isinstance(images[0], (list, tuple))
            given = [len(group) for group in images] if nested else found
            if given != found:
                raise ValueError(
                    f"`text` has {found} image placeholders ({self.image_token}) per prompt, but `images` groups its "
                    f"{num_images} images as {given}: give each prompt its own images."
                )
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def _process_images(self, images: ImageInput, num_vision_tokens=None, **kwargs):
        images = [_to_8_bit(image) for image in make_flat_list_of_images(images)]
        if num_vision_tokens is None:
            num_vision_tokens = self.num_vision_tokens
        grids = resolve_vision_token_grids(num_vision_tokens, len(images), self.patch_grid)
        processed_images = self.image_processor(images, **kwargs)
        processed_images["vision_token_grids"] = [list(grid) for grid in grids]
        return processed_images, [self.replace_image_token(processed_images, i) for i in range(len(images))]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        rows, columns = image_inputs["vision_token_grids"][image_idx]
        return self.image_token * (rows * columns)

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """
        Vision tokens and patches of images without processing them.

        Args:
            image_sizes (`list[tuple[int, int]]`, *optional*):
                (height, width) of each image in pixels.
            kwargs:
                `num_vision_tokens`, directly or inside `images_kwargs`.
        """
        if image_sizes is None:
            return MultiModalData()
        count = {**kwargs.get("images_kwargs", {}), **kwargs}.get("num_vision_tokens")
        count = self.num_vision_tokens if count is None else count
        grids = resolve_vision_token_grids(count, len(image_sizes), self.patch_grid)
        return MultiModalData(
            num_image_tokens=[rows * columns for rows, columns in grids], num_image_patches=[1] * len(image_sizes)
        )


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
