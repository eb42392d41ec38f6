"""Several samples of a batch in one row, so that little of it is padding."""

from collections.abc import Sequence

import torch

from ..placeholders_tokenflex import SEQUENCE_FILL_VALUES, first_placeholders


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """
    Puts items into as few bins as first-fit-decreasing finds.

    Args:
        lengths (`Sequence[int]`): The items' lengths, none above `capacity`.
        capacity (`int`): The size of a bin.

    Returns:
        `list[list[int]]`: The items of each bin.

    Example:

    ```python
    >>> from tokenflex.training.packing import first_fit

    >>> first_fit([3, 7, 5, 4], capacity=8)
    [[1], [2, 0], [3]]
    ```
    """
    bins, free = [], []
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        place = next((place for place, room in enumerate(free) if room >= lengths[item]), len(bins))
        if place == len(bins):
            bins.append([])
            free.append(capacity)
        bins[place].append(item)
        free[place] -= lengths[item]
    return bins


def plan_rows(lengths: Sequence[int]) -> list[list[int]]:
    """
    The rows that samples are packed into: of several capacities, from the longest sample to twice that, the one that
    leaves the fewest positions in all.

    Args:
        lengths (`Sequence[int]`): The samples' lengths.

    Returns:
        `list[list[int]]`: The samples of each row.

    Example:

    ```python
    >>> from tokenflex.training.packing import plan_rows

    >>> plan_rows([8, 5, 5, 5])  # 2 rows of 13 rather than 4 of 8
    [[0, 1], [2, 3]]
    ```
    """
    longest = max(lengths)

    def size(rows: list[list[int]]) -> int:
        return len(rows) * max(sum(lengths[sample] for sample in members) for members in rows)

    return min((first_fit(lengths, longest * quarters // 4) for quarters in range(4, 9)), key=size)


def stack_rows(batches: Sequence[dict[str, torch.Tensor]], pad_token_id: int | None = None) -> dict[str, torch.Tensor]:
    """
    Puts the rows of several re-counts of one batch below each other; images stay single, and `image_indices` says
    which of them each run of placeholders shows.

    Args:
        batches (`Sequence[dict[str, torch.Tensor]]`): Re-counts of one batch by [`at_count`], padded right.
        pad_token_id (`int`, *optional*): The id that pads `input_ids`.
    """
    length = max(batch["input_ids"].shape[1] for batch in batches)
    fills = {"input_ids": pad_token_id or 0, **SEQUENCE_FILL_VALUES}
    stacked = {key: value for key, value in batches[0].items() if key not in ("image_shapes", "num_tiles")}
    for key, fill in fills.items():
        if key in stacked:
            stacked[key] = torch.cat([
                torch.nn.functional.pad(batch[key], (0, length - batch[key].shape[1]), value=fill) for batch in batches
            ])  # fmt: skip
    stacked["vision_token_grids"] = torch.cat([batch["vision_token_grids"] for batch in batches])
    if any("image_resolutions" in batch for batch in batches):
        of_counts = torch.zeros_like(batches[0]["vision_token_grids"])
        stacked["image_resolutions"] = torch.cat([batch.get("image_resolutions", of_counts) for batch in batches])
    grids = batches[0]["vision_token_grids"]
    stacked["image_indices"] = torch.arange(len(grids), device=grids.device).repeat(len(batches))
    return stacked


def pack_rows(
    batch: dict[str, torch.Tensor],
    image_token_id: int,
    pad_token_id: int | None = None,
    one_row: bool = False,
) -> tuple[dict[str, torch.Tensor], torch.LongTensor]:
    """
    Moves a batch's rows together ([`plan_rows`]), so that little is padding. Samples keep apart: `sample_ids` gives
    each its own positions and attention, and `image_indices` its own images. A batch that nothing is gained by comes
    back as it is.

    Args:
        batch (`dict[str, torch.Tensor]`): A collator's batch.
        image_token_id (`int`): The placeholder's id.
        pad_token_id (`int`, *optional*): The id that pads `input_ids`.
        one_row (`bool`, *optional*, defaults to `False`):
            Put all samples into a single row without padding, told apart by `position_ids` that begin anew, the form
            in which flash attention keeps them apart without a mask.

    Returns:
        `tuple[dict[str, torch.Tensor], torch.LongTensor]`: The packed batch, and the row that each position came from,
        of the shape of its `input_ids`, -1 for padding.

    Raises:
        ValueError: If `one_row` is asked for and a row's questions share their image.
    """
    input_ids = batch["input_ids"]
    device, length = input_ids.device, input_ids.shape[1]
    if one_row and batch.get("segment_ids") is not None:
        raise ValueError(
            "Flash attention takes no mask that keeps several questions behind one image apart: give each question a "
            "row of its own, or load the model with `attn_implementation`='sdpa'."
        )
    mask = batch["attention_mask"].bool()
    lengths = mask.sum(-1).tolist()
    rows = [list(range(len(lengths)))] if one_row else plan_rows(lengths)
    if len(rows) == len(lengths) and not one_row:
        return batch, torch.where(mask, torch.arange(len(lengths), device=device)[:, None], -1)
    order = [row for members in rows for row in members]
    width = max(sum(lengths[row] for row in members) for members in rows)

    kept = mask.flatten().nonzero().squeeze(-1).split(lengths)
    source = torch.cat([kept[row] for row in order])
    starts, samples = [], []
    for line, members in enumerate(rows):
        start = line * width
        for number, row in enumerate(members):
            starts.append(torch.arange(start, start + lengths[row]))
            samples.append(torch.full((lengths[row],), number))
            start += lengths[row]
    target = torch.cat(starts).to(device)

    def moved(values: torch.Tensor, fill: int) -> torch.Tensor:
        flat = values.new_full((len(rows) * width,), fill)
        flat[target] = values
        return flat.view(len(rows), width)

    packed = {key: value for key, value in batch.items() if key not in ("image_shapes", "num_tiles", "position_ids")}
    for key, fill in {"input_ids": pad_token_id or 0, **SEQUENCE_FILL_VALUES}.items():
        if batch.get(key) is not None:
            packed[key] = moved(batch[key].flatten()[source], fill)
    if one_row:
        packed["position_ids"] = torch.cat([torch.arange(lengths[row]) for row in order]).to(device)[None]
        del packed["attention_mask"]
    else:
        packed["sample_ids"] = moved(torch.cat(samples).to(device), -1)
    if batch.get("vision_token_grids") is not None:
        first = first_placeholders(input_ids, batch["vision_token_grids"].tolist(), image_token_id)
        of_row = {row: [] for row in order}
        for image, row in enumerate((first // length).tolist()):
            of_row[row].append(image)
        appearances = torch.tensor([image for row in order for image in of_row[row]], device=device)
        for key in ("vision_token_grids", "image_resolutions"):
            if batch.get(key) is not None:
                packed[key] = batch[key][appearances]
        images = batch.get("image_indices")
        packed["image_indices"] = appearances if images is None else images[appearances]
    return packed, moved(source // length, -1)
