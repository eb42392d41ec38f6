"""
Pairs of a peer and a TokenFLEX of the same shapes, with processors that share one tokenizer, and what they are asked.

A pair is matched in width, layers, heads and MLP of the tower and of the language model, vocabulary, patch size, image
size and hence patches per image, pixel statistics, the prompt, and the length of the sequence that the language model
reads. Images become `count` tokens in TokenFLEX, InternVL and Qwen3-VL, of `4 * count` patches, since the two peers
make one token of 2 x 2 patches. LLaVA-OneVision makes a token of every patch, so that its pair's towers see `count`
patches; it ends every image with a newline token, which stands where the other prompts have `<|vision_end|>`.

It cannot be matched in what makes the peers what they are: the projectors (SwiGLU behind pooling in TokenFLEX; two
layers behind a pixel shuffle in InternVL and Qwen3-VL, on four times the tower's width; two layers in
LLaVA-OneVision), and in Qwen3-VL tower and language model of its own: rotary positions in the tower, pixels of two
frames, query and key norms and three-dimensional positions in the language model, no biases.

Where a peer would do more work than the others, it is spared it: Qwen3-VL goes without DeepStack and shows images as
squares instead of in their own shape; LLaVA-OneVision shows an image in one view, as it does with several images of
one prompt, where a single image would be cut into tiles beside the whole; InternVL does not cut images.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import (
    BatchFeature,
    GenerationConfig,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import SizeDict
from transformers.modeling_utils import local_torch_dtype

from tokenflex import TokenFlexConfig, TokenFlexForConditionalGeneration, TokenFlexProcessor
from tokenflex.towers.tiny import END_TOKEN, PAD_TOKEN, START_TOKEN, train_tokenizer


IMAGE_TOKEN = "<|image_pad|>"
QUESTION = "What is to be seen here, where does it stand, and which of its colors is the brightest one of all?"
PHOTO_SIZE = (640, 480)
STATISTICS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # SigLIP's
WIDTHS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True)
class Size:
    """
    Shapes that all models of a run share.

    Args:
        tower (`tuple[int, ...]`): Width, MLP width, layers, heads.
        text (`tuple[int, ...]`): Width, MLP width, layers, heads, key-value heads.
        vocab_size (`int`): Of the language model; the tokenizer's own is smaller.
        patch_size (`int`): In pixels.
        alone_side (`int`, *optional*, defaults to 32):
            Patches along a side of the images that TokenFLEX sees where no peer stands beside it.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`): Whether to use the embeddings as the head.
    """

    tower: tuple[int, ...]
    text: tuple[int, ...]
    vocab_size: int
    patch_size: int
    alone_side: int = 32
    tie_word_embeddings: bool = True


SIZES = {
    "tiny": Size((16, 32, 1, 2), (32, 64, 2, 4, 2), 1024, 2),
    "small": Size((128, 512, 2, 2), (384, 1024, 4, 6, 2), 8192, 14),
    "so400m-0.5b": Size((1152, 4304, 27, 16), (896, 4864, 24, 14, 2), 151936, 14, alone_side=27),
    "so400m-1.5b": Size((1152, 4304, 27, 16), (1536, 8960, 28, 12, 2), 151936, 14, alone_side=27),
    "so400m-7b": Size(
        (1152, 4304, 27, 16), (3584, 18944, 28, 28, 4), 152064, 14, alone_side=27, tie_word_embeddings=False
    ),
}
NAMES = {
    "tokenflex": "tokenflex",
    "internvl": "InternVL",
    "llava_onevision": "LLaVA-OneVision",
    "qwen3_vl": "Qwen3-VL",
}


@dataclass
class Contender:
    """
    A model and its processor.

    Args:
        name (`str`): A key of `NAMES`.
        model ([`~transformers.PreTrainedModel`]): With random weights.
        processor ([`~transformers.ProcessorMixin`]): Its processor.
        tower (`nn.Module`): The module that encodes patches.
        projector (`nn.Module`): The module that makes tokens of them; within the tower in Qwen3-VL.
        placeholder (`str`): Text in a prompt in the place of an image.
        options (`dict`): Arguments of the processor beside images and text.
    """

    name: str
    model: nn.Module
    processor: object
    tower: nn.Module
    projector: nn.Module
    placeholder: str
    options: dict = field(default_factory=dict)

    @property
    def config(self):
        return self.model.config

    @property
    def image_token_id(self) -> int:
        return self.processor.tokenizer.image_token_id

    @property
    def has_projector_in_tower(self) -> bool:
        return any(module is self.projector for module in self.tower.modules())

    def prompts(self, batch_size: int, num_images: int) -> list[str]:
        """`batch_size` prompts of `num_images` images and a question."""
        turn = f"{START_TOKEN}user\n{self.placeholder * num_images}{QUESTION}{END_TOKEN}\n{START_TOKEN}assistant\n"
        return [turn] * batch_size

    def encode(self, images: Sequence[Image.Image], batch_size: int) -> BatchFeature:
        """The model's inputs, for prompts that share out `images` evenly."""
        text = self.prompts(batch_size, len(images) // batch_size)
        return self.processor(images=list(images), text=text, padding=True, return_tensors="pt", **self.options)


class ImagesOnlyMixin:
    """Lets a processor do without its video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)


class InternVLImagesProcessor(ImagesOnlyMixin, InternVLProcessor):
    pass


class LlavaOnevisionImagesProcessor(ImagesOnlyMixin, LlavaOnevisionProcessor):
    pass


class Qwen3VLImagesProcessor(ImagesOnlyMixin, Qwen3VLProcessor):
    pass


def draw_photos(number: int, seed: int) -> list[Image.Image]:
    """Random textures, coarse and fine, of 640 x 480 pixels."""
    random = np.random.default_rng(seed)
    photos = []
    for _ in range(number):
        coarse = random.integers(256, size=(15, 20, 3), dtype=np.uint8)
        noise = random.integers(-20, 21, size=(PHOTO_SIZE[1], PHOTO_SIZE[0], 1))
        texture = np.asarray(Image.fromarray(coarse).resize(PHOTO_SIZE, Image.Resampling.BICUBIC)) + noise
        photos.append(Image.fromarray(texture.clip(0, 255).astype(np.uint8)))
    return photos


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One for all: each model's image token is the same, and the marks around images are."""
    trained = train_tokenizer([QUESTION] * 20 + ["user", "assistant"] * 20)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained.backend_tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        extra_special_tokens={
            "image_token": IMAGE_TOKEN,
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
            "context_image_token": IMAGE_TOKEN,
            "start_image_token": "<|vision_start|>",
            "end_image_token": "<|vision_end|>",
        },
        padding_side="left",
    )


def grid_side(peer: str, count: int) -> int:
    """Patches along a side of the images of a peer that makes `count` tokens of each."""
    side = round(count**0.5)
    return side if peer == "llava_onevision" else 2 * side


def build_tokenflex(size: Size, side: int, count: int, tokenizer: PreTrainedTokenizerFast) -> Contender:
    """TokenFLEX whose tower sees `side` x `side` patches, with a processor that encodes at `count`."""
    choices = [number for number in (64, 144, 256) if number <= side**2]
    config = TokenFlexConfig(
        vision_config=_vision_config(size, side),
        text_config=_text_config(size),
        image_token_id=tokenizer.image_token_id,
        num_vision_tokens=count,
        vision_token_choices=choices,
        vision_token_weights=[1.0] * len(choices),
        tie_word_embeddings=size.tie_word_embeddings,
    )
    model = _finish(TokenFlexForConditionalGeneration(config), tokenizer)
    image_processor = SiglipImageProcessorPil(size=_square(size, side), **STATISTICS)
    processor = TokenFlexProcessor(image_processor, tokenizer, count, size.patch_size)
    placeholder = f"<|vision_start|>{IMAGE_TOKEN}<|vision_end|>"
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    return Contender("tokenflex", model, processor, tower, projector, placeholder)


def build_internvl(size: Size, count: int, tokenizer: PreTrainedTokenizerFast) -> Contender:
    side = grid_side("internvl", count)
    config = InternVLConfig(
        vision_config=_vision_config(size, side),
        text_config=_text_config(size),
        image_token_id=tokenizer.image_token_id,
        image_seq_length=count,
        vision_feature_select_strategy="full",  # no class token
        tie_word_embeddings=size.tie_word_embeddings,
    )
    model = _finish(InternVLForConditionalGeneration(config), tokenizer)
    image_processor = GotOcr2ImageProcessorPil(size=_square(size, side), **STATISTICS)
    processor = InternVLImagesProcessor(image_processor, tokenizer, image_seq_length=count)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    # The processor puts the marks around the image's tokens.
    return Contender("internvl", model, processor, tower, projector, IMAGE_TOKEN, {"crop_to_patches": False})


class OneViewImageProcessor(LlavaOnevisionImageProcessorPil):
    """Shows every image in one view, as LLaVA-OneVision does where a prompt has several."""

    def _preprocess(self, images, batch_num_images, **kwargs):
        return super()._preprocess(images, [1 + len(images)], **kwargs)  # any number but one


def build_llava_onevision(
    size: Size,
    count: int,
    tokenizer: PreTrainedTokenizerFast,
) -> Contender:
    side = grid_side("llava_onevision", count)
    pixels = side * size.patch_size
    config = LlavaOnevisionConfig(
        vision_config=_vision_config(size, side),
        text_config=_text_config(size),
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=[[pixels, pixels]],
        tie_word_embeddings=size.tie_word_embeddings,
    )
    model = _finish(LlavaOnevisionForConditionalGeneration(config), tokenizer)
    options = {"size": _square(size, side), "image_grid_pinpoints": [[pixels, pixels]], **STATISTICS}
    processor = LlavaOnevisionImagesProcessor(
        OneViewImageProcessor(**options),
        tokenizer,
        num_image_tokens=count,
        vision_feature_select_strategy="full",
    )
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    # The newline token behind every image takes the place of the end mark.
    return Contender("llava_onevision", model, processor, tower, projector, f"<|vision_start|>{IMAGE_TOKEN}")


class SquareImageProcessor(Qwen2VLImageProcessorPil):
    """Resizes to a square, as the others do, where Qwen3-VL would keep the image's shape."""

    def resize(self, image, size, resample, **kwargs):
        side = round(size.longest_edge**0.5)
        return PilBackend.resize(self, image, SizeDict(height=side, width=side), resample)


def build_qwen3_vl(size: Size, count: int, tokenizer: PreTrainedTokenizerFast) -> Contender:
    side = grid_side("qwen3_vl", count)
    hidden_size, intermediate_size, depth, num_heads = size.tower
    text = dict(zip(WIDTHS, size.text))
    config = Qwen3VLConfig(
        vision_config={
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "depth": depth,
            "num_heads": num_heads,
            "patch_size": size.patch_size,
            "out_hidden_size": text["hidden_size"],
            "num_position_embeddings": side**2,
            "deepstack_visual_indexes": [],
        },
        text_config={
            **text,
            "head_dim": text["hidden_size"] // text["num_attention_heads"],
            "vocab_size": size.vocab_size,
        },
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_start_token_id,
        vision_end_token_id=tokenizer.vision_end_token_id,
        tie_word_embeddings=size.tie_word_embeddings,
    )
    model = _finish(Qwen3VLForConditionalGeneration(config), tokenizer)
    pixels = (side * size.patch_size) ** 2
    image_processor = SquareImageProcessor(
        patch_size=size.patch_size, size={"shortest_edge": pixels, "longest_edge": pixels}, **STATISTICS
    )
    processor = Qwen3VLImagesProcessor(image_processor, tokenizer)
    placeholder = f"<|vision_start|>{IMAGE_TOKEN}<|vision_end|>"
    return Contender("qwen3_vl", model, processor, model.model.visual, model.model.visual.merger, placeholder)


BUILDERS = {"internvl": build_internvl, "llava_onevision": build_llava_onevision, "qwen3_vl": build_qwen3_vl}


def build_pair(
    size: Size, peer: str, count: int, device: str, dtype: torch.dtype, seed: int
) -> tuple[Contender, Contender]:
    """TokenFLEX and a peer, made on `device` in `dtype`, for images of `count` tokens."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    with local_torch_dtype(dtype), torch.device(device):
        return (
            build_tokenflex(size, grid_side(peer, count), count, tokenizer),
            BUILDERS[peer](size, count, tokenizer),
        )


def build_alone(size: Size, count: int, device: str, dtype: torch.dtype, seed: int) -> Contender:
    """TokenFLEX alone, made on `device` in `dtype`."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    with local_torch_dtype(dtype), torch.device(device):
        return build_tokenflex(size, size.alone_side, count, tokenizer)


def _square(size: Size, side: int) -> dict[str, int]:
    return {"height": side * size.patch_size, "width": side * size.patch_size}


def _vision_config(size: Size, side: int) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        **dict(zip(WIDTHS, size.tower)),
        image_size=side * size.patch_size,
        patch_size=size.patch_size,
        vision_use_head=False,
    )


def _text_config(size: Size) -> Qwen2Config:
    return Qwen2Config(
        **dict(zip(WIDTHS, size.text)), vocab_size=size.vocab_size, tie_word_embeddings=size.tie_word_embeddings
    )


def _finish(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, do_sample=False
    )
    return model.eval()
