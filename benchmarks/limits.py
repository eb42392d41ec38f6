"""
The limit beside a measured figure: floating-point operations and bytes counted from the shapes of a model, the rates
that this machine reaches in a bare matrix product and a bare copy, and the time that follows from both.

Operations are those of matrix products, convolutions and attention, two for a multiplication and an addition. Norms,
activations, rotary embeddings and softmax are left out: at the usual sizes they are less than one percent. Attention
is counted as far as it is needed: all pairs of patches in the tower, and in the language model, whose layers are all
taken to see the whole prompt, the `length * (length + 1) / 2` pairs of a token and itself or one before it. A kernel
that works through the whole square does twice that.

Bytes are what has to pass through memory at the least: weights once, what goes in and what has to be kept. Activations
between two operations are left out, since a fused kernel would not write them.
"""

import math
from dataclasses import dataclass

import torch
from rates import Rates, measure_rates  # noqa: F401
from transformers import AutoModel, AutoModelForImageTextToText, PreTrainedConfig

from tokenflex import TokenFlexConfig
from tokenflex.choices_tokenflex import resolve_vision_token_grid
from tokenflex.configuration_tokenflex import count_prefix_tokens


_NUM_WEIGHTS = {}  # by configuration, since large models take a while to lay out


@dataclass(frozen=True)
class Work:
    """
    The work of a piece of a model. Works add up, and multiply by a number.

    Args:
        flops (`float`): Floating-point operations.
        bytes (`float`): Bytes read from memory and written to it.

    Example:

    ```python
    >>> from limits import Work

    >>> 2 * (Work(flops=3, bytes=1) + Work(flops=1, bytes=1))
    Work(flops=8, bytes=4)
    ```
    """

    flops: float = 0
    bytes: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, number: float) -> "Work":
        return Work(number * self.flops, number * self.bytes)

    __rmul__ = __mul__


def limit_seconds(work: Work, rates: Rates) -> float:
    """
    The seconds below which the work cannot be done at these rates: those of its operations or those of its bytes,
    whichever are more. The limit of parts that run one after the other is the sum of their limits. What fits a
    processor's cache is not read from memory, so that small models can stay below it.

    Args:
        work ([`Work`]): The work.
        rates ([`Rates`]): The machine's.
    """
    return max(work.flops / rates.flops_per_second, work.bytes / rates.bytes_per_second)


def tower_work(vision_config: PreTrainedConfig, num_images: int, bytes_per_value: int) -> Work:
    """
    A vision transformer as SigLIP, CLIP or ViT, from pixels to patch features, without a pooling head. Its bytes are
    the weights, the pixels and the features.

    Args:
        vision_config (`PreTrainedConfig`): The tower's configuration.
        num_images (`int`): Number of images it encodes.
        bytes_per_value (`int`): Of weights, pixels and features.
    """
    flops = num_images * (_patch_flops(vision_config) + _encoder_flops(vision_config))
    values = _num_weights(vision_config) + num_images * (_num_pixels(vision_config) + _num_features(vision_config))
    return Work(flops, bytes_per_value * values)


def projector_work(
    config: TokenFlexConfig, num_images: int, num_vision_tokens: int | tuple[int, int], bytes_per_value: int
) -> Work:
    """
    TokenFLEX's projector: two pooling matrices, rows first, none where the whole patch grid is kept; then SwiGLU. Its
    bytes are the weights, the patch features and the vision tokens.

    Args:
        config ([`TokenFlexConfig`]): The model's configuration.
        num_images (`int`): Number of images that are pooled.
        num_vision_tokens (`int` or `tuple[int, int]`): Count or grid of each image.
        bytes_per_value (`int`): Of weights and activations.
    """
    count = math.prod(_grid(config, num_vision_tokens))
    values = num_images * (_num_features(config.vision_config) + count * config.text_config.hidden_size)
    flops = num_images * sum(_projector_flops(config, num_vision_tokens))
    return Work(flops, bytes_per_value * (_projector_weights(config) + values))


