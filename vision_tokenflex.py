"""From images to the language model: the vision tower, pooling of its patches to a chosen grid, and a connector."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.compiler import is_compiling
from transformers.activations import ACT2FN
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .choices_tokenflex import format_size, resolve_vision_token_grid, resolve_vision_tokens, split_choice
from .configuration_tokenflex import INTERPOLATION, NAFLEX, TokenFlexConfig
from .placeholders_tokenflex import TokenFlexImageOutput, encoded_grids, encoded_resolutions


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


def cut_patches(pixel_values: torch.Tensor, patch_size: tuple[int, int]) -> tuple[torch.Tensor, torch.LongTensor]:
    """
    Cuts images into patches as SigLIP 2's NaFlex towers take them.

    Args:
        pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`): The images.
        patch_size (`tuple[int, int]`): Height and width of a patch in pixels.

    Returns:
        `tuple[torch.Tensor, torch.LongTensor]`: Patches of shape `(num_images, num_patches, patch_height *
        patch_width * num_channels)`, row by row, and of shape `(num_images, 2)` the (rows, columns) of each image.
    """
    (num_images, channels, height, width), (tall, wide) = pixel_values.shape, patch_size
    rows, columns = height // tall, width // wide
    patches = pixel_values.reshape(num_images, channels, rows, tall, columns, wide).permute(0, 2, 4, 3, 5, 1)
    shapes = torch.tensor([[rows, columns]] * num_images, device="cpu").view(-1, 2)
    return patches.reshape(num_images, rows * columns, -1), shapes


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
        self,
        patch_features: torch.Tensor | list[torch.Tensor],
        grids: Sequence[tuple[int, int]],
        patch_grids: Sequence[tuple[int, int]],
    ) -> torch.Tensor:
        """
        Args:
            patch_features (`torch.Tensor` of shape `(num_images, num_patches, vision_hidden_size)`):
                The tower's features; a list of one tensor for each image where their numbers of patches differ.
            grids (sequence of `tuple[int, int]`):
                (rows, columns) for each image.
            patch_grids (sequence of `tuple[int, int]`):
                (rows, columns) of each image's patches.

        Returns:
            `torch.Tensor` of shape `(num_images, num_vision_tokens, hidden_size)` when all images are alike, else of
            shape `(total_vision_tokens, hidden_size)`, image by image. One tensor from one call of the connector,
            whatever the grids: processes that share out the weights have to make the same calls.
        """
        dtype, connect, pairs = self.connector.down.weight.dtype, self.connector, list(zip(patch_grids, grids))
        is_mixed = isinstance(patch_features, list)
        lengths = [len(rows) for rows in patch_features] if is_mixed else None
        patch_features = (torch.cat(patch_features) if is_mixed else patch_features).to(dtype)
        if self.pools_last:
            patch_features, connect = connect(patch_features), nn.Identity()
        if len(set(pairs)) == 1 and not is_mixed:
            return connect(average_pool(patch_features, *pairs[0]))
        images = patch_features.split(lengths) if is_mixed else patch_features
        pooled = [None] * len(pairs)
        for pair in dict.fromkeys(pairs):
            members = [i for i, other in enumerate(pairs) if other == pair]
            alike = torch.stack([images[i] for i in members]) if is_mixed else images[members]
            for i, tokens in zip(members, average_pool(alike, *pair)):
                pooled[i] = tokens
        return connect(torch.cat(pooled))


class TokenFlexVisionMixin:
    """The methods of [`TokenFlexModel`] that take images to vision tokens."""

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        num_vision_tokens: int | tuple[int, int] | str | list | None = None,
        vision_token_grids: torch.LongTensor | None = None,
        image_indices: torch.LongTensor | None = None,
        image_resolutions: torch.LongTensor | None = None,
        image_size: int | tuple[int, int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | TokenFlexImageOutput:
        """
        Encodes images and pools each to its vision tokens.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`):
                The images.
            num_vision_tokens (`int`, `tuple[int, int]`, `str` or a list of these, *optional*):
                A count n*n or grid (rows, columns) for all images, or a list with one per image, each also with the
                resolution to see the image at (`"64@224"`). Defaults to the config's count when `vision_token_grids`
                is not given either.
            vision_token_grids (`torch.LongTensor` of shape `(num_images, 2)`, *optional*):
                (rows, columns) of each image, as the processor returns it.
            image_indices (`torch.LongTensor` of shape `(num_appearances,)`, *optional*):
                The image that each appearance in the prompts shows, when they stand in another order or appear more
                than once; counts and grids are then per appearance. The tower runs once per image and resolution.
            image_resolutions (`torch.LongTensor` of shape `(num_images, 2)`, *optional*):
                (height, width) in pixels to see each image at; (0, 0) is the resolution that goes with its count.
            image_size (`int` or `tuple[int, int]`, *optional*):
                The resolution in pixels, square or (height, width), to see all images at.

        Returns:
            [`TokenFlexImageOutput`]: `pooler_output` holds the vision tokens, a tensor of shape
            `(num_images, num_vision_tokens, hidden_size)`, or a list with one 2-D tensor per image when counts differ;
            `last_hidden_state` the features of shape `(num_images, num_patches, vision_feature_size)` they were pooled
            from, without class tokens and registers, or a list with one 2-D tensor per image when resolutions differ;
            `vision_token_grids` the grids and `image_resolutions` the resolutions.

        Raises:
            ValueError: If a count or resolution is not allowed, arguments disagree, or the images do not have the
                tower's size.
        """
        if num_vision_tokens is None and vision_token_grids is None:
            num_vision_tokens = self.config.num_vision_tokens
            if image_size is not None:
                num_vision_tokens, _ = split_choice(num_vision_tokens)
        num_appearances = len(pixel_values) if image_indices is None else len(image_indices)
        asked = (num_vision_tokens, vision_token_grids, image_resolutions, image_size)
        grids, sizes = self._resolve_grids(num_appearances, *asked)
        if len(set(sizes)) < 2:
            outputs = self.encode_images(pixel_values, *sizes[:1], **kwargs)
            patch_features = outputs.last_hidden_state
            if image_indices is not None:
                patch_features = patch_features[image_indices]
        else:
            outputs, patch_features = TokenFlexImageOutput(), [None] * len(sizes)
            indices = range(len(sizes)) if image_indices is None else image_indices.tolist()
            for size in dict.fromkeys(sizes):
                members = [i for i, other in enumerate(sizes) if other == size]
                images = list(dict.fromkeys(indices[i] for i in members))
                features = self.encode_images(pixel_values[images], size, **kwargs).last_hidden_state
                for i in members:
                    patch_features[i] = features[images.index(indices[i])]
        image_outputs = self.pool_image_features(patch_features, grids, sizes)
        image_outputs.hidden_states, image_outputs.attentions = outputs.hidden_states, outputs.attentions
        return image_outputs

    def encode_images(
        self,
        pixel_values: torch.Tensor,
        resolution: tuple[int, int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        """
        The tower's output for images, with the features that are to be pooled as its `last_hidden_state`; arguments as
        in [`~TokenFlexVisionMixin.get_image_features`]. With a `resolution` of (height, width) in pixels the tower
        sees them shrunk, by bicubic interpolation with antialiasing, and interpolates its position embeddings.
        """
        config, layers = self.config, self.config.vision_feature_layer
        expected = (config.vision_config.num_channels, *config.image_size)
        if tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)}, but this tower takes (num_images, "
                f"{', '.join(map(str, expected))}): use the processor saved with the checkpoint."
            )
        resolution = resolution or config.own_resolution()
        patch_grid = config.patch_grid_at(resolution)
        if resolution != config.image_size:
            kwargs |= INTERPOLATION[config.vision_config.model_type]
            options = {"mode": "bicubic", "antialias": True}
            pixel_values = nn.functional.interpolate(pixel_values.float(), resolution, **options)
        if config.vision_config.model_type == NAFLEX:
            pixel_values, kwargs["spatial_shapes"] = cut_patches(pixel_values, config.patch_size)
            kwargs["pixel_attention_mask"] = None  # all images have as many patches
        if layers != -1:
            kwargs["output_hidden_states"] = True
        outputs = self.vision_tower(pixel_values.to(self.vision_tower.dtype), return_dict=True, **kwargs)
        features = outputs.last_hidden_state
        if layers != -1:
            layers = [layers] if isinstance(layers, int) else layers
            features = torch.cat([outputs.hidden_states[layer] for layer in layers], dim=-1)
        if features.ndim == 4:  # of a convolutional tower: (num_images, hidden_size, rows, columns)
            features = features.flatten(2).transpose(1, 2)
        num_patches = patch_grid[0] * patch_grid[1] * config.downsample_factor**2
        if features.shape[1] != config.num_prefix_tokens + num_patches:
            raise ValueError(
                f"The vision tower returned {features.shape[1]} features per image, but `num_prefix_tokens`="
                f"{config.num_prefix_tokens} and the tower's patches make {config.num_prefix_tokens + num_patches}."
            )
        features = features[:, config.num_prefix_tokens :]
        if config.downsample_factor > 1:
            features = pixel_unshuffle(features, patch_grid, config.downsample_factor)
        outputs.last_hidden_state = features
        return outputs

    def pool_image_features(
        self,
        patch_features: torch.Tensor | list[torch.Tensor],
        grids: list[tuple[int, int]],
        image_resolutions: Sequence[tuple[int, int]] | None = None,
    ) -> TokenFlexImageOutput:
        """
        Pools patch features kept from [`~TokenFlexVisionMixin.get_image_features`] to other counts, without the tower.

        Args:
            patch_features (`torch.Tensor` of shape `(num_images, num_patches, vision_hidden_size)`):
                `last_hidden_state` of the kept output.
            grids (`list[tuple[int, int]]`): (rows, columns) for each image.
            image_resolutions (`Sequence[tuple[int, int]]`, *optional*): `image_resolutions` of the kept output.
                Default to the tower's own.

        Returns:
            [`TokenFlexImageOutput`]

        Raises:
            ValueError: If the features have another width than this model's tower.
        """
        width = self.config.vision_feature_size
        if len(patch_features) and patch_features[0].shape[-1] != width:
            raise ValueError(
                f"The patch features are {patch_features[0].shape[-1]} wide, but this model's vision tower makes "
                f"{width}: keep features, and draft with an assistant, of a model with the same tower."
            )
        sizes = list(image_resolutions or [self.config.own_resolution()] * len(grids))
        features = self.multi_modal_projector(patch_features, grids, [self.config.patch_grid_at(s) for s in sizes])
        if len(set(grids)) > 1:
            features = list(features.split([rows * columns for rows, columns in grids]))
        elif features.ndim == 2:
            features = features.view(len(grids), -1, features.shape[-1])
        return TokenFlexImageOutput(
            last_hidden_state=patch_features,
            pooler_output=features,
            vision_token_grids=list(grids),
            image_resolutions=sizes,
        )

    def pool_kept_features(
        self, kept: Sequence[TokenFlexImageOutput], grids: list[tuple[int, int]], sizes: list[tuple[int, int]]
    ) -> TokenFlexImageOutput:
        """
        Pools of several kept outputs, each of all images at resolutions of its own, for each image the one it needs.

        Args:
            kept (`Sequence[TokenFlexImageOutput]`): Outputs of [`~TokenFlexVisionMixin.get_image_features`].
            grids (`list[tuple[int, int]]`): (rows, columns) for each image.
            sizes (`list[tuple[int, int]]`): (height, width) in pixels for each image.

        Raises:
            ValueError: If an image was kept at other resolutions only.
        """
        own = self.config.own_resolution()
        held = [list(k.get("image_resolutions") or [own] * len(k.last_hidden_state)) for k in kept]
        sources = [[k for k, of in enumerate(held) if of[i : i + 1] == [size]] for i, size in enumerate(sizes)]
        for i, (source, size) in enumerate(zip(sources, sizes)):
            if not source:
                (rows, columns), known = grids[i], [format_size(of[i]) for of in held if of[i]]
                count = rows * columns if rows == columns else f"{rows}x{columns}"
                raise ValueError(
                    f"`mm_encoder_outputs` holds image {i} as seen at {', '.join(known)} pixels, but at {count} "
                    f"vision tokens it is seen at {format_size(size)}: give `pixel_values`, a list of features that "
                    f"holds that resolution too, or ask for '{count}@{known[0]}'."
                )
        if len({source[0] for source in sources}) < 2:
            features = kept[sources[0][0] if sources else 0].last_hidden_state
        else:
            features = [kept[source[0]].last_hidden_state[i] for i, source in enumerate(sources)]
        return self.pool_image_features(features, grids, sizes)

    def _resolve_grids(
        self, num_images: int, num_vision_tokens, vision_token_grids, image_resolutions=None, image_size=None
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """The grid and resolution of each image from the arguments of `forward`, which have to agree."""
        config = self.config
        if num_vision_tokens is not None and is_compiling():
            image_resolutions = None  # what is said keeps traced graphs free of reading it off a tensor
        given = encoded_resolutions({"image_resolutions": image_resolutions}, num_images, config)
        grids, sizes = None, [split_choice(1, image_size)[1]] * num_images
        if num_vision_tokens is not None:
            grids, sizes = resolve_vision_tokens(num_vision_tokens, num_images, config, image_size=image_size)
        if any(None not in pair and pair[0] != pair[1] for pair in zip(sizes, given)):
            raise ValueError(
                f"`num_vision_tokens`={num_vision_tokens} and `image_size`={image_size} do not name the resolutions "
                f"that the inputs were encoded with (`image_resolutions`={given}): leave one of them out."
            )
        if vision_token_grids is not None and not (is_compiling() and grids is not None):
            asked, named = grids, {"vision_token_grids": vision_token_grids, "pixel_values": range(num_images)}
            grids = encoded_grids(named, config)
            if asked is not None and asked != grids:
                raise ValueError(
                    f"`num_vision_tokens`={num_vision_tokens} is not what the inputs were encoded with "
                    f"(`vision_token_grids`={grids}): `forward` does not rewrite prompts. Call `generate`, or "
                    "`at_count` first."
                )
        sizes = [size or encoded or config.resolution_for(grid) for size, encoded, grid in zip(sizes, given, grids)]
        for grid, size in dict.fromkeys(zip(grids, sizes)):
            resolve_vision_token_grid(
                grid, config.patch_grid_at(size), f"vision_token_grids at {format_size(size)} pixels"
            )
        return grids, sizes

    def _idle_image_features(self) -> torch.Tensor | float:
        """
        Zero, by way of tower and projector when these are trained or shared out: every rank then has gradients for the
        same weights, and takes part in gathering them, when its batch happens to hold no image.
        """
        parameters = [*self.vision_tower.parameters(), *self.multi_modal_projector.parameters()]
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not is_distributed and not any(parameter.requires_grad for parameter in parameters):
            return 0.0
        size = (1, self.config.vision_config.num_channels, *self.config.image_size)
        image = torch.zeros(size, device=self.device, dtype=self.vision_tower.dtype)
        return 0.0 * self.get_image_features(image, num_vision_tokens=1, return_dict=True).pooler_output.sum()
