"""PyTorch TokenFLEX model ([arXiv 2504.03154](https://huggingface.co/papers/2504.03154))."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, torch_compilable_check
from transformers.utils.generic import can_return_tuple

from .configuration_tokenflex import TokenFlexConfig, resolve_vision_token_grid, resolve_vision_token_grids


# What the new positions of a re-counted or re-padded row hold, per tensor that runs along the sequence.
SEQUENCE_FILL_VALUES = {
    "attention_mask": 0,
    "labels": -100,
    "mm_token_type_ids": 0,
    "token_type_ids": 0,
    "segment_ids": -1,
}


def pooling_weights(
    input_size: int, output_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """
    The matrix that averages `input_size` values into `output_size` windows, window i spanning
    `floor(i * input_size / output_size)` to `ceil((i + 1) * input_size / output_size)`. Applied to rows and columns it
    equals `torch.nn.functional.adaptive_avg_pool2d`, and unlike it is deterministic on every device and can be
    exported for sizes that do not divide each other.

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


def infer_vision_token_grids(
    input_ids: torch.LongTensor, num_images: int, image_token_id: int, patch_grid: tuple[int, int]
) -> list[tuple[int, int]]:
    """
    Reads a uniform square count off the placeholders of hand-built inputs.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): The prompts.
        num_images (`int`): How many images the placeholders stand for.
        image_token_id (`int`): The placeholder's id.
        patch_grid (`tuple[int, int]`): Rows and columns of the vision tower's patch grid.

    Returns:
        `list[tuple[int, int]]`: One (rows, columns) per image.

    Raises:
        ValueError: If the placeholders cannot be that many images with one square count.
    """
    row_counts = (input_ids == image_token_id).sum(-1).tolist()
    count, remainder = divmod(sum(row_counts), num_images)
    if remainder or count == 0 or any(row_count % count for row_count in row_counts):
        raise ValueError(
            f"Image features and image tokens do not match: the rows hold {row_counts} image tokens for {num_images} "
            "images, which is no uniform count per image. Pass `vision_token_grids` as the processor returns it."
        )
    return [resolve_vision_token_grid(count, patch_grid, "image tokens per image in `input_ids`")] * num_images


