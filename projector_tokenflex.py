"""From the vision tower's patches to the language model: pooling to a chosen grid, then a connector."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_tokenflex import TokenFlexConfig


def pooling_weights(
    input_size: int, output_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """
    The matrix that averages `input_size` values into `output_size` windows, window i spanning
    `floor(i * input_size / output_size)` to `ceil((i + 1) * input_size / output_size)`. Applied to rows and columns it
    equals `torch.nn.functional.adaptive_avg_pool2d`, and unlike it is deterministic on every device and can be
    exported for sizes that do not divide each other.

    Args:
        input_size (`int`): Number of values.
        output_size (`int`): Number of windows to average them into.
        device (`torch.device`, *optional*): Device of the matrix. Defaults to torch's default device.
        dtype (`torch.dtype`, *optional*): Its dtype. Defaults to torch's default dtype.

    Returns:
        `torch.Tensor` of shape `(output_size, input_size)`: Rows sum to one.

    Example:

    ```python
    >>> from tokenflex import pooling_weights

    >>> pooling_weights(3, 2)
    tensor([[0.5000, 0.5000, 0.0000],
            [0.0000, 0.5000, 0.5000]])
    ```
    """
    window = torch.arange(output_size, device=device)[:, None]
    position = torch.arange(input_size, device=device)[None, :]
    start = window * input_size // output_size
    end = ((window + 1) * input_size + output_size - 1) // output_size
    inside = ((position >= start) & (position < end)).to(dtype or torch.get_default_dtype())
    return inside / inside.sum(-1, keepdim=True)


def pixel_unshuffle(patch_features: torch.Tensor, patch_grid: tuple[int, int], factor: int) -> torch.Tensor:
    """
    Puts each block of `factor * factor` patches into one feature, row by row, as InternVL and Idefics3 do.

    Args:
        patch_features (`torch.Tensor` of shape `(num_images, num_patches, hidden_size)`): Row by row.
        patch_grid (`tuple[int, int]`): (rows, columns) of the blocks.
        factor (`int`): The side of a block in patches.

    Returns:
        `torch.Tensor` of shape `(num_images, num_patches / factor**2, hidden_size * factor**2)`.
    """
    (rows, columns), width = patch_grid, patch_features.shape[-1]
    blocks = patch_features.reshape(-1, rows, factor, columns, factor, width).transpose(2, 3)
    return blocks.reshape(-1, rows * columns, factor**2 * width)


def average_pool(patch_features: torch.Tensor, patch_grid: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """
    Adaptive average pooling (arXiv 2504.03154, abstract), as products with [`pooling_weights`].

    Args:
        patch_features (`torch.Tensor` of shape `(num_images, num_patches, hidden_size)`): Row by row.
        patch_grid (`tuple[int, int]`): (rows, columns) of the patches.
        grid (`tuple[int, int]`): (rows, columns) to pool them to.

    Returns:
        `torch.Tensor` of shape `(num_images, rows * columns, hidden_size)`.
    """
    if grid == patch_grid:
        return patch_features
    options = {"device": patch_features.device, "dtype": patch_features.dtype}
    along_rows = pooling_weights(patch_grid[0], grid[0], **options)
    along_columns = pooling_weights(patch_grid[1], grid[1], **options)
    num_images, _, width = patch_features.shape
    pooled = along_rows @ patch_features.reshape(num_images, patch_grid[0], -1)
    pooled = along_columns @ pooled.view(num_images, grid[0], patch_grid[1], width)
    return pooled.view(num_images, grid[0] * grid[1], width)


class TokenFlexConnector(nn.Module):
    """
    From the width of the pooled features to the language model's, behind a `norm` if the config has one: the paper's
    `"swiglu"`, `down(act(gate(x)) * up(x))`; LLaVA-1.5's `"mlp"`, `down(act(up(x)))`; or `"linear"`, `down(x)`.
    """

    def __init__(self, config: TokenFlexConfig):
        super().__init__()
        width, inner, bias = config.vision_feature_size, config.projector_hidden_size, config.projector_bias
        self.kind = config.projector_connector
        self.norm = None if config.projector_norm_eps is None else nn.LayerNorm(width, config.projector_norm_eps)
        if self.kind == "swiglu":
            self.gate = nn.Linear(width, inner, bias)
        if self.kind != "linear":
            self.up = nn.Linear(width, inner, bias)
            self.act_fn = ACT2FN[config.projector_hidden_act]
        self.down = nn.Linear(width if self.kind == "linear" else inner, config.text_config.hidden_size, bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.norm is not None:
            hidden_states = self.norm(hidden_states)
        if self.kind == "swiglu":
            hidden_states = self.act_fn(self.gate(hidden_states)) * self.up(hidden_states)
        elif self.kind == "mlp":
            hidden_states = self.act_fn(self.up(hidden_states))
        return self.down(hidden_states)


class TokenFlexProjector(nn.Module):
    """
    Pooling of the patch grid to a chosen grid, then the connector into the language model, or the other way round.

    Args:
        config ([`TokenFlexConfig`]): Its `projector_...` fields describe the connector.
    """

    def __init__(self, config: TokenFlexConfig):
        super().__init__()
        self.connector = TokenFlexConnector(config)
        self.pools_last = config.projector_pools_last

    def forward(
        self, patch_features: torch.Tensor, grids: Sequence[tuple[int, int]], patch_grid: tuple[int, int]
    ) -> torch.Tensor:
        """
        Args:
            patch_features (`torch.Tensor` of shape `(num_images, num_patches, vision_hidden_size)`):
                The tower's features.
            grids (sequence of `tuple[int, int]`):
                (rows, columns) for each image.
            patch_grid (`tuple[int, int]`):
                (rows, columns) of the patches.

        Returns:
            `torch.Tensor` of shape `(num_images, num_vision_tokens, hidden_size)` when all grids are equal, else of
            shape `(total_vision_tokens, hidden_size)`, image by image. One tensor from one call of the connector,
            whatever the grids: processes that share out the weights have to make the same calls.
        """
        patch_features, connect = patch_features.to(self.connector.down.weight.dtype), self.connector
        if self.pools_last:
            patch_features, connect = connect(patch_features), nn.Identity()
        if len(set(grids)) == 1:
            return connect(average_pool(patch_features, patch_grid, grids[0]))
        pooled = [None] * len(grids)
        for grid in dict.fromkeys(grids):
            members = [i for i, other in enumerate(grids) if other == grid]
            for i, tokens in zip(members, average_pool(patch_features[members], patch_grid, grid)):
                pooled[i] = tokens
        return connect(torch.cat(pooled))
