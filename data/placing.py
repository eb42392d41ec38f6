"""Prompts and images that are processed apart from each other, and put together."""

from collections.abc import Mapping

import torch
from transformers import BatchEncoding

from ..placeholders_tokenflex import count_images, first_placeholders, rewrite_runs


def tokenize_prompts(text: list[str], processor, **kwargs) -> BatchEncoding:
    """
    Tokenizes prompts as the processor does, but with one placeholder per image, to be taken to a count by
    [`at_count`].

    Args:
        text (`list[str]`): Prompts, with the image token for each image.
        processor ([`TokenFlexProcessor`]): The processor.
        kwargs: As for the tokenizer.
    """
    kwargs.setdefault("add_special_tokens", processor.adds_special_tokens_to(text))
    shown = processor.image_start + processor.image_token + processor.image_end
    return processor.tokenizer([sample.replace(processor.image_token, shown) for sample in text], **kwargs)


def place_images(inputs: Mapping, processed_images: Mapping, processor) -> dict:
    """
    Joins prompts that hold one placeholder per image with images that were processed apart from them.

    Args:
        inputs (`Mapping`): Tensors that run along the sequence, as for [`at_count`].
        processed_images (`Mapping`): The processor's output for the images alone.
        processor ([`TokenFlexProcessor`]): The processor.

    Returns:
        `dict`: Both, with one placeholder and a grid of (1, 1) for each tile, to be taken to a count by [`at_count`].
    """
    num_rows = count_images(processed_images)
    num_tiles = processed_images.get("num_tiles")
    inputs = dict(inputs)
    if num_tiles is not None:
        token_id, pad_token_id = processor.image_token_id, processor.tokenizer.pad_token_id
        first = first_placeholders(inputs["input_ids"], [(1, 1)] * len(num_tiles), token_id)
        inputs = rewrite_runs(inputs, first, [(1, int(tiles)) for tiles in num_tiles], token_id, pad_token_id)
    return {**inputs, **processed_images, "vision_token_grids": torch.ones(num_rows, 2, dtype=torch.long)}
