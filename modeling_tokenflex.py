"""PyTorch TokenFLEX model ([arXiv 2504.03154](https://huggingface.co/papers/2504.03154))."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.compiler import is_compiling
from transformers import AutoModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, torch_compilable_check
from transformers.utils.generic import can_return_tuple

from .configuration_tokenflex import TokenFlexConfig, resolve_vision_token_grids
from .generation_tokenflex import TokenFlexGenerationMixin
from .image_cache_tokenflex import ImageFeatureCache
from .packing_tokenflex import create_packed_masks, packed_position_ids
from .placeholders_tokenflex import infer_vision_token_grids


def pooling_weights(
    input_size: int, output_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """
    The matrix that averages `input_size` values into `output_size` windows, window i spanning
    `floor(i * input_size / output_size)` to `ceil((i + 1) * input_size / output_size)`. Applied to rows and columns it
    equals `torch.nn.functional.adaptive_avg_pool2d`, and unlike it is deterministic on every device and can be
    exported for sizes that do not divide each other.

    Args:
        input_size (`int`): How many values there are.
        output_size (`int`): How many windows to average them into.
        device (`torch.device`, *optional*): Where the matrix is made. Defaults to torch's default device.
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


class TokenFlexSwiGLU(nn.Module):
    """SwiGLU from the tower's width to the language model's: `down(act(gate(x)) * up(x))`."""

    def __init__(self, config: TokenFlexConfig):
        super().__init__()
        vision_size, text_size = config.vision_config.hidden_size, config.text_config.hidden_size
        self.gate = nn.Linear(vision_size, config.projector_hidden_size, bias=False)
        self.up = nn.Linear(vision_size, config.projector_hidden_size, bias=False)
        self.down = nn.Linear(config.projector_hidden_size, text_size, bias=False)
        self.act_fn = ACT2FN[config.projector_hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down(self.act_fn(self.gate(hidden_states)) * self.up(hidden_states))


class TokenFlexProjector(nn.Module):
    """
    Adaptive average pooling of the patch grid to a chosen grid, then SwiGLU (arXiv 2504.03154, abstract).

    Args:
        config ([`TokenFlexConfig`]): The configuration.
    """

    def __init__(self, config: TokenFlexConfig):
        super().__init__()
        self.patch_grid = config.patch_grid
        self.swiglu = TokenFlexSwiGLU(config)

    def pool(self, patch_features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """
        Averages patch features to a grid.

        Args:
            patch_features (`torch.Tensor` of shape `(num_images, num_patches, vision_hidden_size)`): Row by row.
            grid (`tuple[int, int]`): (rows, columns).

        Returns:
            `torch.Tensor` of shape `(num_images, rows * columns, vision_hidden_size)`.
        """
        if grid == self.patch_grid:
            return patch_features
        options = {"device": patch_features.device, "dtype": patch_features.dtype}
        along_rows = pooling_weights(self.patch_grid[0], grid[0], **options)
        along_columns = pooling_weights(self.patch_grid[1], grid[1], **options)
        num_images, _, width = patch_features.shape
        pooled = along_rows @ patch_features.reshape(num_images, self.patch_grid[0], -1)
        pooled = along_columns @ pooled.view(num_images, grid[0], self.patch_grid[1], width)
        return pooled.view(num_images, grid[0] * grid[1], width)

    def forward(self, patch_features: torch.Tensor, grids: Sequence[tuple[int, int]]) -> torch.Tensor:
        """
        Args:
            patch_features (`torch.Tensor` of shape `(num_images, num_patches, vision_hidden_size)`):
                The tower's features.
            grids (sequence of `tuple[int, int]`):
                (rows, columns) for each image.

        Returns:
            `torch.Tensor` of shape `(num_images, num_vision_tokens, hidden_size)` when all grids are equal, else of
            shape `(total_vision_tokens, hidden_size)`, image by image. One tensor from one call of SwiGLU, whatever the
            grids: where weights are shared out between processes, all of them have to make the same calls.
        """
        patch_features = patch_features.to(self.swiglu.down.weight.dtype)
        if len(set(grids)) == 1:
            return self.swiglu(self.pool(patch_features, grids[0]))
        pooled = [None] * len(grids)
        for grid in dict.fromkeys(grids):
            members = [i for i, other in enumerate(grids) if other == grid]
            for i, tokens in zip(members, self.pool(patch_features[members], grid)):
                pooled[i] = tokens
        return self.swiglu(torch.cat(pooled))


@dataclass
class TokenFlexImageOutput(BaseModelOutputWithPooling):
    """
    Args:
        vision_token_grids (`list[tuple[int, int]]`):
            (rows, columns) of each image.
    """

    vision_token_grids: list[tuple[int, int]] | None = None


@dataclass
class TokenFlexModelOutputWithPast(BaseModelOutputWithPast):
    """
    Args:
        image_hidden_states (`torch.Tensor` of shape `(num_images, num_vision_tokens, hidden_size)` or a list of \
        `(num_vision_tokens, hidden_size)` tensors):
            The projected vision tokens; a list when counts differ between images.
    """

    image_hidden_states: torch.Tensor | list[torch.Tensor] | None = None


@dataclass
class TokenFlexCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    Args:
        image_hidden_states (`torch.Tensor` of shape `(num_images, num_vision_tokens, hidden_size)` or a list of \
        `(num_vision_tokens, hidden_size)` tensors):
            The projected vision tokens; a list when counts differ between images.
    """

    image_hidden_states: torch.Tensor | list[torch.Tensor] | None = None


def _spare_vision(quantization_config):
    quantization_config = copy.deepcopy(quantization_config)
    is_dict = isinstance(quantization_config, dict)
    values = quantization_config if is_dict else vars(quantization_config)
    name = "llm_int8_skip_modules" if values.get("quant_method") == "bitsandbytes" else "modules_to_not_convert"
    if values.get(name) is None:
        values[name] = [r"(.*\.)?vision_tower", r"(.*\.)?multi_modal_projector", "lm_head"]
    return quantization_config


class TokenFlexPreTrainedModel(PreTrainedModel):
    """What TokenFLEX models have in common: how they are loaded, initialised and split over devices."""

    config: TokenFlexConfig
    config_class = TokenFlexConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def is_custom_code(cls) -> bool:
        # What transformers does for custom code takes a module without parameters of its own as initialised, so that
        # towers would miss the rules they have for whole layers. No class here has an `_init_weights` of its own.
        return False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, quantization_config=None, **kwargs):
        """
        As in transformers, but a `quantization_config` that does not say what to leave as it is leaves the vision
        tower, the projector and the head: together they are a few percent of the weights, and the widths of towers
        such as SigLIP-so400m do not divide into quantisation groups.
        """
        if quantization_config is not None:
            kwargs["quantization_config"] = _spare_vision(quantization_config)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    def post_init(self):
        super().post_init()
        # A tower registers classes that only its text half has; FSDP refuses names it cannot find.
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = {name for name in self._no_split_modules if name in present}


class TokenFlexModel(TokenFlexPreTrainedModel):
    """
    The vision tower, the projector and the language model, without a head.

    Args:
        config ([`TokenFlexConfig`]): The configuration.
    """

    def __init__(self, config: TokenFlexConfig):
        config.check_vision_tokens()  # loading sets attributes after the config has checked itself
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = TokenFlexProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.image_feature_cache = None
        self.post_init()

    def keep_image_features(self, max_images: int | None = 64) -> ImageFeatureCache | None:
        """
        From now on keeps the vision tower's features of the images last used, and runs the tower only for others: for
        conversations and several questions about the same images. In training, where gradients or the tower's inner states
        are asked for, and in compiled code the tower always runs.

        Args:
            max_images (`int`, *optional*, defaults to 64): How many images' features to keep; `None` keeps none again.

        Returns:
            [`ImageFeatureCache`], *optional*: With the numbers of `hits` and `misses`.

        Raises:
            ValueError: If `max_images` is no positive integer.
        """
        self.image_feature_cache = None if max_images is None else ImageFeatureCache(max_images)
        return self.image_feature_cache

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        num_vision_tokens: int | tuple[int, int] | list | None = None,
        vision_token_grids: torch.LongTensor | None = None,
        image_indices: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | TokenFlexImageOutput:
        """
        Encodes images and pools each to its vision tokens.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`):
                The images.
            num_vision_tokens (`int`, `tuple[int, int]` or a list of these, *optional*):
                A count n*n or grid (rows, columns) for all images, or a list with one per image. Defaults to the
                config's count when `vision_token_grids` is not given either.
            vision_token_grids (`torch.LongTensor` of shape `(num_images, 2)`, *optional*):
                (rows, columns) of each image, as the processor returns it.
            image_indices (`torch.LongTensor` of shape `(num_appearances,)`, *optional*):
                Which image each appearance in the prompts shows, when they stand in another order or appear more than
                once; counts and grids are then per appearance. The tower runs once per image.

        Returns:
            [`TokenFlexImageOutput`]: `pooler_output` holds the vision tokens, a tensor of shape
            `(num_images, num_vision_tokens, hidden_size)`, or a list with one 2-D tensor per image when counts differ;
            `last_hidden_state` the patch features of shape `(num_images, num_patches, vision_hidden_size)` they were
            pooled from, without class tokens and registers; `vision_token_grids` the grids.

        Raises:
            ValueError: If a count is not allowed, the two arguments disagree, or the images do not have the tower's
                size.
        """
        vision_config = self.config.vision_config
        expected = (vision_config.num_channels, *self.config.image_size)
        if tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)}, but this tower takes (num_images, "
                f"{', '.join(map(str, expected))}): use the processor saved with the checkpoint."
            )
        if num_vision_tokens is None and vision_token_grids is None:
            num_vision_tokens = self.config.num_vision_tokens
        num_appearances = len(pixel_values) if image_indices is None else len(image_indices)
        grids = self.resolve_grids(num_appearances, num_vision_tokens, vision_token_grids)
        cache = self.image_feature_cache
        if cache is None or self.training or torch.is_grad_enabled() or is_compiling() or any(kwargs.values()):
            patch_features, outputs = self._run_tower(pixel_values, **kwargs)
        else:
            outputs = BaseModelOutputWithPooling()
            settings = (self.config.vision_feature_layer, self.config.num_prefix_tokens)
            patch_features = cache.encode(
                self.vision_tower, pixel_values, lambda new: self._run_tower(new)[0], settings
            )
        if image_indices is not None:
            patch_features = patch_features[image_indices]
        image_outputs = self.pool_image_features(patch_features, grids)
        image_outputs.hidden_states, image_outputs.attentions = outputs.hidden_states, outputs.attentions
        return image_outputs

    def _run_tower(self, pixel_values: torch.Tensor, **kwargs) -> tuple[torch.Tensor, BaseModelOutputWithPooling]:
        """The patch features of images, and all that the tower returned."""
        if self.config.vision_feature_layer != -1 and not kwargs.get("output_hidden_states"):
            kwargs["output_hidden_states"] = [self.config.vision_feature_layer]  # the others are not kept
        outputs = self.vision_tower(pixel_values, return_dict=True, **kwargs)
        features = outputs.last_hidden_state
        if self.config.vision_feature_layer != -1:
            features = outputs.hidden_states[self.config.vision_feature_layer]
        num_patches, num_prefix_tokens = math.prod(self.config.patch_grid), self.config.num_prefix_tokens
        if features.shape[1] != num_prefix_tokens + num_patches:
            raise ValueError(
                f"The vision tower returned {features.shape[1]} features per image, but `num_prefix_tokens`="
                f"{num_prefix_tokens} and the patch grid {self.config.patch_grid} make {num_prefix_tokens + num_patches}."
            )
        return features[:, num_prefix_tokens:], outputs

    def pool_image_features(
        self, patch_features: torch.Tensor, grids: Sequence[tuple[int, int]]
    ) -> TokenFlexImageOutput:
        """
        Pools patch features that were kept from [`~TokenFlexModel.get_image_features`] to other counts, without running
        the vision tower.

        Args:
            patch_features (`torch.Tensor` of shape `(num_images, num_patches, vision_hidden_size)`):
                `last_hidden_state` of the kept output.
            grids (sequence of `tuple[int, int]`):
                (rows, columns) for each image.

        Returns:
            [`TokenFlexImageOutput`]

        Raises:
            ValueError: If the features have another width than this model's tower.
        """
        width = self.config.vision_config.hidden_size
        if patch_features.shape[-1] != width:
            raise ValueError(
                f"The patch features are {patch_features.shape[-1]} wide, but this model's vision tower makes {width}: "
                "keep features, and draft with an assistant, of a model with the same tower."
            )
        features = self.multi_modal_projector(patch_features, grids)
        if len(set(grids)) > 1:
            features = list(features.split([rows * columns for rows, columns in grids]))
        return TokenFlexImageOutput(
            last_hidden_state=patch_features,
            pooler_output=features,
            vision_token_grids=list(grids),
        )

    def resolve_grids(
        self,
        num_images: int,
        num_vision_tokens: int | tuple[int, int] | list | None = None,
        vision_token_grids: torch.LongTensor | None = None,
        input_ids: torch.LongTensor | None = None,
    ) -> list[tuple[int, int]]:
        """
        The grid of each image: `vision_token_grids` if given, else `num_vision_tokens`, else the uniform count that
        the placeholders in `input_ids` imply.

        Args:
            num_images (`int`): The number of images that the vision tower sees.
            num_vision_tokens (`int`, `tuple[int, int]` or a list of these, *optional*): Counts or grids.
            vision_token_grids (`torch.LongTensor` of shape `(num_images, 2)`, *optional*): (rows, columns) of each image.
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): The prompts.

        Returns:
            `list[tuple[int, int]]`: (rows, columns) per image.

        Raises:
            ValueError: If a count or grid is not allowed, their number is not that of the images, or
                `num_vision_tokens` and `vision_token_grids` disagree.
        """
        patch_grid = self.config.patch_grid
        asked = None
        if num_vision_tokens is not None:
            asked = resolve_vision_token_grids(num_vision_tokens, num_images, patch_grid)
        # A count given as an integer keeps traced graphs free of reading one off a tensor.
        if asked is not None and (vision_token_grids is None or is_compiling()):
            return asked
        if vision_token_grids is None:
            return infer_vision_token_grids(input_ids, num_images, self.config.image_token_id, patch_grid)
        vision_token_grids = torch.as_tensor(vision_token_grids)
        if vision_token_grids.ndim != 2 or vision_token_grids.shape[1] != 2:
            raise ValueError(
                f"`vision_token_grids` has shape {tuple(vision_token_grids.shape)}: give (rows, columns) of each image, "
                f"shape ({num_images}, 2)."
            )
        grids = [tuple(grid) for grid in vision_token_grids.tolist()]
        grids = resolve_vision_token_grids(grids, num_images, patch_grid, "vision_token_grids")
        if asked is not None and asked != grids:
            raise ValueError(
                f"`num_vision_tokens`={num_vision_tokens} is not what the inputs were encoded with "
                f"(`vision_token_grids`={grids}): `forward` does not rewrite prompts. Call `generate`, or "
                "`recount_vision_tokens` first."
            )
        return grids

    def _find_placeholders(self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor) -> torch.BoolTensor:
        if input_ids is not None:
            return (input_ids == self.config.image_token_id).to(inputs_embeds.device)
        placeholder = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(placeholder)).all(-1)

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor,
        image_features: torch.Tensor,
    ) -> torch.BoolTensor:
        """
        Marks the positions that image features replace.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): The prompts.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`):
                Their embeddings, in which placeholders are found where there are no `input_ids`.
            image_features (`torch.Tensor` of shape `(total_vision_tokens, hidden_size)`): The features to place.

        Returns:
            `torch.BoolTensor` of shape `(batch_size, sequence_length, 1)`.

        Raises:
            ValueError: If there are not as many placeholders as features.
        """
        mask = self._find_placeholders(input_ids, inputs_embeds)
        num_tokens = mask.sum()
        torch_compilable_check(
            num_tokens == image_features.shape[0],
            lambda: (
                f"Image features and image tokens do not match: {num_tokens} image tokens in the prompts, "
                f"{image_features.shape[0]} image features."
            ),
        )
        return mask.unsqueeze(-1)

    def _idle_image_features(self) -> torch.Tensor | float:
        """
        Zero, by way of tower and projector when these are trained or shared out: every rank then has gradients for
        the same weights, and takes part in gathering them, when its batch happens to hold no image.
        """
        parameters = [*self.vision_tower.parameters(), *self.multi_modal_projector.parameters()]
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not is_distributed and not any(parameter.requires_grad for parameter in parameters):
            return 0.0
        size = (1, self.config.vision_config.num_channels, *self.config.image_size)
        image = torch.zeros(size, device=self.device, dtype=self.dtype)
        return 0.0 * self.get_image_features(image, num_vision_tokens=1, return_dict=True).pooler_output.sum()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_vision_tokens: int | tuple[int, int] | list | None = None,
        vision_token_grids: torch.LongTensor | None = None,
        image_indices: torch.LongTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        num_tiles: torch.LongTensor | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, TokenFlexImageOutput] | None = None,
        segment_ids: torch.LongTensor | None = None,
        sample_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | TokenFlexModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The prompts, with one run of `image_token_id` per image.
            pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`, *optional*):
                The images of all prompts in order of appearance.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for tokens, 0 for padding. Defaults to no padding.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The tokens' positions. Default to the language model's own count of them.
            past_key_values (`Cache`, *optional*):
                Keys and values of the tokens before `input_ids`.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                The prompts' embeddings in place of `input_ids`.
            num_vision_tokens (`int`, `tuple[int, int]` or a list of these, *optional*):
                The counts the prompts were encoded with, when `vision_token_grids` is not given.
            vision_token_grids (`torch.LongTensor` of shape `(num_images, 2)`, *optional*):
                (rows, columns) of each image, as the processor returns it.
            image_indices (`torch.LongTensor` of shape `(num_appearances,)`, *optional*):
                Which of `pixel_values` each run of placeholders shows; `vision_token_grids` is then per run. Defaults
                to each its own, in order.
            image_sizes, num_tiles, mm_token_type_ids (`torch.LongTensor`, *optional*):
                Accepted since the processor can return them; only `generate` reads the first two.
            mm_encoder_outputs (`dict[str, TokenFlexImageOutput]`, *optional*):
                `{"image": model.get_image_features(...)}`, in place of `pixel_values`.
            segment_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Several continuations behind one shared prefix: 0 for the prefix, 1, 2, ... for each continuation, -1
                for padding. Each continuation sees the prefix and itself, with the positions it would have alone.
            sample_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Several samples in one row: 0, 1, ... for each, -1 for padding. Each sees only itself, with the
                positions it would have alone; its segments are told apart by `segment_ids`.

        In training, a batch without images still passes a blank image through tower and projector when these are
        trained or the run is distributed, with no effect on the result.

        Raises:
            ValueError: If placeholders and images do not match, arguments exclude each other, or the attention
                implementation cannot keep segments apart.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        if pixel_values is not None and mm_encoder_outputs is not None:
            raise ValueError("Give `pixel_values` or `mm_encoder_outputs`, not both.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        image_outputs = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            if num_vision_tokens is None and vision_token_grids is None:
                placeholders = self._find_placeholders(input_ids, inputs_embeds)
                seen_ids = torch.where(placeholders, self.config.image_token_id, -1)
                num_vision_tokens = self.resolve_grids(len(pixel_values), input_ids=seen_ids)
            image_outputs = self.get_image_features(
                pixel_values, num_vision_tokens, vision_token_grids, image_indices, return_dict=True
            )
        image_features = None
        if image_outputs is not None:
            image_features = image_outputs.pooler_output
            flat_features = torch.cat(list(image_features)) if isinstance(image_features, list) else image_features
            flat_features = flat_features.reshape(-1, inputs_embeds.shape[-1]).to(inputs_embeds)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, flat_features)
            if len(flat_features):
                # What `masked_scatter` does, in a third of the time.
                places = (mask.flatten().cumsum(0) - 1).clamp(min=0).view(mask.shape[:2])
                inputs_embeds = torch.where(mask, nn.functional.embedding(places, flat_features), inputs_embeds)
        elif self.training and torch.is_grad_enabled():
            inputs_embeds = inputs_embeds + self._idle_image_features()

        if segment_ids is not None or sample_ids is not None:
            implementation = self.language_model.config._attn_implementation or ""
            if "flash" in implementation:
                raise ValueError(
                    f"`attn_implementation`={implementation!r} takes no mask that keeps segments of a row apart: load "
                    "the model with 'sdpa', 'eager' or 'flex_attention', or give each question a row of its own."
                )
            text_config = self.language_model.config
            layer_types = set(getattr(text_config, "layer_types", None) or ())
            windowed = layer_types & {"sliding_attention", "chunked_attention"}
            if unmasked := sorted(layer_types - windowed - {"full_attention"}):
                raise ValueError(
                    f"The language model's layers of type {', '.join(unmasked)} carry a state from one segment of a row "
                    "into the next: give each question a row of its own, and do not pack."
                )
            windows = [getattr(text_config, name, None) for name in ("sliding_window", "attention_chunk_size")]
            window = min((size for size in windows if size), default=inputs_embeds.shape[1])
            if segment_ids is not None and windowed and inputs_embeds.shape[1] > window:
                raise ValueError(
                    f"Rows of {inputs_embeds.shape[1]} tokens are longer than the attention window of {window}, which "
                    "counts the segments that stand between a segment and its prefix: give each question a row of its own."
                )
            if attention_mask is None:
                attention_mask = (segment_ids if segment_ids is not None else sample_ids) >= 0
            position_ids = packed_position_ids(segment_ids, sample_ids)
            attention_mask = create_packed_masks(text_config, inputs_embeds, attention_mask, segment_ids, sample_ids)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        return TokenFlexModelOutputWithPast(**outputs, image_hidden_states=image_features)


class TokenFlexForConditionalGeneration(TokenFlexPreTrainedModel, TokenFlexGenerationMixin):
    """
    TokenFLEX with a language-modelling head: images and text in, text out, at any number of vision tokens.

    Args:
        config ([`TokenFlexConfig`]): The configuration.

    Example:

    ```python
    >>> from PIL import Image
    >>> from tokenflex.towers.tiny import tiny_model_and_processor

    >>> model, processor = tiny_model_and_processor()  # random weights; yours come from `from_pretrained`
    >>> messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which color is it?"}]}]
    >>> prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    >>> inputs = processor(images=Image.new("RGB", (64, 64)), text=prompt, return_tensors="pt")
    >>> output = model.generate(**inputs, num_vision_tokens=4, max_new_tokens=2)
    >>> output[:, inputs["input_ids"].shape[1] :].shape[0]
    1
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: TokenFlexConfig):
        super().__init__(config)
        self.model = TokenFlexModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def keep_image_features(self, max_images: int | None = 64) -> ImageFeatureCache | None:
        """See [`TokenFlexModel.keep_image_features`]."""
        return self.model.keep_image_features(max_images)

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        num_vision_tokens: int | tuple[int, int] | list | None = None,
        vision_token_grids: torch.LongTensor | None = None,
        image_indices: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | TokenFlexImageOutput:
        """See [`TokenFlexModel.get_image_features`]."""
        return self.model.get_image_features(
            pixel_values, num_vision_tokens, vision_token_grids, image_indices, **kwargs
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_vision_tokens: int | tuple[int, int] | list | None = None,
        vision_token_grids: torch.LongTensor | None = None,
        image_indices: torch.LongTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        num_tiles: torch.LongTensor | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, TokenFlexImageOutput] | None = None,
        segment_ids: torch.LongTensor | None = None,
        sample_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | TokenFlexCausalLMOutputWithPast:
        """
        Args as in [`TokenFlexModel.forward`], and:

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids to predict; -100 is ignored, and image tokens should be -100.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Compute logits for the last so many positions only; 0 means all.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            num_vision_tokens=num_vision_tokens,
            vision_token_grids=vision_token_grids,
            image_indices=image_indices,
            mm_encoder_outputs=mm_encoder_outputs,
            segment_ids=segment_ids,
            sample_ids=sample_ids,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        softcap = getattr(self.config.text_config, "final_logit_softcapping", None)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)  # Gemma 2 does so in its own head
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return TokenFlexCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


TokenFlexConfig.register_for_auto_class()
TokenFlexModel.register_for_auto_class("AutoModel")
TokenFlexForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")


__all__ = [
    "TokenFlexForConditionalGeneration",
    "TokenFlexModel",
    "TokenFlexPreTrainedModel",
    "TokenFlexProjector",
    "pooling_weights",
]