def prefill_work(
    text_config: PreTrainedConfig, batch_size: int, length: int, bytes_per_value: int, num_logits: int = 1
) -> Work:
    """
    A decoder with grouped-query attention and a gated MLP that reads prompts, without padding. Its bytes are the
    weights of layers, norms and head, the prompts' embeddings, keys and values, and the logits.

    Args:
        text_config (`PreTrainedConfig`): The language model's configuration.
        batch_size (`int`): Number of prompts.
        length (`int`): Tokens of each, vision tokens included.
        bytes_per_value (`int`): Of weights and activations.
        num_logits (`int`, *optional*, defaults to 1): For how many tokens of each prompt the head is applied.
    """
    values = length * text_config.hidden_size + num_logits * text_config.vocab_size
    return Work(
        batch_size * _decoder_flops(text_config, length, length * (length + 1) // 2, num_logits),
        bytes_per_value * (_decoder_weights(text_config) + batch_size * values)
        + cache_bytes(text_config, batch_size, length, bytes_per_value),
    )


def decode_work(text_config: PreTrainedConfig, batch_size: int, context: int, bytes_per_value: int) -> Work:
    """
    One step of decoding: a token for each row. Its bytes are the weights of layers, norms and head, the cache with the
    new token's part, and the embeddings and logits of one token.

    Args:
        text_config (`PreTrainedConfig`): The language model's configuration.
        batch_size (`int`): Number of rows.
        context (`int`): Tokens of each row in the cache before the step.
        bytes_per_value (`int`): Of weights, cache and activations.
    """
    values = text_config.hidden_size + text_config.vocab_size
    return Work(
        batch_size * _decoder_flops(text_config, 1, context + 1, 1),
        bytes_per_value * (_decoder_weights(text_config) + batch_size * values)
        + cache_bytes(text_config, batch_size, context + 1, bytes_per_value),
    )


def training_work(
    config: TokenFlexConfig,
    batch_size: int,
    num_images: int,
    num_vision_tokens: int | tuple[int, int],
    text_tokens: int,
    bytes_per_value: int,
    is_tower_frozen: bool = True,
) -> Work:
    """
    Forward and backward pass of one step with logits for every token, without padding, recomputation or the optimizer.
    A trained matrix costs three times its forward pass, the products with its gradient and its input's; the first
    trained ones have no gradient to hand on, so that they cost twice: the projector's gate and up behind a frozen
    tower, else the patch embedding. Pooling has nothing to train: once behind a frozen tower, else twice. Bytes are
    the weights, read in both passes, the gradients written, and the pixels; of a frozen tower what [`tower_work`]
    counts.

    Args:
        config ([`TokenFlexConfig`]): The model's configuration.
        batch_size (`int`): Number of samples.
        num_images (`int`): Images of each sample.
        num_vision_tokens (`int` or `tuple[int, int]`): Count or grid of each image.
        text_tokens (`int`): Tokens of each sample beside its vision tokens.
        bytes_per_value (`int`): Of weights, gradients and activations.
        is_tower_frozen (`bool`, *optional*, defaults to `True`): Whether to run the tower forward only.
    """
    vision, text = config.vision_config, config.text_config
    length = num_images * math.prod(_grid(config, num_vision_tokens)) + text_tokens
    pooling, widening, narrowing = _projector_flops(config, num_vision_tokens)
    trained = 3 * (_projector_weights(config) + _decoder_weights(text))
    if not config.tie_word_embeddings:
        trained += (
            text.vocab_size * text.hidden_size
        )  # the gradient of embeddings is written, the whole table never read
    if is_tower_frozen:
        image_flops = _patch_flops(vision) + _encoder_flops(vision) + pooling + 2 * widening + 3 * narrowing
        image_bytes = tower_work(vision, batch_size * num_images, bytes_per_value).bytes
    else:
        image_flops = 2 * _patch_flops(vision) + 3 * _encoder_flops(vision) + 2 * pooling + 3 * (widening + narrowing)
        image_bytes = bytes_per_value * (3 * _num_weights(vision) + batch_size * num_images * _num_pixels(vision))
    decoder = 3 * _decoder_flops(text, length, length * (length + 1) // 2, length)
    return Work(batch_size * (num_images * image_flops + decoder), bytes_per_value * trained + image_bytes)


def weight_bytes(config: PreTrainedConfig, bytes_per_value: int) -> int:
    """
    The size of all parameters, tied ones once.

    Args:
        config (`PreTrainedConfig`): Of a model with images and text as input, TokenFLEX or another.
        bytes_per_value (`int`): Of a parameter.
    """
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    return bytes_per_value * sum(parameter.numel() for parameter in model.parameters())


def cache_bytes(text_config: PreTrainedConfig, batch_size: int, length: int, bytes_per_value: int) -> int:
    """
    The size of all layers' keys and values.

    Args:
        text_config (`PreTrainedConfig`): The language model's configuration.
        batch_size (`int`): Number of rows.
        length (`int`): Tokens of each row.
        bytes_per_value (`int`): Of a key's or value's number.
    """
    _, key_width = _attention_widths(text_config)
    return bytes_per_value * 2 * text_config.num_hidden_layers * batch_size * length * key_width


def activation_bytes(
    config: TokenFlexConfig,
    batch_size: int,
    num_images: int,
    num_vision_tokens: int | tuple[int, int],
    text_tokens: int,
    bytes_per_value: int,
) -> int:
    """
    The bytes that have to be in memory at once in a prefill beside weights and cache, when every operation is run by
    itself, writes a tensor of its own, and nothing is kept longer than it is needed. That is the pixels, which the
    caller holds, and the largest of these, each for all images or all tokens of the batch:

    - a tower layer: the residual, with queries, keys, values and what attention returns, or with the MLP's inner
      values before and after the activation;
    - the projector: patch features with those pooled along rows, or gate, up and their product;
    - a decoder layer: the vision tokens, which the model returns, and the residual, with queries and what attention
      returns (keys and values are the cache), or with gate, up and their product;
    - the head: the residual and the logits of the last token of each row.

    Attention is taken to be fused (SDPA's flash or memory-efficient kernel), so that no square of scores exists. Norms
    in float32, rotary tables and masks are smaller than what the MLP holds, and not counted. The cache is complete
    only at the end of the language model: where a tower layer is the largest, the sum of weights, cache and this is
    more than has to exist at once.

    Args:
        config ([`TokenFlexConfig`]): The model's configuration.
        batch_size (`int`): Number of prompts.
        num_images (`int`): Images of each prompt.
        num_vision_tokens (`int` or `tuple[int, int]`): Count or grid of each image.
        text_tokens (`int`): Tokens of each prompt beside its vision tokens.
        bytes_per_value (`int`): Of activations and pixels.
    """
    vision, text, images = config.vision_config, config.text_config, batch_size * num_images
    rows, columns = _grid(config, num_vision_tokens)
    query_width, _ = _attention_widths(text)
    tower = _num_positions(vision) * (vision.hidden_size + max(4 * vision.hidden_size, 2 * vision.intermediate_size))
    pooling = _num_features(vision)
    if (rows, columns) != config.patch_grid:
        pooling += rows * config.patch_grid[1] * vision.hidden_size
    projector = max(pooling, 3 * rows * columns * config.projector_hidden_size)
    tokens = batch_size * (num_images * rows * columns + text_tokens)
    residual = tokens * text.hidden_size
    layer = residual + tokens * max(2 * query_width, 3 * text.intermediate_size)
    head = residual + batch_size * text.vocab_size
    vision_tokens = images * rows * columns * text.hidden_size
    largest = max(images * tower, images * projector, vision_tokens + layer, vision_tokens + head)
    return bytes_per_value * (images * _num_pixels(vision) + largest)


def _pair(value) -> tuple[int, int]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value, value)


def _grid(config: TokenFlexConfig, num_vision_tokens: int | tuple[int, int]) -> tuple[int, int]:
    return resolve_vision_token_grid(num_vision_tokens, config.patch_grid)


def _num_pixels(vision_config: PreTrainedConfig) -> int:
    return vision_config.num_channels * math.prod(_pair(vision_config.image_size))


def _num_patches(vision_config: PreTrainedConfig) -> int:
    sides = zip(_pair(vision_config.image_size), _pair(vision_config.patch_size))
    return math.prod(side // patch_side for side, patch_side in sides)


def _num_positions(vision_config: PreTrainedConfig) -> int:
    return _num_patches(vision_config) + (count_prefix_tokens(vision_config) or 0)


def _num_features(vision_config: PreTrainedConfig) -> int:
    return _num_patches(vision_config) * vision_config.hidden_size


def _patch_flops(vision_config: PreTrainedConfig) -> int:
    patch_values = vision_config.num_channels * math.prod(_pair(vision_config.patch_size))
    return 2 * _num_features(vision_config) * patch_values


def _encoder_flops(vision_config: PreTrainedConfig) -> int:
    width, positions = vision_config.hidden_size, _num_positions(vision_config)
    matrices = 4 * width**2 + 2 * width * vision_config.intermediate_size
    return vision_config.num_hidden_layers * (2 * positions * matrices + 4 * width * positions**2)


def _projector_weights(config: TokenFlexConfig) -> int:
    return config.projector_hidden_size * (2 * config.vision_config.hidden_size + config.text_config.hidden_size)


def _projector_flops(config: TokenFlexConfig, num_vision_tokens: int | tuple[int, int]) -> tuple[int, int, int]:
    """Of one image: pooling, gate and up, down."""
    width, inner = config.vision_config.hidden_size, config.projector_hidden_size
    rows, columns = _grid(config, num_vision_tokens)
    patch_rows, patch_columns = config.patch_grid
    pooling = 2 * width * rows * patch_columns * (patch_rows + columns)
    if (rows, columns) == config.patch_grid:
        pooling = 0
    count = rows * columns
    return pooling, 4 * count * width * inner, 2 * count * inner * config.text_config.hidden_size


def _attention_widths(text_config: PreTrainedConfig) -> tuple[int, int]:
    """Of all queries, and of all keys, which is also that of all values."""
    heads = text_config.num_attention_heads
    head_width = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    return heads * head_width, (getattr(text_config, "num_key_value_heads", None) or heads) * head_width


def _decoder_flops(text_config: PreTrainedConfig, tokens: int, pairs: int, num_logits: int) -> int:
    """Of one row; `pairs` are those of a query and a key."""
    width = text_config.hidden_size
    query_width, key_width = _attention_widths(text_config)
    matrices = 2 * width * (query_width + key_width) + 3 * width * text_config.intermediate_size
    layers = text_config.num_hidden_layers * (2 * tokens * matrices + 4 * pairs * query_width)
    return layers + 2 * num_logits * width * text_config.vocab_size


def _decoder_weights(text_config: PreTrainedConfig) -> int:
    """Layers, norms and head."""
    return _num_weights(text_config) + text_config.vocab_size * text_config.hidden_size


def _num_weights(config: PreTrainedConfig) -> int:
    """Of a tower or decoder without pooling head and embeddings, of which only single rows are read."""
    key = config.to_json_string()
    if key not in _NUM_WEIGHTS:
        with torch.device("meta"):
            model = AutoModel.from_config(config)
        left_out = ("head.", "pooler.", "embed_tokens")
        sizes = [p.numel() for name, p in model.named_parameters() if not name.startswith(left_out)]
        _NUM_WEIGHTS[key] = sum(sizes)
    return _NUM_WEIGHTS[key]
