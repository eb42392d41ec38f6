"""Baselines beside pooling and SwiGLU: a smaller image, and a plain GELU MLP."""

import math

import torch
from torch import nn

from ..configuration_tokenflex import TokenFlexConfig
from ..modeling_tokenflex import TokenFlexForConditionalGeneration
from ..processing_tokenflex import TokenFlexProcessor
from ..vision_tokenflex import TokenFlexProjector


def use_gelu(model: TokenFlexForConditionalGeneration, seed: int, inner: int | None = None) -> None:
    """
    Puts a new GELU MLP in the place of the model's SwiGLU.

    Args:
        model ([`TokenFlexForConditionalGeneration`]): The model, which is changed in place.
        seed (`int`): The seed of the new weights.
        inner (`int`, *optional*):
            The MLP's inner width. Defaults to half as much again as the SwiGLU's, so that it has as many weights to
            within a row, since one matrix fewer leads there.
    """
    config = model.config
    vision_size, text_size = config.vision_config.hidden_size, config.text_config.hidden_size
    if inner is None:
        inner = round(config.projector_hidden_size * (2 * vision_size + text_size) / (vision_size + text_size))
    config.projector_connector, config.projector_hidden_act, config.projector_bias = "mlp", "gelu", True
    config.projector_hidden_size = inner
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.model.multi_modal_projector = TokenFlexProjector(config).apply(model._init_weights)


def become_llava(model: TokenFlexForConditionalGeneration, seed: int) -> None:
    """
    Gives the model what transformers' LLaVA has between tower and language model: an MLP of the language model's
    width, behind the tower's last layer and before its norm.

    Args:
        model ([`TokenFlexForConditionalGeneration`]): The model, which is changed in place.
        seed (`int`): The seed of the new weights.
    """
    model.config.vision_feature_layer = model.config.vision_config.num_hidden_layers
    use_gelu(model, seed, model.config.text_config.hidden_size)


@torch.no_grad()
def shrink_image(
    model: TokenFlexForConditionalGeneration, processor: TokenFlexProcessor, num_patches: int
) -> tuple[TokenFlexForConditionalGeneration, TokenFlexProcessor]:
    """
    A model with the same weights whose images have `num_patches` patches, each of which is a vision token. The tower's
    position embeddings are interpolated (bicubic), as SigLIP does at other resolutions.

    Args:
        model ([`TokenFlexForConditionalGeneration`]): A model with a SigLIP tower.
        processor ([`TokenFlexProcessor`]): Its processor.
        num_patches (`int`): A square.
    """
    side = math.isqrt(num_patches)
    config = TokenFlexConfig.from_dict(model.config.to_dict())
    config.vision_config.image_size = side * config.patch_size[0]
    config.num_vision_tokens, config.vision_token_choices, config.vision_token_weights = (
        num_patches,
        [num_patches],
        [1.0],
    )
    small = TokenFlexForConditionalGeneration(config)
    small.generation_config = model.generation_config
    weights = model.state_dict()
    name = next(name for name in weights if name.endswith("position_embedding.weight"))
    rows, columns = model.config.patch_grid
    grid = weights[name].T.reshape(1, -1, rows, columns)
    grid = nn.functional.interpolate(grid, (side, side), mode="bicubic", antialias=True)
    weights[name] = grid.flatten(2)[0].T.contiguous()
    small.load_state_dict(weights)
    image_processor = type(processor.image_processor)(
        **{
            **processor.image_processor.to_dict(),
            "size": {"height": side * config.patch_size[0], "width": side * config.patch_size[1]},
        }
    )
    return small, TokenFlexProcessor(image_processor, processor.tokenizer, num_patches, config.patch_size[0])
