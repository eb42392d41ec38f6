"""Placeholders of images in prompts: finding them, and taking encoded inputs to other vision-token counts."""

from collections.abc import Mapping, Sequence

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_tokenflex import resolve_vision_token_grid, resolve_vision_token_grids


# The value of new positions in a re-counted or re-padded row, per tensor that runs along the sequence.
SEQUENCE_FILL_VALUES = {
    "attention_mask": 0,
    "labels": -100,
    "mm_token_type_ids": 0,
    "token_type_ids": 0,
    "segment_ids": -1,
    "sample_ids": -1,
}


def at_count(
    inputs: Mapping, num_vision_tokens: int | tuple[int, int] | list | None, config, pad_token_id: int | None = None
) -> dict:
    """
    Takes encoded inputs to other vision-token counts, as if they had been encoded so in the first place: each image's
    run of placeholders gets its new length in every tensor that runs along the sequence, and rows are padded again on
    the side they were padded on.

    Args:
        inputs (`Mapping`):
            The output of a processor or collator: `input_ids` of shape `(batch_size, sequence_length)` and, where they
            are there, `attention_mask`, `labels`, `mm_token_type_ids`, `token_type_ids`, `segment_ids`, `sample_ids`,
            `vision_token_grids` of shape `(num_images, 2)` with the grids as encoded, `image_shapes` and `num_tiles`.
            Without grids, the uniform count that the placeholders imply is taken. Kept features, in
            `mm_encoder_outputs`, are pooled where they are used. `position_ids` are dropped, other entries kept.
        num_vision_tokens (`int`, `tuple[int, int]` or a list of these, *optional*):
            A count n*n or grid (rows, columns) for all images, or a list with one per image (or tile). With
            `image_shapes`, an integer is matched to each image's shape. `None` keeps the counts as encoded.
        config ([`TokenFlexConfig`] or [`TokenFlexProcessor`]):
            The model's or the processor's: their `image_token_id` and `patch_grid` are read.
        pad_token_id (`int`, *optional*):
            The id that pads `input_ids`, by which padding is known where no `attention_mask` is given. Defaults to 0
            for new padding, which the mask hides.

    Returns:
        `dict`: New tensors, with `vision_token_grids` if there are images; the caller's are left as they were.

    Raises:
        ValueError: If a count is not allowed, or the runs of placeholders do not match the grids.

    Example:

    ```python
    >>> import torch
    >>> from tokenflex import TokenFlexConfig, at_count

    >>> config = TokenFlexConfig(image_token_id=9)
    >>> inputs = {"input_ids": torch.tensor([[5, 9, 9, 9, 9, 6]]), "vision_token_grids": torch.tensor([[2, 2]])}
    >>> at_count(inputs, 1, config)["input_ids"]
    tensor([[5, 9, 6]])
    ```
    """
    if getattr(config, "patch_grid", None) is None:
        raise ValueError(f"`config` is a {type(config).__name__}: give the model's config or its processor.")
    encoded = encoded_grids(inputs, config)
    grids = encoded if num_vision_tokens is None else asked_grids(inputs, num_vision_tokens, len(encoded), config)
    first = first_placeholders(inputs["input_ids"], encoded, config.image_token_id)
    recounted = dict(inputs)
    if grids != encoded:
        recounted = rewrite_runs(recounted, first, grids, config.image_token_id, pad_token_id)
    if grids:
        recounted["vision_token_grids"] = torch.tensor(grids, device=inputs["input_ids"].device)
    if kept := (inputs.get("mm_encoder_outputs") or {}).get("image"):
        unpooled = BaseModelOutputWithPooling(last_hidden_state=kept.last_hidden_state)
        recounted["mm_encoder_outputs"] = {**inputs["mm_encoder_outputs"], "image": unpooled}
    return recounted


def encoded_grids(inputs: Mapping, config) -> list[tuple[int, int]]:
    """
    Reads the grid that each image is encoded at, arguments as for [`at_count`]: `vision_token_grids` if given, else
    the uniform square count that the placeholders imply.

    Raises:
        ValueError: If grids and images differ in number, a grid is not allowed, or placeholders are not uniform.
    """
    grids, num_images = inputs.get("vision_token_grids"), count_images(inputs)
    if grids is not None:
        grids = torch.as_tensor(grids)
        if grids.ndim != 2 or grids.shape[1] != 2:
            raise ValueError(
                f"`vision_token_grids` has shape {tuple(grids.shape)}: give (rows, columns) of each image, shape "
                "(num_images, 2)."
            )
        num_images = len(grids) if num_images is None else num_images
        grids = [tuple(grid) for grid in grids.tolist()]
        return resolve_vision_token_grids(grids, num_images, config.patch_grid, "vision_token_grids")
    if not num_images:
        return []
    row_counts = (inputs["input_ids"] == config.image_token_id).sum(-1).tolist()
    count, remainder = divmod(sum(row_counts), num_images)
    if remainder or count == 0 or any(row_count % count for row_count in row_counts):
        raise ValueError(
            f"Image features and image tokens do not match: the rows hold {row_counts} image tokens for {num_images} "
            "images, which is no uniform count per image. Pass `vision_token_grids` as the processor returns it."
        )
    grid = resolve_vision_token_grid(count, config.patch_grid, "image tokens per image in `input_ids`")
    return [grid] * num_images


