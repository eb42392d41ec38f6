"""PyTorch TokenFLEX model ([arXiv 2504.03154](https://huggingface.co/papers/2504.03154))."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.compiler import is_compiling
from transformers import AutoModel
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import and_masks, create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, torch_compilable_check
from transformers.utils.generic import can_return_tuple

from .configuration_tokenflex import TokenFlexConfig
from .generation_tokenflex import TokenFlexChooser, TokenFlexGenerationMixin
from .placeholders_tokenflex import TokenFlexImageOutput, encoded_grids, first_placeholders, kept_features
from .vision_tokenflex import TokenFlexProjector, TokenFlexVisionMixin


@dataclass
class TokenFlexModelOutputWithPast(BaseModelOutputWithPast):
    """
    Args:
        image_outputs ([`TokenFlexImageOutput`], *optional*):
            The images' features, as [`~TokenFlexVisionMixin.get_image_features`] returns them.
    """

    image_outputs: TokenFlexImageOutput | None = None


@dataclass
class TokenFlexCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Args as in [`TokenFlexModelOutputWithPast`]."""

    image_outputs: TokenFlexImageOutput | None = None


def _spare_vision(quantization_config):
    quantization_config = copy.deepcopy(quantization_config)
    values = quantization_config if isinstance(quantization_config, dict) else vars(quantization_config)
    is_bnb = values.get("quant_method") == "bitsandbytes" or values.get("load_in_4bit") or values.get("load_in_8bit")
    name = "llm_int8_skip_modules" if is_bnb else "modules_to_not_convert"
    if values.get(name) is None:
        values[name] = [r"(.*\.)?vision_tower", r"(.*\.)?multi_modal_projector", "lm_head"]
    return quantization_config


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
    >>> from tokenflex.modeling_tokenflex import packed_position_ids

    >>> packed_position_ids(torch.tensor([[0, 0, 1, 1, 2, 2, -1]])).tolist()
    [[0, 1, 2, 3, 2, 3, 0]]
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
    Restricts beyond the causal rule what a position sees, as transformers' mask functions do: to its own sample, and
    in it to the shared prefix and its own continuation. Arguments as in [`packed_position_ids`].
    """

    def same_sample(batch, head, query, key):
        return sample_ids[batch, key] == sample_ids[batch, query]

    def prefix_or_own(batch, head, query, key):
        return (segment_ids[batch, key] == 0) | (segment_ids[batch, key] == segment_ids[batch, query])

    rules = ((same_sample, sample_ids), (prefix_or_own, segment_ids))
    return and_masks(*(rule for rule, ids in rules if ids is not None))


def create_packed_masks(
    config: PreTrainedConfig,
    inputs_embeds: torch.FloatTensor,
    attention_mask: torch.Tensor,
    segment_ids: torch.LongTensor | None = None,
    sample_ids: torch.LongTensor | None = None,
):
    """
    Makes the masks of a language model's layers, in which positions see what [`packed_mask_function`] says: a mask, or
    one for each type of layer. Arguments as in [`pack_attention`].
    """
    may_see = packed_mask_function(segment_ids, sample_ids)
    inputs = (config, inputs_embeds, attention_mask, None)  # the last is a cache
    if config._attn_implementation == "flex_attention":
        return create_masks_for_generate(*inputs, and_mask_function=may_see)
    # Dense masks are intersected here: handed over as above, the function would be mapped over every position.
    index = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
    rows = torch.arange(inputs_embeds.shape[0], device=inputs_embeds.device)
    seen = may_see(rows[:, None, None, None], None, index[:, None], index)

    def intersect(mask: torch.Tensor | None) -> torch.Tensor:
        if mask is None:  # plain causal
            return seen & (index <= index[:, None])
        return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)

    masks = create_masks_for_generate(*inputs)
    return {name: intersect(mask) for name, mask in masks.items()} if isinstance(masks, dict) else intersect(masks)


def pack_attention(
    config: PreTrainedConfig,
    inputs_embeds: torch.FloatTensor,
    attention_mask: torch.Tensor | None = None,
    segment_ids: torch.LongTensor | None = None,
    sample_ids: torch.LongTensor | None = None,
):
    """
    Makes the masks and positions of packed rows, for language models that can keep segments apart.

    Args:
        config (`PreTrainedConfig`): The language model's.
        inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`): For shape and dtype.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            0 for padding. Defaults to the padding of the ids.
        segment_ids, sample_ids: As in [`packed_position_ids`].

    Returns:
        `tuple`: The masks, and positions of shape `(batch_size, sequence_length)`.

    Raises:
        ValueError: If the attention implementation or a kind of layer cannot keep segments apart.
    """
    implementation = config._attn_implementation or ""
    if "flash" in implementation:
        raise ValueError(
            f"`attn_implementation`={implementation!r} takes no mask that keeps segments of a row apart: load "
            "the model with 'sdpa', 'eager' or 'flex_attention', or give each question a row of its own."
        )
    layer_types, length = set(getattr(config, "layer_types", None) or ()), inputs_embeds.shape[1]
    windowed = layer_types & {"sliding_attention", "chunked_attention"}
    if unmasked := sorted(layer_types - windowed - {"full_attention"}):
        raise ValueError(
            f"The language model's layers of type {', '.join(unmasked)} carry a state from one segment of a row "
            "into the next: give each question a row of its own, and do not pack."
        )
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    window = min((size for size in windows if size), default=length)
    if segment_ids is not None and windowed and length > window:
        raise ValueError(
            f"Rows of {length} tokens are longer than the attention window of {window}, which "
            "counts the segments that stand between a segment and its prefix: give each question a row of its own."
        )
    if attention_mask is None:
        attention_mask = (segment_ids if segment_ids is not None else sample_ids) >= 0
    masks = create_packed_masks(config, inputs_embeds, attention_mask, segment_ids, sample_ids)
    return masks, packed_position_ids(segment_ids, sample_ids)


class TokenFlexPreTrainedModel(PreTrainedModel):
    """Loading, initialization and splitting over devices, common to TokenFLEX models."""

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

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds all weights unrounded, in which a saved model is loaded by default."""
        dtypes = {weight.dtype for weight in self.parameters() if weight.is_floating_point() and weight.itemsize > 1}
        return functools.reduce(torch.promote_types, dtypes or {torch.get_default_dtype()})

    @classmethod
    def is_custom_code(cls) -> bool:
        # For custom code transformers takes a module without parameters of its own as initialized, so that
        # towers would miss the rules they have for whole layers. No class here has an `_init_weights` of its own.
        return False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, quantization_config=None, **kwargs):
        """
        As in transformers, but a `quantization_config` that does not say what to leave as it is leaves the vision
        tower, the projector and the head: together they are a few percent of the weights, and the widths of towers
        such as SigLIP-so400m do not divide into quantization groups.
        """
        if quantization_config is not None:
            kwargs["quantization_config"] = _spare_vision(quantization_config)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    def post_init(self):
        super().post_init()
        # A tower registers classes that only its text half has; FSDP refuses names it cannot find.
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = {name for name in self._no_split_modules if name in present}


class TokenFlexModel(TokenFlexPreTrainedModel, TokenFlexVisionMixin):
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
        if config.vision_token_chooser is not None:
            choices = config.vision_token_chooser["choices"]
            self.vision_token_chooser = TokenFlexChooser(len(choices), config.text_config.hidden_size)
        self.post_init()

    def _find_placeholders(self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor) -> torch.BoolTensor:
        if input_ids is not None:
            return (input_ids == self.config.image_token_id).to(inputs_embeds.device)
        placeholder = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(placeholder)).all(-1)

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.BoolTensor:
        """
        Marks the positions that `image_features` of shape `(total_vision_tokens, hidden_size)` replace, in a mask of
        shape `(batch_size, sequence_length, 1)`. `inputs_embeds` are searched where there are no `input_ids`.

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

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_vision_tokens: int | tuple[int, int] | str | list | None = None,
        vision_token_grids: torch.LongTensor | None = None,
        image_indices: torch.LongTensor | None = None,
        image_resolutions: torch.LongTensor | None = None,
        image_size: int | tuple[int, int] | None = None,
        image_shapes: torch.LongTensor | None = None,
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
            num_vision_tokens (`int`, `tuple[int, int]`, `str` or a list of these, *optional*):
                The counts the prompts were encoded with, when `vision_token_grids` is not given.
            vision_token_grids (`torch.LongTensor` of shape `(num_images, 2)`, *optional*):
                (rows, columns) of each image, as the processor returns it.
            image_indices (`torch.LongTensor` of shape `(num_appearances,)`, *optional*):
                The entry of `pixel_values` that each run of placeholders shows; `vision_token_grids` is then per run.
                Defaults to each its own, in order.
            image_resolutions (`torch.LongTensor` of shape `(num_images, 2)`, *optional*):
                (height, width) in pixels that the tower is to see each image at, as the processor returns it where
                resolutions were asked for. Default to those that go with the counts.
            image_size (`int` or `tuple[int, int]`, *optional*):
                The resolution in pixels for all images, when `image_resolutions` is not given.
            image_shapes, num_tiles, mm_token_type_ids (`torch.LongTensor`, *optional*):
                Accepted since the processor can return them; only `generate` reads the first two.
            mm_encoder_outputs (`dict[str, TokenFlexImageOutput]`, *optional*):
                `{"image": model.get_image_features(...)}`, in place of `pixel_values`, or a list of such outputs for
                several resolutions. Features without a `pooler_output`, as [`at_count`] leaves them, are pooled here.
                `{}` leaves placeholders without images.
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
        if input_ids is not None and pixel_values is None and mm_encoder_outputs is None:
            cache = kwargs.get("cache", past_key_values)  # as transformers calls it from 5.24 on
            # A step of decoding must not make the host wait, and a compiled graph cannot.
            if input_ids.shape[1] > 1 and not is_compiling() and (cache is None or not cache.get_seq_length()):
                first_placeholders(input_ids, [], self.config.image_token_id)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        kept = kept_features({"mm_encoder_outputs": mm_encoder_outputs})
        image_outputs = kept[0] if kept else None
        images = pixel_values if image_outputs is None else image_outputs.last_hidden_state
        is_pooled = len(kept) == 1 and kept[0].pooler_output is not None
        if images is not None and not is_pooled:
            if num_vision_tokens is None and vision_token_grids is None:
                placeholders = self._find_placeholders(input_ids, inputs_embeds)
                seen_ids = torch.where(placeholders, self.config.image_token_id, -1)
                vision_token_grids = encoded_grids({"input_ids": seen_ids, "pixel_values": images}, self.config)
            if image_outputs is None:
                names = ("output_hidden_states", "output_attentions")
                asked = {name: kwargs[name] for name in names if name in kwargs}
                grids = (num_vision_tokens, vision_token_grids, image_indices, image_resolutions, image_size)
                image_outputs = self.get_image_features(pixel_values, *grids, **asked, return_dict=True)
            else:
                asked = (num_vision_tokens, vision_token_grids, image_resolutions, image_size)
                image_outputs = self.pool_kept_features(kept, *self._resolve_grids(len(images), *asked))
        if image_outputs is not None:
            image_features = image_outputs.pooler_output
            flat_features = torch.cat(list(image_features)) if isinstance(image_features, list) else image_features
            flat_features = flat_features.reshape(-1, inputs_embeds.shape[-1]).to(inputs_embeds)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, flat_features)
            if len(flat_features):
                # The result of `masked_scatter`, in a third of the time.
                places = (mask.flatten().cumsum(0) - 1).clamp(min=0).view(mask.shape[:2])
                inputs_embeds = torch.where(mask, nn.functional.embedding(places, flat_features), inputs_embeds)
        elif self.training and torch.is_grad_enabled():
            inputs_embeds = inputs_embeds + self._idle_image_features()

        if segment_ids is not None or sample_ids is not None:
            attention_mask, position_ids = pack_attention(
                self.language_model.config, inputs_embeds, attention_mask, segment_ids, sample_ids
            )
        if past_key_values is not None:
            kwargs["past_key_values"] = past_key_values
        inputs = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "position_ids": position_ids}
        outputs = self.language_model(**inputs, return_dict=True, **kwargs)
        return TokenFlexModelOutputWithPast(**outputs, image_outputs=image_outputs)


class TokenFlexForConditionalGeneration(TokenFlexPreTrainedModel, TokenFlexGenerationMixin):
    """
    TokenFLEX with a language-modeling head: images and text in, text out, at any number of vision tokens.

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
    >>> answer = model.generate(**inputs, num_vision_tokens=4, max_new_tokens=2)[:, inputs["input_ids"].shape[1] :]
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: TokenFlexConfig):
        super().__init__(config)
        self.model = TokenFlexModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def _say_if_tied(self):
        # Of weights that are offloaded nothing can be told.
        head, embeddings = self.get_output_embeddings().weight, self.get_input_embeddings().weight
        if head.device.type != "meta":
            self.config.tie_word_embeddings = self.config.text_config.tie_word_embeddings = head is embeddings

    def resize_token_embeddings(self, *args, **kwargs):
        """As in transformers; a head that was untied from the embeddings stays so."""
        self._say_if_tied()
        return super().resize_token_embeddings(*args, **kwargs)

    def save_pretrained(self, *args, **kwargs):
        """As in transformers; the config says if the head is tied to the embeddings, whatever it said."""
        self._say_if_tied()
        super().save_pretrained(*args, **kwargs)

    @functools.wraps(TokenFlexModel.get_image_features)
    def get_image_features(self, *args, **kwargs):
        return self.model.get_image_features(*args, **kwargs)

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
        num_vision_tokens: int | tuple[int, int] | str | list | None = None,
        vision_token_grids: torch.LongTensor | None = None,
        image_indices: torch.LongTensor | None = None,
        image_resolutions: torch.LongTensor | None = None,
        image_size: int | tuple[int, int] | None = None,
        image_shapes: torch.LongTensor | None = None,
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
            image_resolutions=image_resolutions,
            image_size=image_size,
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
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return TokenFlexCausalLMOutputWithPast(loss=loss, logits=logits, **others)


TokenFlexConfig.register_for_auto_class()
TokenFlexModel.register_for_auto_class("AutoModel")
TokenFlexForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
