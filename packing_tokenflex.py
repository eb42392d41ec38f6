"""Several samples in one row, and several continuations behind one prefix: their positions and what they may see."""

from collections.abc import Callable

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_masks_for_generate


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
    >>> packed_position_ids(sample_ids=torch.tensor([[0, 0, 0, 1, 1, -1]])).tolist()
    [[0, 1, 2, 0, 1, 0]]
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
    What a position may see beside the causal rule, in the form that transformers' mask functions take: its own sample,
    and in it the shared prefix and its own continuation. Arguments as in [`packed_position_ids`].
    """

    def same_sample(batch, head, query, key):
        return sample_ids[batch, key] == sample_ids[batch, query]

    def prefix_or_own(batch, head, query, key):
        return (segment_ids[batch, key] == 0) | (segment_ids[batch, key] == segment_ids[batch, query])

    if sample_ids is None:
        return prefix_or_own
    if segment_ids is None:
        return same_sample
    return lambda *position: same_sample(*position) & prefix_or_own(*position)


def create_packed_masks(
    config: PreTrainedConfig,
    inputs_embeds: torch.FloatTensor,
    attention_mask: torch.Tensor,
    segment_ids: torch.LongTensor | None = None,
    sample_ids: torch.LongTensor | None = None,
):
    """
    The masks of a language model's layers, in which positions see what [`packed_mask_function`] says.

    Args:
        config (`PreTrainedConfig`): The language model's.
        inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`): For shape and dtype.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): 0 for padding.
        segment_ids, sample_ids: As in [`packed_position_ids`].

    Returns:
        What [`~transformers.masking_utils.create_masks_for_generate`] does: a mask, or one for each type of layer.
    """
    may_see = packed_mask_function(segment_ids, sample_ids)
    arguments = {"config": config, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
    if config._attn_implementation == "flex_attention":
        return create_masks_for_generate(past_key_values=None, and_mask_function=may_see, **arguments)
    # Dense masks are intersected here: handed over as above, the function would be mapped over every position.
    index = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
    rows = torch.arange(inputs_embeds.shape[0], device=inputs_embeds.device)
    seen = may_see(rows[:, None, None, None], None, index[:, None], index)

    def intersect(mask: torch.Tensor | None) -> torch.Tensor:
        if mask is None:  # plain causal
            return seen & (index <= index[:, None])
        return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)

    masks = create_masks_for_generate(past_key_values=None, **arguments)
    return {name: intersect(mask) for name, mask in masks.items()} if isinstance(masks, dict) else intersect(masks)


__all__ = ["create_packed_masks", "packed_mask_function", "packed_position_ids"]
