"""Placeholders of images in prompts: reading their counts, finding them, and re-counting them."""

from collections.abc import Mapping, Sequence

import torch

from .configuration_tokenflex import resolve_vision_token_grid


# What the new positions of a re-counted or re-padded row hold, per tensor that runs along the sequence.
SEQUENCE_FILL_VALUES = {
    "attention_mask": 0,
    "labels": -100,
    "mm_token_type_ids": 0,
    "token_type_ids": 0,
    "segment_ids": -1,
    "sample_ids": -1,
}


def infer_vision_token_grids(
    input_ids: torch.LongTensor, num_images: int, image_token_id: int, patch_grid: tuple[int, int]
) -> list[tuple[int, int]]:
    """
    Reads a uniform square count off the placeholders of hand-built inputs.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): The prompts.
        num_images (`int`): How many images the placeholders stand for.
        image_token_id (`int`): The placeholder's id.
        patch_grid (`tuple[int, int]`): Rows and columns of the vision tower's patch grid.

    Returns:
        `list[tuple[int, int]]`: One (rows, columns) per image.

    Raises:
        ValueError: If the placeholders cannot be that many images with one square count.
    """
    row_counts = (input_ids == image_token_id).sum(-1).tolist()
    count, remainder = divmod(sum(row_counts), num_images)
    if remainder or count == 0 or any(row_count % count for row_count in row_counts):
        raise ValueError(
            f"Image features and image tokens do not match: the rows hold {row_counts} image tokens for {num_images} "
            "images, which is no uniform count per image. Pass `vision_token_grids` as the processor returns it."
        )
    return [resolve_vision_token_grid(count, patch_grid, "image tokens per image in `input_ids`")] * num_images


def first_placeholders(
    input_ids: torch.LongTensor, vision_token_counts: torch.LongTensor, image_token_id: int
) -> torch.LongTensor:
    """
    Finds where each image's run of placeholders begins.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): The prompts.
        vision_token_counts (`torch.LongTensor` of shape `(num_images,)`): The length of each image's run.
        image_token_id (`int`): The placeholder's id.

    Returns:
        `torch.LongTensor` of shape `(num_images,)`: Positions in the flattened `input_ids`.

    Raises:
        ValueError: If the placeholders are not such runs, each unbroken and within one row.
    """
    length = input_ids.shape[-1]
    placeholders = (input_ids == image_token_id).flatten().nonzero().squeeze(-1)
    ends = vision_token_counts.cumsum(0)
    if int(vision_token_counts.sum()) == len(placeholders):
        first, last = placeholders[ends - vision_token_counts], placeholders[ends - 1]
        if ((last - first + 1 == vision_token_counts) & (first // length == last // length)).all():
            return first
    images = (
        f"its {len(vision_token_counts)} images were encoded as {vision_token_counts.tolist()} tokens in unbroken runs"
    )
    raise ValueError(
        f"Image features and image tokens do not match: `input_ids` holds {len(placeholders)} image tokens, but "
        f"{images if len(vision_token_counts) else 'there are no images: pass `pixel_values`'}."
    )


def recount_vision_tokens(
    inputs: Mapping[str, torch.Tensor],
    vision_token_grids: Sequence[tuple[int, int]],
    image_token_id: int,
    pad_token_id: int | None = None,
) -> dict[str, torch.Tensor]:
    """
    Rewrites encoded inputs to other vision-token counts, as if they had been encoded so in the first place: every
    image's run of placeholders gets its new length in each tensor that runs along the sequence, and rows are padded
    again on the side they were padded on.

    Args:
        inputs (`Mapping[str, torch.Tensor]`):
            A processor's or collator's output: `input_ids` of shape `(batch_size, sequence_length)`,
            `vision_token_grids` of shape `(num_images, 2)` with the grids as encoded, optionally `attention_mask`,
            `labels`, `mm_token_type_ids`, `token_type_ids`, `segment_ids` and `sample_ids`. Other entries are passed through, except
            `position_ids`, which is dropped.
        vision_token_grids (sequence of `tuple[int, int]`):
            The new (rows, columns) per image.
        image_token_id (`int`):
            The placeholder's id.
        pad_token_id (`int`, *optional*):
            The id that pads `input_ids`; 0 when there is none, since the mask hides it.

    Returns:
        `dict[str, torch.Tensor]`: New tensors; the caller's are left as they were.

    Raises:
        ValueError: If the runs of placeholders do not match the encoded grids.

    Example:

    ```python
    >>> import torch
    >>> from tokenflex import recount_vision_tokens

    >>> inputs = {"input_ids": torch.tensor([[5, 9, 9, 9, 9, 6]]), "vision_token_grids": torch.tensor([[2, 2]])}
    >>> recount_vision_tokens(inputs, [(1, 1)], image_token_id=9)["input_ids"]
    tensor([[5, 9, 6]])
    ```
    """
    input_ids = inputs["input_ids"]
    batch_size, length = input_ids.shape
    device = input_ids.device
    attention_mask = inputs.get("attention_mask")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` of shape {tuple(attention_mask.shape)} cannot be re-counted: give one of the shape of "
            f"`input_ids`, {tuple(input_ids.shape)}."
        )
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    first = first_placeholders(input_ids, inputs["vision_token_grids"].to(device).prod(-1), image_token_id)
    new_counts = torch.tensor(vision_token_grids, dtype=torch.long, device=device).reshape(-1, 2).prod(-1)
    if len(first) != len(new_counts):
        raise ValueError(f"{len(new_counts)} new counts are asked for, but the inputs hold {len(first)} images.")

    # Every position is copied once, the first placeholder of an image as often as its new count, padding never.
    copies = ((mask.cumsum(-1) > 0) & (mask.flip(-1).cumsum(-1).flip(-1) > 0)).long().flatten()
    copies[(input_ids == image_token_id).flatten()] = 0
    copies[first] = new_counts
    row_lengths = copies.view(batch_size, length).sum(-1)
    new_length = int(row_lengths.max())
    pad_right = bool((mask[:, -1] == 0).any()) and bool((mask[:, 0] == 1).all())
    source = torch.repeat_interleave(torch.arange(batch_size * length, device=device), copies)
    row = source // length
    row_starts = row_lengths.cumsum(0) - row_lengths
    offset = torch.zeros_like(row_lengths) if pad_right else new_length - row_lengths
    target = row * new_length + offset[row] + torch.arange(len(source), device=device) - row_starts[row]

    def rewrite(tensor: torch.Tensor, fill: int) -> torch.Tensor:
        flat = tensor.new_full((batch_size * new_length,), fill)
        flat[target] = tensor.reshape(-1)[source]
        return flat.view(batch_size, new_length)

    recounted = {key: value for key, value in inputs.items() if key != "position_ids"}
    recounted["input_ids"] = rewrite(input_ids, 0 if pad_token_id is None else pad_token_id)
    if attention_mask is None and new_length * batch_size != len(source):
        recounted["attention_mask"] = mask
    for key, fill in SEQUENCE_FILL_VALUES.items():
        if recounted.get(key) is not None:
            recounted[key] = rewrite(recounted[key], fill)
    recounted["vision_token_grids"] = torch.tensor(vision_token_grids, dtype=torch.long, device=device).reshape(-1, 2)
    return recounted


def count_tokens(vision_token_grids: Sequence[tuple[int, int]], device: torch.device) -> torch.LongTensor:
    """The number of vision tokens of each grid, as a tensor of shape `(num_images,)`."""
    return torch.tensor(vision_token_grids, dtype=torch.long, device=device).reshape(-1, 2).prod(-1)


__all__ = ["recount_vision_tokens"]
