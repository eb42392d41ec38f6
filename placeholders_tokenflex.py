"""Placeholders of images in prompts: finding them, and taking encoded inputs to other vision-token counts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .choices_tokenflex import format_size, resolve_vision_token_grid, resolve_vision_tokens


# The value of new positions in a re-counted or re-padded row, per tensor that runs along the sequence.
SEQUENCE_FILL_VALUES = {
    "attention_mask": 0,
    "labels": -100,
    "mm_token_type_ids": 0,
    "token_type_ids": 0,
    "segment_ids": -1,
    "sample_ids": -1,
}


@dataclass
class TokenFlexImageOutput(BaseModelOutputWithPooling):
    """
    Args:
        vision_token_grids (`list[tuple[int, int]]`):
            (rows, columns) of each image.
        image_resolutions (`list[tuple[int, int]]`):
            (height, width) in pixels at which the vision tower saw each image.
    """

    vision_token_grids: list[tuple[int, int]] | None = None
    image_resolutions: list[tuple[int, int]] | None = None


def at_count(
    inputs: Mapping,
    num_vision_tokens: int | tuple[int, int] | str | list | None,
    config,
    pad_token_id: int | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> dict:
    """
    Takes encoded inputs to other vision-token counts, as if they had been encoded so in the first place: each image's
    run of placeholders gets its new length in every tensor that runs along the sequence, and rows are padded again on
    the side they were padded on. Pixels stay as they are; the model shrinks them.

    Args:
        inputs (`Mapping`):
            The output of a processor or collator: `input_ids` of shape `(batch_size, sequence_length)` and, where they
            are there, `attention_mask`, `labels`, `mm_token_type_ids`, `token_type_ids`, `segment_ids`, `sample_ids`,
            `vision_token_grids` and `image_resolutions` of shape `(num_images, 2)` as encoded, `image_shapes` and
            `num_tiles`. Without grids, the uniform count that the placeholders imply is taken. Kept features, in
            `mm_encoder_outputs`, are pooled where they are used. `position_ids` are dropped, other entries kept.
        num_vision_tokens (`int`, `tuple[int, int]`, `str` or a list of these, *optional*):
            A count n*n or grid (rows, columns) for all images, or a list with one per image (or tile), each also with
            a resolution (`"64@224"`). With `image_shapes`, an integer is matched to each image's shape. `None` keeps
            the counts as encoded.
        config ([`TokenFlexConfig`] or [`TokenFlexProcessor`]):
            The model's or the processor's: their `image_token_id` and `patch_grid` are read.
        pad_token_id (`int`, *optional*):
            The id that pads `input_ids`, by which padding is known where no `attention_mask` is given. Defaults to 0
            for new padding, which the mask hides.
        image_size (`int` or `tuple[int, int]`, *optional*):
            The resolution in pixels that the vision tower is to see all images at.

    Returns:
        `dict`: New tensors, with `vision_token_grids` if there are images, and `image_resolutions` if a resolution was
        asked for; the caller's are left as they were.

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
    grids, resolutions = encoded, encoded_resolutions(inputs, len(encoded), config)
    if num_vision_tokens is not None or image_size is not None:
        asked = list(encoded) if num_vision_tokens is None else num_vision_tokens
        grids, resolutions = asked_grids(inputs, asked, len(encoded), config, image_size)
    first = first_placeholders(inputs["input_ids"], encoded, config.image_token_id)
    recounted = dict(inputs)
    if grids != encoded:
        recounted = rewrite_runs(recounted, first, grids, config.image_token_id, pad_token_id)
    if grids:
        recounted["vision_token_grids"] = torch.tensor(grids, device=inputs["input_ids"].device)
    recounted.pop("image_resolutions", None)
    if any(resolutions):
        sizes = [resolution or (0, 0) for resolution in resolutions]
        recounted["image_resolutions"] = torch.tensor(sizes, device=inputs["input_ids"].device)
    if kept := kept_features(inputs):
        unpooled = [
            TokenFlexImageOutput(output.last_hidden_state, image_resolutions=output.get("image_resolutions"))
            for output in kept
        ]
        is_list = isinstance(inputs["mm_encoder_outputs"]["image"], (list, tuple))
        recounted["mm_encoder_outputs"] = {
            **inputs["mm_encoder_outputs"],
            "image": unpooled if is_list else unpooled[0],
        }
    return recounted


def kept_features(inputs: Mapping) -> list[TokenFlexImageOutput]:
    """
    Lists what `mm_encoder_outputs` keeps of a prompt's images: outputs of `get_image_features` that each hold all of
    them, at different resolutions.
    """
    kept = (inputs.get("mm_encoder_outputs") or {}).get("image")
    return list(kept) if isinstance(kept, (list, tuple)) else [] if kept is None else [kept]


def encoded_resolutions(inputs: Mapping, num_images: int, config) -> list[tuple[int, int] | None]:
    """
    Reads the resolution that was asked for with each image, arguments as for [`at_count`]: `image_resolutions` if
    given, where (0, 0) is none.

    Raises:
        ValueError: If they differ from the images in number, or one is not allowed.
    """
    resolutions = inputs.get("image_resolutions")
    if resolutions is None:
        return [None] * num_images
    resolutions = torch.as_tensor(resolutions)
    if resolutions.shape != (num_images, 2):
        raise ValueError(
            f"`image_resolutions` has shape {tuple(resolutions.shape)} for {num_images} images: give (height, width) "
            "of each in pixels, (0, 0) for the one that goes with its count."
        )
    resolutions = [tuple(size) if any(size) else None for size in resolutions.tolist()]
    for resolution in dict.fromkeys(resolutions):
        if resolution is not None:
            config.patch_grid_at(resolution, f"`image_resolutions`={format_size(resolution)}")
    return resolutions


def seen_resolutions(inputs: Mapping, config) -> list[tuple[int, int]]:
    """
    Finds the resolution that the vision tower sees each image at: the one that was asked for, else the one that goes
    with its grid.

    Args:
        inputs (`Mapping`): As for [`at_count`], with `vision_token_grids`.
        config ([`TokenFlexConfig`]): The model's configuration.

    Returns:
        `list[tuple[int, int]]`: (height, width) in pixels.
    """
    grids = encoded_grids(inputs, config)
    sizes = encoded_resolutions(inputs, len(grids), config)
    return [size or config.resolution_for(grid) for size, grid in zip(sizes, grids)]


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
        return resolve_vision_tokens(grids, num_images, config, "vision_token_grids")[0]
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


def asked_grids(inputs: Mapping, num_vision_tokens, num_images: int, config, image_size=None) -> tuple[list, list]:
    """
    Resolves a choice to a grid and resolution per image, by the inputs' shapes and tiles, as
    [`resolve_vision_tokens`] does; arguments as for [`at_count`].
    """
    shapes = ("image_shapes", "num_tiles")
    shapes = {name: torch.as_tensor(inputs[name]).tolist() for name in shapes if inputs.get(name) is not None}
    return resolve_vision_tokens(num_vision_tokens, num_images, config, image_size=image_size, **shapes)


def count_images(inputs: Mapping) -> int | None:
    """Counts the rows of `pixel_values`, of kept features or, if images appear repeatedly, of `image_indices`."""
    features = [kept.last_hidden_state for kept in kept_features(inputs)]
    given = (inputs.get("image_indices"), inputs.get("pixel_values"), *features)
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
