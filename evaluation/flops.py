"""Floating-point operations to the first token, of the vision tower too, without running or loading a model."""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..choices_tokenflex import sort_choices
from ..modeling_tokenflex import TokenFlexModel


class Flops(NamedTuple):
    """
    Args:
        vision (`int`): Of the vision tower, pooling and the connector.
        language (`int`): Of the language model, its head left out.
    """

    vision: int
    language: int

    @property
    def total(self) -> int:
        """`int`: Both together."""
        return self.vision + self.language


def count_flops(
    config, num_vision_tokens: int | tuple[int, int] | str, text_tokens: int = 32, image_size: int | None = None
) -> Flops:
    """
    Counts the floating-point operations that one image and its question cost up to the first token of the answer, as
    [`~TokenFlexProcessor.count_vision_tokens`] counts its tokens: from shapes alone, by torch's counter. Attention
    counts all pairs of tokens, as a plain product does.

    Args:
        config ([`TokenFlexConfig`]): The model's configuration.
        num_vision_tokens (`int`, `tuple[int, int]` or `str`): A count or grid, also with a resolution (`"64@224"`).
        text_tokens (`int`, *optional*, defaults to 32): Tokens of the prompt beside the image's.
        image_size (`int` or `tuple[int, int]`, *optional*): The resolution in pixels.

    Returns:
        [`Flops`]

    Raises:
        ValueError: If the count or resolution is not allowed.

    Example:

    ```python
    >>> from tokenflex.evaluation.flops import count_flops
    >>> from tokenflex.towers.tiny import tiny_model_and_processor

    >>> model, _ = tiny_model_and_processor()
    >>> full, small = (count_flops(model.config, choice).vision for choice in (16, "16@32"))
    >>> round(full / small, 1)
    4.0
    ```
    """
    config = copy.deepcopy(config)
    config._attn_implementation = "sdpa"  # others ask for a device that computes
    with torch.device("meta"):
        model = TokenFlexModel(config).eval()
        pixel_values = torch.zeros(1, config.vision_config.num_channels, *config.image_size)
        # The fused attention of CPUs is not counted, the plain one is.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            tokens = model.get_image_features(pixel_values, num_vision_tokens, image_size=image_size).pooler_output
            vision = counter.get_total_flops()
            length = tokens.shape[1] + text_tokens
            inputs_embeds = torch.zeros(1, length, tokens.shape[2])
            mask = torch.ones(1, 1, length, length, dtype=torch.bool)
            model.language_model(inputs_embeds=inputs_embeds, attention_mask=mask, use_cache=False)
    return Flops(vision, counter.get_total_flops() - vision)


def choosing_flops(config, choices: Sequence[int | str], text_tokens: int = 32) -> dict[int | str, int]:
    """
    Counts what choosing and answering cost together: `"auto"` reads a question at the smallest choice, and the image
    is not seen again where the chosen resolution is the same.

    Args:
        config ([`TokenFlexConfig`]): The model's configuration.
        choices (`Sequence[int | str]`): The choices.
        text_tokens (`int`, *optional*, defaults to 32): Tokens of the prompt beside the image's.

    Returns:
        `dict[int | str, int]`: Floating-point operations to the first token where each is chosen.
    """
    smallest = sort_choices(config.vision_token_choices)[0]
    read, seen = count_flops(config, smallest, text_tokens).total, config.resolutions_for([smallest])
    costs = {choice: count_flops(config, choice, text_tokens) for choice in choices}
    return {
        choice: read + (cost.language if config.resolutions_for([choice]) == seen else cost.total)
        for choice, cost in costs.items()
    }
