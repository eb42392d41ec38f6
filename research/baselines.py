"""What reviewers ask to see beside pooling and SwiGLU: a smaller image, and a plain GELU MLP."""

import math

import torch
from torch import nn
from transformers.activations import ACT2FN

from ..configuration_tokenflex import TokenFlexConfig
from ..modeling_tokenflex import TokenFlexForConditionalGeneration
from ..processing_tokenflex import TokenFlexProcessor


class GeluMLP(nn.Module):
    """
    `down(gelu(gate(x)))`, as LLaVA's projector, with as many parameters as [`TokenFlexSwiGLU`] to within a row: its
    inner width is half as large again, since one matrix fewer leads there.
    """

    def __init__(self, config: TokenFlexConfig):
        super().__init__()
        vision_size, text_size = config.vision_config.hidden_size, config.text_config.hidden_size
        inner = round(config.projector_hidden_size * (2 * vision_size + text_size) / (vision_size + text_size))
        self.gate = nn.Linear(vision_size, inner, bias=False)
        self.down = nn.Linear(inner, text_size, bias=False)
        self.act_fn = ACT2FN["gelu"]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down(self.act_fn(self.gate(hidden_states)))


def use_gelu(model: TokenFlexForConditionalGeneration, seed: int) -> None:
    """Puts a new [`GeluMLP`] in the place of the model's SwiGLU."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.model.multi_modal_projector.swiglu = GeluMLP(model.config).apply(model._init_weights)


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
