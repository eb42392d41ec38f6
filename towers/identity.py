"""The check that an adopted model is the same model at its own count: prompts, pixels and logits."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, ProcessorMixin

from ..data.synthetic import draw_scene
from ..modeling_tokenflex import TokenFlexForConditionalGeneration
from ..processing_tokenflex import TokenFlexProcessor
from .families import Family


@dataclass(frozen=True)
class Identity:
    """
    Args:
        num_vision_tokens (`int`): The original model's count.
        difference (`float`): The largest difference between the models' logits.
        largest (`float`): The largest logit.
        has_base_view (`bool`): Whether the original puts tiles behind its view of the whole image.
    """

    num_vision_tokens: int
    difference: float
    largest: float
    has_base_view: bool = False

    def __str__(self) -> str:
        what = "the original model on the view of the whole image" if self.has_base_view else "the original model"
        return (
            f"at {self.num_vision_tokens} vision tokens it is {what}: prompts and pixels are equal, logits within "
            f"{self.difference:.1e} (the largest is {self.largest:.1f})."
        )


@torch.no_grad()
def check_identity(
    checkpoint: str,
    source: PreTrainedModel,
    source_processor: ProcessorMixin,
    model: TokenFlexForConditionalGeneration,
    processor: TokenFlexProcessor,
    family: Family,
    native: tuple[int, int],
) -> Identity:
    """
    Compares an adopted model with its original on a text, a built-in image, and two images.

    Args:
        checkpoint (`str`): The original, to be named in errors.
        source ([`~transformers.PreTrainedModel`]): The original model.
        source_processor ([`~transformers.ProcessorMixin`]): Its processor.
        model ([`TokenFlexForConditionalGeneration`]): The adopted model.
        processor ([`TokenFlexProcessor`]): Its processor.
        family ([`Family`]): The original's family.
        native (`tuple[int, int]`): The grid of the original's vision tokens.

    Returns:
        [`Identity`]

    Raises:
        ValueError: If they differ.
    """
    scenes = [draw_scene(0, index).image.resize((200, 120 + 60 * index)) for index in range(2)]
    differences, sizes = [], []
    for images in ([], scenes[:1], scenes):
        own = encode_adopted(processor, images, native)
        theirs = encode_original(source_processor, processor, images, family)
        for name, (got, expected) in comparable(own, theirs, processor.image_token_id, family).items():
            if not torch.equal(got, expected):
                raise ValueError(
                    f"`model`={checkpoint!r}: `{name}` of {len(images)} images is not what its own processor makes "
                    f"(shapes {tuple(got.shape)} and {tuple(expected.shape)}): it cannot be adopted as it is."
                )
        logits, expected = model(**own).logits, original_logits(source, own, theirs, family)
        differences.append((logits.float() - expected.float()).abs().max())
        sizes.append(expected.float().abs().max())
    difference, largest = (torch.stack(values).max().item() for values in (differences, sizes))
    tolerance = 1e-5 if expected.dtype == torch.float32 else 2e-2
    if not difference <= tolerance * max(1.0, largest):
        raise ValueError(
            f"`model`={checkpoint!r}: at {native[0] * native[1]} vision tokens the adopted model's logits differ from "
            f"the original's by {difference:.1e}: something stands between its parts that is not known here."
        )
    return Identity(native[0] * native[1], difference, largest, family.has_base_view)


def _prompt(processor: TokenFlexProcessor, num_images: int) -> str:
    content = [*({"type": "image"} for _ in range(num_images)), {"type": "text", "text": "What is in the picture?"}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def encode_adopted(processor: TokenFlexProcessor, images: list, grid: tuple[int, int]) -> dict[str, torch.Tensor]:
    """
    Encodes a question about images for an adopted model.

    Args:
        processor ([`TokenFlexProcessor`]): Its processor.
        images (list of `PIL.Image.Image`): The images.
        grid (`tuple[int, int]`): The grid of their vision tokens.
    """
    text = _prompt(processor, len(images))
    return dict(processor(images=images or None, text=text, num_vision_tokens=grid, return_tensors="pt"))


def encode_original(
    source_processor: ProcessorMixin, processor: TokenFlexProcessor, images: list, family: Family
) -> dict[str, torch.Tensor]:
    """
    Encodes the same question for the original model, images whole.

    Args:
        source_processor ([`~transformers.ProcessorMixin`]): The original's processor.
        processor ([`TokenFlexProcessor`]): The adopted model's, which writes the question.
        images (list of `PIL.Image.Image`): The images.
        family ([`Family`]): The original's family.
    """
    text = _prompt(processor, len(images)).replace(processor.image_token, source_processor.image_token)
    begins_with = processor.tokenizer.bos_token
    is_begun = bool(begins_with) and text.startswith(begins_with)
    options = {"add_special_tokens": not is_begun, "return_tensors": "pt", **(family.whole_image if images else {})}
    return dict(source_processor(images=images or None, text=[text], **options))


def comparable(own: dict, theirs: dict, image_token_id: int, family: Family) -> dict[str, tuple]:
    """
    Pairs what has to be equal of two models' inputs: token ids and pixels; where the original has tiles, ids without
    its vision tokens, and pixels of the view of the whole image.

    Args:
        own, theirs (`dict`): As [`encode_adopted`] and [`encode_original`] return them.
        image_token_id (`int`): The image token.
        family ([`Family`]): The original's family.
    """
    ids = [inputs["input_ids"] for inputs in (own, theirs)]
    if family.has_base_view:
        ids = [row[row != image_token_id] for row in ids]
    pairs = {"input_ids": tuple(ids)}
    if "pixel_values" in own:
        pixels = theirs["pixel_values"]
        pixels = pixels[:, 0] if family.has_base_view else pixels.flatten(0, -4)
        pairs["pixel_values"] = (own["pixel_values"], pixels)
    return pairs


def original_logits(source: PreTrainedModel, own: dict, theirs: dict, family: Family) -> torch.Tensor:
    """
    The original's logits; where it has tiles, those for its features of the whole image in the adopted prompt.

    Args:
        source ([`~transformers.PreTrainedModel`]): The original model.
        own, theirs (`dict`): As [`encode_adopted`] and [`encode_original`] return them.
        family ([`Family`]): The original's family.
    """
    if not family.has_base_view or "pixel_values" not in own:
        return source(**theirs).logits
    features = source.model.get_image_features(
        theirs["pixel_values"], image_sizes=theirs["image_sizes"], return_dict=True
    )
    is_image = own["input_ids"] == source.config.image_token_id
    num_tokens = int(is_image.sum()) // len(own["pixel_values"])
    features = torch.cat([tokens[:num_tokens] for tokens in features.pooler_output])  # the first are the whole image's
    embeds = source.get_input_embeddings()(own["input_ids"])
    embeds[is_image] = features.to(embeds)
    return source(inputs_embeds=embeds, attention_mask=own["attention_mask"]).logits