def first_placeholders(
    input_ids: torch.LongTensor, vision_token_counts: torch.LongTensor, image_token_id: int
) -> torch.LongTensor:
    """
    Finds where each image's run of placeholders begins.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): The prompts.
        vision_token_counts (`torch.LongTensor` of shape `(num_images,)`): The length of each image's run.
        image_token_id (`int`): The placeholder's id.

    Returns:
        `torch.LongTensor` of shape `(num_images,)`: Positions in the flattened `input_ids`.

    Raises:
        ValueError: If the placeholders are not such runs, each unbroken and within one row.
    """
    length = input_ids.shape[-1]
    placeholders = (input_ids == image_token_id).flatten().nonzero().squeeze(-1)
    ends = vision_token_counts.cumsum(0)
    matched = int(vision_token_counts.sum()) == len(placeholders)
    if matched:
        first, last = placeholders[ends - vision_token_counts], placeholders[ends - 1]
        matched = bool(((last - first + 1 == vision_token_counts) & (first // length == last // length)).all())
    if not matched:
        raise ValueError(
            f"Image features and image tokens do not match: `input_ids` holds {len(placeholders)} image tokens, but its "
            f"{len(vision_token_counts)} images were encoded as {vision_token_counts.tolist()} tokens in unbroken runs."
        )
    return first


def recount_vision_tokens(
    inputs: Mapping[str, torch.Tensor],
    vision_token_grids: Sequence[tuple[int, int]],
    image_token_id: int,
    pad_token_id: int | None = None,
) -> dict[str, torch.Tensor]:
    """
    Rewrites encoded inputs to other vision-token counts, as if they had been encoded so in the first place: every
    image's run of placeholders gets its new length in each tensor that runs along the sequence, and rows are padded
    again on the side they were padded on.

    Args:
        inputs (`Mapping[str, torch.Tensor]`):
            A processor's or collator's output: `input_ids` of shape `(batch_size, sequence_length)`,
            `vision_token_grids` of shape `(num_images, 2)` with the grids as encoded, optionally `attention_mask`,
            `labels`, `mm_token_type_ids`, `token_type_ids` and `segment_ids`. Other entries are passed through, except
            `position_ids`, which is dropped.
        vision_token_grids (sequence of `tuple[int, int]`):
            The new (rows, columns) per image.
        image_token_id (`int`):
            The placeholder's id.
        pad_token_id (`int`, *optional*):
            The id that pads `input_ids`; 0 when there is none, since the mask hides it.

    Returns:
        `dict[str, torch.Tensor]`: New tensors; the caller's are left as they were.

    Raises:
        ValueError: If the runs of placeholders do not match the encoded grids.

    Example:

    ```python
    >>> import torch
    >>> from tokenflex import recount_vision_tokens

    >>> inputs = {"input_ids": torch.tensor([[5, 9, 9, 9, 9, 6]]), "vision_token_grids": torch.tensor([[2, 2]])}
    >>> recount_vision_tokens(inputs, [(1, 1)], image_token_id=9)["input_ids"]
    tensor([[5, 9, 6]])
    ```
    """
    input_ids = inputs["input_ids"]
    batch_size, length = input_ids.shape
    device = input_ids.device
    attention_mask = inputs.get("attention_mask")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` of shape {tuple(attention_mask.shape)} cannot be re-counted: give one of the shape of "
            f"`input_ids`, {tuple(input_ids.shape)}."
        )
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    first = first_placeholders(input_ids, inputs["vision_token_grids"].to(device).prod(-1), image_token_id)
    new_counts = torch.tensor(vision_token_grids, dtype=torch.long, device=device).reshape(-1, 2).prod(-1)
    if len(first) != len(new_counts):
        raise ValueError(f"{len(new_counts)} new counts are asked for, but the inputs hold {len(first)} images.")

    # Every position is copied once, the first placeholder of an image as often as its new count, padding never.
    copies = ((mask.cumsum(-1) > 0) & (mask.flip(-1).cumsum(-1).flip(-1) > 0)).long().flatten()
    copies[(input_ids == image_token_id).flatten()] = 0
    copies[first] = new_counts
    row_lengths = copies.view(batch_size, length).sum(-1)
    new_length = int(row_lengths.max())
    pad_right = bool((mask[:, -1] == 0).any()) and bool((mask[:, 0] == 1).all())
    source = torch.repeat_interleave(torch.arange(batch_size * length, device=device), copies)
    row = source // length
    row_starts = row_lengths.cumsum(0) - row_lengths
    offset = torch.zeros_like(row_lengths) if pad_right else new_length - row_lengths
    target = row * new_length + offset[row] + torch.arange(len(source), device=device) - row_starts[row]

    def rewrite(tensor: torch.Tensor, fill: int) -> torch.Tensor:
        flat = tensor.new_full((batch_size * new_length,), fill)
        flat[target] = tensor.reshape(-1)[source]
        return flat.view(batch_size, new_length)

    recounted = {key: value for key, value in inputs.items() if key != "position_ids"}
    recounted["input_ids"] = rewrite(input_ids, 0 if pad_token_id is None else pad_token_id)
    if attention_mask is None and new_length * batch_size != len(source):
        recounted["attention_mask"] = mask
    for key, fill in SEQUENCE_FILL_VALUES.items():
        if recounted.get(key) is not None:
            recounted[key] = rewrite(recounted[key], fill)
    recounted["vision_token_grids"] = torch.tensor(vision_token_grids, dtype=torch.long, device=device).reshape(-1, 2)
    return recounted


def segment_position_ids(segment_ids: torch.LongTensor) -> torch.LongTensor:
    """
    Positions for rows in which several continuations share one prefix: each counts on from the prefix's end.

    Args:
        segment_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            0 for the shared prefix, 1, 2, ... for each continuation, -1 for padding; each in one unbroken run.

    Returns:
        `torch.LongTensor` of shape `(batch_size, sequence_length)`.

    Example:

    ```python
    >>> import torch
    >>> from tokenflex.modeling_tokenflex import segment_position_ids

    >>> segment_position_ids(torch.tensor([[0, 0, 1, 1, 2, 2, -1]])).tolist()
    [[0, 1, 2, 3, 2, 3, 0]]
    ```
    """
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    run_start = torch.where(starts, index, 0).cummax(-1).values
    prefix_length = (segment_ids == 0).sum(-1, keepdim=True)
    return index - run_start + (segment_ids > 0) * prefix_length


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

    def forward(
        self, patch_features: torch.Tensor, grids: Sequence[tuple[int, int]]
    ) -> torch.Tensor | list[torch.Tensor]:
        """
        Args:
            patch_features (`torch.Tensor` of shape `(num_images, num_patches, vision_hidden_size)`):
                The tower's features.
            grids (sequence of `tuple[int, int]`):
                (rows, columns) for each image.

        Returns:
            `torch.Tensor` of shape `(num_images, num_vision_tokens, hidden_size)` when all grids are equal, else a
            list with one `(num_vision_tokens, hidden_size)` tensor per image.
        """
        patch_features = patch_features.to(self.swiglu.gate.weight.dtype)
        if len(set(grids)) == 1:
            return self.swiglu(self.pool(patch_features, grids[0]))
        features = [None] * len(grids)
        for grid in dict.fromkeys(grids):
            members = [i for i, other in enumerate(grids) if other == grid]
            for i, tokens in zip(members, self.swiglu(self.pool(patch_features[members], grid))):
                features[i] = tokens
        return features


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


class TokenFlexPreTrainedModel(PreTrainedModel):
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

    def post_init(self):
        super().post_init()
        # A tower registers classes that only its text half has; FSDP refuses names it cannot find.
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = {name for name in self._no_split_modules if name in present}


class TokenFlexModel(TokenFlexPreTrainedModel):
    """The vision tower, the projector and the language model, without a head."""

    def __init__(self, config: TokenFlexConfig):
        config.check_vision_tokens()  # loading sets attributes after the config has checked itself
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = TokenFlexProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        num_vision_tokens: int | tuple[int, int] | list | None = None,
        vision_token_grids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
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

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: `pooler_output` holds the vision tokens, a
            tensor of shape `(num_images, num_vision_tokens, hidden_size)`, or a list with one 2-D tensor per image
            when counts differ; `last_hidden_state` the patch features of shape
            `(num_images, num_patches, vision_hidden_size)` they were pooled from.

        Raises:
            ValueError: If a count is not allowed, the two arguments disagree, or the images do not have the tower's
                size.
        """
        vision_config = self.config.vision_config
        size = vision_config.image_size
        expected = (vision_config.num_channels, *(size if isinstance(size, (list, tuple)) else (size, size)))
        if tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)}, but this tower takes (num_images, "
                f"{', '.join(map(str, expected))}): use the processor saved with the checkpoint."
            )
        if num_vision_tokens is None and vision_token_grids is None:
            num_vision_tokens = self.config.num_vision_tokens
        grids = self.resolve_grids(len(pixel_values), num_vision_tokens, vision_token_grids)
        if self.config.vision_feature_layer != -1:
            kwargs["output_hidden_states"] = True
        outputs = self.vision_tower(pixel_values, return_dict=True, **kwargs)
        if self.config.vision_feature_layer != -1:
            outputs.last_hidden_state = outputs.hidden_states[self.config.vision_feature_layer]
        outputs.pooler_output = self.multi_modal_projector(outputs.last_hidden_state, grids)
        return outputs

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
        if asked is not None and (vision_token_grids is None or torch.compiler.is_compiling()):
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

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor,
        image_features: torch.Tensor,
    ) -> torch.BoolTensor:
        """
        Marks the positions that image features replace.

        Returns:
            `torch.BoolTensor` of shape `(batch_size, sequence_length, 1)`.

        Raises:
            ValueError: If there are not as many placeholders as features.
        """
        if input_ids is None:
            placeholder = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(placeholder)).all(-1)
        else:
            mask = (input_ids == self.config.image_token_id).to(inputs_embeds.device)
        num_tokens = mask.sum()
        torch_compilable_check(
            num_tokens == image_features.shape[0],
            lambda: (
                f"Image features and image tokens do not match: {num_tokens} image tokens in the prompts, "
                f"{image_features.shape[0]} image features."
            ),
        )
        return mask.unsqueeze(-1)

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
        mm_token_type_ids: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        segment_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | TokenFlexModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The prompts, with one run of `image_token_id` per image.
            pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`, *optional*):
                The images of all prompts in order of appearance.
            num_vision_tokens (`int`, `tuple[int, int]` or a list of these, *optional*):
                The counts the prompts were encoded with, when `vision_token_grids` is not given.
            vision_token_grids (`torch.LongTensor` of shape `(num_images, 2)`, *optional*):
                (rows, columns) of each image, as the processor returns it.
            mm_token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Accepted since processors can return it; the placeholders say the same.
            mm_encoder_outputs (`dict[str, BaseModelOutputWithPooling]`, *optional*):
                `{"image": model.get_image_features(...)}`, in place of `pixel_values`.
            segment_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Several continuations behind one shared prefix: 0 for the prefix, 1, 2, ... for each continuation, -1
                for padding. Each continuation sees the prefix and itself, with the positions it would have alone.

        Raises:
            ValueError: If placeholders and images do not match, or arguments exclude each other.
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
                if input_ids is None:
                    raise ValueError("With `inputs_embeds`, give `vision_token_grids` or `num_vision_tokens` as well.")
                num_vision_tokens = self.resolve_grids(len(pixel_values), input_ids=input_ids)
            image_outputs = self.get_image_features(
                pixel_values, num_vision_tokens, vision_token_grids, return_dict=True
            )
        image_features = None
        if image_outputs is not None:
            image_features = image_outputs.pooler_output
            flat_features = torch.cat(list(image_features)) if isinstance(image_features, list) else image_features
            flat_features = flat_features.reshape(-1, inputs_embeds.shape[-1]).to(inputs_embeds)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, flat_features)
            inputs_embeds = inputs_embeds.masked_scatter(mask, flat_features)

        if segment_ids is not None:
            position_ids = segment_position_ids(segment_ids)
            attention_mask = create_causal_mask(
                config=self.language_model.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=None,
                position_ids=position_ids,
                and_mask_function=lambda batch, head, query, key: (
                    (segment_ids[batch, key] == 0) | (segment_ids[batch, key] == segment_ids[batch, query])
                ),
            )
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        return TokenFlexModelOutputWithPast(**outputs, image_hidden_states=image_features)


class TokenFlexForConditionalGeneration(TokenFlexPreTrainedModel, GenerationMixin):
    """
    TokenFLEX with a language-modelling head: images and text in, text out, at any number of vision tokens.

    Example:

    ```python
    >>> from PIL import Image
    >>> from tokenflex.training.tiny import tiny_model_and_processor

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

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        num_vision_tokens: int | tuple[int, int] | list | None = None,
        vision_token_grids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """See [`TokenFlexModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, num_vision_tokens, vision_token_grids, **kwargs)

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
        mm_token_type_ids: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        segment_ids: torch.LongTensor | None = None,
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
            mm_encoder_outputs=mm_encoder_outputs,
            segment_ids=segment_ids,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
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

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args,
        num_vision_tokens: int | tuple[int, int] | list | None = None,
        **kwargs,
    ):
        """
        [`~transformers.GenerationMixin.generate`] at a chosen number of vision tokens, whatever count the inputs were
        encoded with: the prompt really gets shorter or longer, and the result equals encoding at that count.

        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The prompts, as `input_ids`.
            generation_config (`GenerationConfig`, *optional*):
                As in transformers. An entry `num_vision_tokens` in it is used when the argument is not given, and one
                in the model's own generation config when neither is.
            num_vision_tokens (`int`, `tuple[int, int]` or a list of these, *optional*):
                A count n*n or grid (rows, columns) for all images, or a list with one per image in order of
                appearance. Defaults to the counts as encoded.
            kwargs:
                As in transformers.

        Returns:
            As in transformers. Sequences begin with the caller's `input_ids`, so
            `output[:, input_ids.shape[1]:]` is the answer at every count.

        Raises:
            ValueError: If a count is not allowed, placeholders and images do not match, or prompts would have to be
                rewritten that cannot be: behind a filled cache, or given as `inputs_embeds`.
        """
        for config in (generation_config, self.generation_config):
            if num_vision_tokens is None:
                num_vision_tokens = getattr(config, "num_vision_tokens", None)
        if num_vision_tokens is not None and not isinstance(num_vision_tokens, list):
            resolve_vision_token_grid(num_vision_tokens, self.config.patch_grid)
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        pixel_values = kwargs.get("pixel_values")
        image_outputs = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if pixel_values is None and image_outputs is None:
            self._refuse_placeholders_without_images(input_ids, kwargs.get("past_key_values"))
            return super().generate(input_ids, generation_config, *args, **kwargs)
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            if num_vision_tokens is not None:
                raise ValueError(
                    f"`num_vision_tokens`={num_vision_tokens} cannot be applied to `inputs_embeds`: pass `input_ids`, or "
                    "embed the prompt at that count."
                )
            return super().generate(input_ids, generation_config, *args, **kwargs)

        num_images = len(pixel_values if pixel_values is not None else image_outputs.last_hidden_state)
        encoded = self.model.resolve_grids(
            num_images, vision_token_grids=kwargs.get("vision_token_grids"), input_ids=input_ids
        )
        first_placeholders(
            input_ids, torch.tensor(encoded, device=input_ids.device).prod(-1), self.config.image_token_id
        )
        grids = encoded
        if num_vision_tokens is not None:
            grids = resolve_vision_token_grids(num_vision_tokens, num_images, self.config.patch_grid)
        prompt = {
            **kwargs,
            "input_ids": input_ids,
            "vision_token_grids": torch.tensor(encoded, device=input_ids.device),
        }
        if grids != encoded:
            cache = kwargs.get("past_key_values")
            if cache is not None and cache.get_seq_length() > 0:
                raise ValueError(
                    f"`num_vision_tokens`={num_vision_tokens} would rewrite a prompt of which {cache.get_seq_length()} "
                    "tokens are already in `past_key_values`: start with an empty cache."
                )
            pad_token_id = self._pad_token_id(generation_config)
            if prompt.get("attention_mask") is None and pad_token_id is not None:
                prompt["attention_mask"] = (input_ids != pad_token_id).long()
            prompt = recount_vision_tokens(prompt, grids, self.config.image_token_id, pad_token_id)
        if image_outputs is not None:
            tokens = self.model.multi_modal_projector(image_outputs.last_hidden_state, grids)
            prompt["mm_encoder_outputs"] = {"image": type(image_outputs)(**{**image_outputs, "pooler_output": tokens})}
        rewritten = prompt.pop("input_ids")
        output = super().generate(rewritten, generation_config, *args, **prompt)
        if grids == encoded:
            return output
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        answers = sequences[:, rewritten.shape[1] :]
        caller_ids = input_ids.repeat_interleave(len(answers) // len(input_ids), dim=0).to(answers.device)
        sequences = torch.cat([caller_ids, answers], dim=-1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        return output

    def _refuse_placeholders_without_images(self, input_ids: torch.LongTensor | None, cache: Cache | None) -> None:
        cached = cache.get_seq_length() if cache is not None else 0
        if input_ids is not None and (input_ids[:, cached:] == self.config.image_token_id).any():
            raise ValueError(
                "Image features and image tokens do not match: there are no images, but `input_ids` holds image tokens "
                f"behind the {cached} tokens in `past_key_values`. Pass `pixel_values`; a prompt that was rewritten to "
                "another count cannot be continued from its cache."
            )

    def _pad_token_id(self, generation_config: GenerationConfig | None) -> int | None:
        for config in (generation_config, self.generation_config):
            if getattr(config, "pad_token_id", None) is not None:
                return config.pad_token_id
        return None


TokenFlexConfig.register_for_auto_class()
TokenFlexModel.register_for_auto_class("AutoModel")
TokenFlexForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")


__all__ = [
    "TokenFlexForConditionalGeneration",
    "TokenFlexModel",
    "TokenFlexPreTrainedModel",
    "TokenFlexProjector",
    "pooling_weights",
    "recount_vision_tokens",
]
