"""Several samples in one row, and several continuations behind one prefix: their positions and masks."""

from collections.abc import Callable

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import and_masks, create_masks_for_generate


def packed_position_ids(
    segment_ids: torch.LongTensor | None = None, sample_ids: torch.LongTensor | None = None
) -> torch.LongTensor:
    """
    The positions that every sample, and every continuation within it, would have alone.

    Args:
        segment_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Within a sample, 0 for the shared prefix, 1, 2, ... for each continuation; -1 for padding. Each stands in
            one unbroken run, the prefix first. Without it a sample is all prefix.
        sample_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            0, 1, ... for each sample of a row, each in one unbroken run; -1 for padding. Without it a row is a sample.

    Returns:
        `torch.LongTensor` of shape `(batch_size, sequence_length)`.

    Example:

    ```python
    >>> import torch
    >>> from tokenflex.packing_tokenflex import packed_position_ids

    >>> packed_position_ids(torch.tensor([[0, 0, 1, 1, 2, 2, -1]])).tolist()
    [[0, 1, 2, 3, 2, 3, 0]]
    ```
    """
    given = segment_ids if segment_ids is not None else sample_ids
    segment_ids = torch.zeros_like(given) if segment_ids is None else segment_ids
    sample_ids = torch.zeros_like(given) if sample_ids is None else sample_ids
    index = torch.arange(given.shape[1], device=given.device).expand_as(given)
    new_sample = torch.ones_like(given, dtype=torch.bool)
    new_sample[:, 1:] = sample_ids[:, 1:] != sample_ids[:, :-1]
    new_run = new_sample.clone()
    new_run[:, 1:] |= segment_ids[:, 1:] != segment_ids[:, :-1]
    sample_start = torch.where(new_sample, index, 0).cummax(-1).values
    run_start = torch.where(new_run, index, 0).cummax(-1).values
    in_prefix = (segment_ids == 0).long()
    seen_prefix = in_prefix.cumsum(-1)
    prefix_length = seen_prefix - (seen_prefix - in_prefix).gather(1, sample_start)
    return index - run_start + (segment_ids > 0) * prefix_length


def packed_mask_function(
    segment_ids: torch.LongTensor | None = None, sample_ids: torch.LongTensor | None = None
) -> Callable[..., torch.Tensor]:
    """
    Restricts beyond the causal rule what a position sees, as transformers' mask functions do: to its own sample, and
    in it to the shared prefix and its own continuation. Arguments as in [`packed_position_ids`].
    """

    def same_sample(batch, head, query, key):
        return sample_ids[batch, key] == sample_ids[batch, query]

    def prefix_or_own(batch, head, query, key):
        return (segment_ids[batch, key] == 0) | (segment_ids[batch, key] == segment_ids[batch, query])

    rules = ((same_sample, sample_ids), (prefix_or_own, segment_ids))
    return and_masks(*(rule for rule, ids in rules if ids is not None))


def create_packed_masks(
    config: PreTrainedConfig,
    inputs_embeds: torch.FloatTensor,
    attention_mask: torch.Tensor,
    segment_ids: torch.LongTensor | None = None,
    sample_ids: torch.LongTensor | None = None,
):
    """
    Makes the masks of a language model's layers, in which positions see what [`packed_mask_function`] says: a mask, or
    one for each type of layer. Arguments as in [`pack_attention`].
    """
    may_see = packed_mask_function(segment_ids, sample_ids)
    inputs = (config, inputs_embeds, attention_mask, None)  # the last is a cache
    if config._attn_implementation == "flex_attention":
        return create_masks_for_generate(*inputs, and_mask_function=may_see)
    # Dense masks are intersected here: handed over as above, the function would be mapped over every position.
    index = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
    rows = torch.arange(inputs_embeds.shape[0], device=inputs_embeds.device)
    seen = may_see(rows[:, None, None, None], None, index[:, None], index)

    def intersect(mask: torch.Tensor | None) -> torch.Tensor:
        if mask is None:  # plain causal
            return seen & (index <= index[:, None])
        return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)

    masks = create_masks_for_generate(*inputs)
    return {name: intersect(mask) for name, mask in masks.items()} if isinstance(masks, dict) else intersect(masks)


def pack_attention(
    config: PreTrainedConfig,
    inputs_embeds: torch.FloatTensor,
    attention_mask: torch.Tensor | None = None,
    segment_ids: torch.LongTensor | None = None,
    sample_ids: torch.LongTensor | None = None,
):
    """
    Makes the masks and positions of packed rows, for language models that can keep segments apart.

    Args:
        config (`PreTrainedConfig`): The language model's.
        inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`): For shape and dtype.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            0 for padding. Defaults to the padding of the ids.
        segment_ids, sample_ids: As in [`packed_position_ids`].

    Returns:
        `tuple`: The masks, and positions of shape `(batch_size, sequence_length)`.

    Raises:
        ValueError: If the attention implementation or a kind of layer cannot keep segments apart.
    """
    implementation = config._attn_implementation or ""
    if "flash" in implementation:
        raise ValueError(
            f"`attn_implementation`={implementation!r} takes no mask that keeps segments of a row apart: load "
            "the model with 'sdpa', 'eager' or 'flex_attention', or give each question a row of its own."
        )
    layer_types, length = set(getattr(config, "layer_types", None) or ()), inputs_embeds.shape[1]
    windowed = layer_types & {"sliding_attention", "chunked_attention"}
    if unmasked := sorted(layer_types - windowed - {"full_attention"}):
        raise ValueError(
            f"The language model's layers of type {', '.join(unmasked)} carry a state from one segment of a row "
            "into the next: give each question a row of its own, and do not pack."
        )
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    window = min((size for size in windows if size), default=length)
    if segment_ids is not None and windowed and length > window:
        raise ValueError(
            f"Rows of {length} tokens are longer than the attention window of {window}, which "
            "counts the segments that stand between a segment and its prefix: give each question a row of its own."
        )
    if attention_mask is None:
        attention_mask = (segment_ids if segment_ids is not None else sample_ids) >= 0
    masks = create_packed_masks(config, inputs_embeds, attention_mask, segment_ids, sample_ids)
    return masks, packed_position_ids(segment_ids, sample_ids)
