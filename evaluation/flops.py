"""Floating-point operations to the first token, of the vision tower too, without running or loading a model."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

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
    model = _without_weights(config)
    pixel_values = torch.zeros(1, config.vision_config.num_channels, *config.image_size, device="meta")
    with _counter() as counter:
        tokens = model.get_image_features(pixel_values, num_vision_tokens, image_size=image_size).pooler_output
    return Flops(counter.get_total_flops(), _count_reading(model, tokens.shape[1] + text_tokens))


def choosing_flops(config, choices: Sequence[int | str], text_tokens: int = 32) -> dict[int | str, int]:
    """
    Counts what choosing and answering cost together: `"auto"` reads a prompt's text once before any image is seen.

    Args:
        config ([`TokenFlexConfig`]): The model's configuration.
        choices (`Sequence[int | str]`): The choices.
        text_tokens (`int`, *optional*, defaults to 32): Tokens of the prompt beside the image's.

    Returns:
        `dict[int | str, int]`: Floating-point operations to the first token where each is chosen.
    """
    reading = _count_reading(_without_weights(config), text_tokens)
    return {choice: reading + count_flops(config, choice, text_tokens).total for choice in choices}


def _without_weights(config) -> TokenFlexModel:
    config = copy.deepcopy(config)
    config._attn_implementation = "sdpa"  # others ask for a device that computes
    with torch.device("meta"):
        return TokenFlexModel(config).eval()


@contextmanager
def _counter() -> Iterator[FlopCounterMode]:
    # The fused attention of CPUs is not counted, the plain one is.
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
        torch.device("meta"),
    ):
        yield counter


def _count_reading(model: TokenFlexModel, length: int) -> int:
    """Operations of the language model that reads that many tokens."""
    with _counter() as counter:
        inputs_embeds = torch.zeros(1, length, model.config.text_config.hidden_size)
        mask = torch.ones(1, 1, length, length, dtype=torch.bool)
        model.language_model(inputs_embeds=inputs_embeds, attention_mask=mask, use_cache=False)
    return counter.get_total_flops()