def asked_grids(inputs: Mapping, num_vision_tokens, num_images: int, config) -> list[tuple[int, int]]:
    """Resolves a count to a grid per image, by the inputs' shapes and tiles; arguments as for [`at_count`]."""
    shapes = ("image_shapes", "num_tiles")
    shapes = {name: torch.as_tensor(inputs[name]).tolist() for name in shapes if inputs.get(name) is not None}
    return resolve_vision_token_grids(num_vision_tokens, num_images, config.patch_grid, **shapes)


def count_images(inputs: Mapping) -> int | None:
    """Counts the rows of `pixel_values`, of kept features or, if images appear repeatedly, of `image_indices`."""
    kept = (inputs.get("mm_encoder_outputs") or {}).get("image")
    given = (inputs.get("image_indices"), inputs.get("pixel_values"), kept and kept.last_hidden_state)
    return next((len(images) for images in given if images is not None), None)


def first_placeholders(
    input_ids: torch.LongTensor, grids: Sequence[tuple[int, int]], image_token_id: int
) -> torch.LongTensor:
    """
    Finds the beginning of each image's run of placeholders.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): The prompts.
        grids (sequence of `tuple[int, int]`): (rows, columns) of each image, as encoded.
        image_token_id (`int`): The placeholder's id.

    Returns:
        `torch.LongTensor` of shape `(num_images,)`: Positions in the flattened `input_ids`.

    Raises:
        ValueError: If the placeholders are not such runs, each unbroken and within one row.
    """
    length = input_ids.shape[-1]
    counts = torch.tensor([rows * columns for rows, columns in grids], dtype=torch.long, device=input_ids.device)
    placeholders = (input_ids == image_token_id).flatten().nonzero().squeeze(-1)
    ends = counts.cumsum(0)
    if int(counts.sum()) == len(placeholders):
        first, last = placeholders[ends - counts], placeholders[ends - 1]
        if ((last - first + 1 == counts) & (first // length == last // length)).all():
            return first
    encoded = f"its {len(counts)} images were encoded as {counts.tolist()} tokens in unbroken runs"
    raise ValueError(
        f"Image features and image tokens do not match: `input_ids` holds {len(placeholders)} image tokens, but "
        f"{encoded if len(counts) else 'there are no images: pass `pixel_values`'}."
    )


def rewrite_runs(
    inputs: dict, first: torch.LongTensor, grids: list[tuple[int, int]], image_token_id: int, pad_token_id: int | None
) -> dict:
    """Gives the run that begins at each `first` position the length of its new grid."""
    input_ids, attention_mask = inputs["input_ids"], inputs.get("attention_mask")
    (batch_size, length), device = input_ids.shape, input_ids.device
    if attention_mask is None and pad_token_id is not None:
        attention_mask = (input_ids != pad_token_id).long()
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` of shape {tuple(attention_mask.shape)} cannot be re-counted: give one of the shape of "
            f"`input_ids`, {tuple(input_ids.shape)}."
        )
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()

    # Every position is copied once, the first placeholder of an image as often as its new count, padding never.
    copies = ((mask.cumsum(-1) > 0) & (mask.flip(-1).cumsum(-1).flip(-1) > 0)).long().flatten()
    copies[(input_ids == image_token_id).flatten()] = 0
    copies[first] = torch.tensor([rows * columns for rows, columns in grids], device=device)
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

    rewritten = {name: value for name, value in inputs.items() if name != "position_ids"}
    rewritten["input_ids"] = rewrite(input_ids, 0 if pad_token_id is None else pad_token_id)
    if inputs.get("attention_mask") is None and (attention_mask is not None or new_length * batch_size != len(source)):
        rewritten["attention_mask"] = mask
    for name, fill in SEQUENCE_FILL_VALUES.items():
        if rewritten.get(name) is not None:
            rewritten[name] = rewrite(rewritten[name], fill)
    return rewritten
