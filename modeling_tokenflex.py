"""PyTorch TokenFLEX model ([arXiv 2504.03154](https://huggingface.co/papers/2504.03154))."""

import copy
import functools
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.compiler import is_compiling
from transformers import AutoModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, torch_compilable_check
from transformers.utils.generic import can_return_tuple

from .configuration_tokenflex import TokenFlexConfig, resolve_vision_token_grids
from .generation_tokenflex import TokenFlexChooser, TokenFlexGenerationMixin
from .packing_tokenflex import pack_attention
from .placeholders_tokenflex import encoded_grids, first_placeholders
from .projector_tokenflex import TokenFlexProjector, pixel_unshuffle


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
        image_outputs ([`TokenFlexImageOutput`], *optional*):
            The images' features, as [`~TokenFlexModel.get_image_features`] returns them.
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
        if config.vision_token_chooser is not None:
            choices = config.vision_token_chooser["choices"]
            self.vision_token_chooser = TokenFlexChooser(len(choices), config.text_config.hidden_size)
        self.post_init()

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
                The image that each appearance in the prompts shows, when they stand in another order or appear more
                than once; counts and grids are then per appearance. The tower runs once per image.

        Returns:
            [`TokenFlexImageOutput`]: `pooler_output` holds the vision tokens, a tensor of shape
            `(num_images, num_vision_tokens, hidden_size)`, or a list with one 2-D tensor per image when counts differ;
            `last_hidden_state` the features of shape `(num_images, num_patches, vision_feature_size)` they were pooled
            from, without class tokens and registers; `vision_token_grids` the grids.

        Raises:
            ValueError: If a count is not allowed, the two arguments disagree, or the images do not have the tower's
                size.
        """
        if num_vision_tokens is None and vision_token_grids is None:
            num_vision_tokens = self.config.num_vision_tokens
        num_appearances = len(pixel_values) if image_indices is None else len(image_indices)
        grids = self._resolve_grids(num_appearances, num_vision_tokens, vision_token_grids)
        outputs = self.encode_images(pixel_values, **kwargs)
        patch_features = outputs.last_hidden_state
        if image_indices is not None:
            patch_features = patch_features[image_indices]
        image_outputs = self.pool_image_features(patch_features, grids)
        image_outputs.hidden_states, image_outputs.attentions = outputs.hidden_states, outputs.attentions
        return image_outputs

    def encode_images(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]):
        """
        The tower's output for images, arguments as in [`~TokenFlexModel.get_image_features`], with the features that
        are to be pooled as its `last_hidden_state`.
        """
        config, layers = self.config, self.config.vision_feature_layer
        expected = (config.vision_config.num_channels, *config.image_size)
        if tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)}, but this tower takes (num_images, "
                f"{', '.join(map(str, expected))}): use the processor saved with the checkpoint."
            )
        if layers != -1:
            kwargs["output_hidden_states"] = True
        outputs = self.vision_tower(pixel_values.to(self.vision_tower.dtype), return_dict=True, **kwargs)
        features = outputs.last_hidden_state
        if layers != -1:
            layers = [layers] if isinstance(layers, int) else layers
            features = torch.cat([outputs.hidden_states[layer] for layer in layers], dim=-1)
        if features.ndim == 4:  # of a convolutional tower: (num_images, hidden_size, rows, columns)
            features = features.flatten(2).transpose(1, 2)
        num_patches = math.prod(config.patch_grid) * config.downsample_factor**2
        if features.shape[1] != config.num_prefix_tokens + num_patches:
            raise ValueError(
                f"The vision tower returned {features.shape[1]} features per image, but `num_prefix_tokens`="
                f"{config.num_prefix_tokens} and the tower's patches make {config.num_prefix_tokens + num_patches}."
            )
        features = features[:, config.num_prefix_tokens :]
        if config.downsample_factor > 1:
            features = pixel_unshuffle(features, config.patch_grid, config.downsample_factor)
        outputs.last_hidden_state = features
        return outputs

    def pool_image_features(self, patch_features: torch.Tensor, grids: list[tuple[int, int]]) -> TokenFlexImageOutput:
        """
        Pools patch features kept from [`~TokenFlexModel.get_image_features`] to other counts, without the tower.

        Args:
            patch_features (`torch.Tensor` of shape `(num_images, num_patches, vision_hidden_size)`):
                `last_hidden_state` of the kept output.
            grids (`list[tuple[int, int]]`): (rows, columns) for each image.

        Returns:
            [`TokenFlexImageOutput`]

        Raises:
            ValueError: If the features have another width than this model's tower.
        """
        width = self.config.vision_feature_size
        if patch_features.shape[-1] != width:
            raise ValueError(
                f"The patch features are {patch_features.shape[-1]} wide, but this model's vision tower makes "
                f"{width}: keep features, and draft with an assistant, of a model with the same tower."
            )
        features = self.multi_modal_projector(patch_features, grids, self.config.patch_grid)
        if len(set(grids)) > 1:
            features = list(features.split([rows * columns for rows, columns in grids]))
        return TokenFlexImageOutput(
            last_hidden_state=patch_features, pooler_output=features, vision_token_grids=list(grids)
        )

    def _resolve_grids(self, num_images: int, num_vision_tokens, vision_token_grids) -> list[tuple[int, int]]:
        """The grid of each image from the arguments of `forward`, which have to agree."""
        asked = None
        if num_vision_tokens is not None:
            asked = resolve_vision_token_grids(num_vision_tokens, num_images, self.config.patch_grid)
        # A count given as an integer keeps traced graphs free of reading one off a tensor.
        if asked is not None and (vision_token_grids is None or is_compiling()):
            return asked
        given = {"vision_token_grids": vision_token_grids, "pixel_values": range(num_images)}
        grids = encoded_grids(given, self.config)
        if asked is not None and asked != grids:
            raise ValueError(
                f"`num_vision_tokens`={num_vision_tokens} is not what the inputs were encoded with "
                f"(`vision_token_grids`={grids}): `forward` does not rewrite prompts. Call `generate`, or `at_count` "
                "first."
            )
        return grids

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
            num_vision_tokens (`int`, `tuple[int, int]` or a list of these, *optional*):
                The counts the prompts were encoded with, when `vision_token_grids` is not given.
            vision_token_grids (`torch.LongTensor` of shape `(num_images, 2)`, *optional*):
                (rows, columns) of each image, as the processor returns it.
            image_indices (`torch.LongTensor` of shape `(num_appearances,)`, *optional*):
                The entry of `pixel_values` that each run of placeholders shows; `vision_token_grids` is then per run.
                Defaults to each its own, in order.
            image_shapes, num_tiles, mm_token_type_ids (`torch.LongTensor`, *optional*):
                Accepted since the processor can return them; only `generate` reads the first two.
            mm_encoder_outputs (`dict[str, TokenFlexImageOutput]`, *optional*):
                `{"image": model.get_image_features(...)}`, in place of `pixel_values`. Features without a
                `pooler_output`, as [`at_count`] leaves them, are pooled here. `{}` leaves placeholders without images.
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

        image_outputs = (mm_encoder_outputs or {}).get("image")
        images = pixel_values if image_outputs is None else image_outputs.last_hidden_state
        is_pooled = image_outputs is not None and image_outputs.pooler_output is not None
        if images is not None and not is_pooled:
            if num_vision_tokens is None and vision_token_grids is None:
                placeholders = self._find_placeholders(input_ids, inputs_embeds)
                seen_ids = torch.where(placeholders, self.config.image_token_id, -1)
                vision_token_grids = encoded_grids({"input_ids": seen_ids, "pixel_values": images}, self.config)
            if image_outputs is None:
                names = ("output_hidden_states", "output_attentions")
                asked = {name: kwargs[name] for name in names if name in kwargs}
                image_outputs = self.get_image_features(
                    pixel_values, num_vision_tokens, vision_token_grids, image_indices, **asked, return_dict=True
                )
            else:
                grids = self._resolve_grids(len(images), num_vision_tokens, vision_token_grids)
                image_outputs = self.pool_image_features(images, grids)
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
        num_vision_tokens: int | tuple[int, int] | list | None = None,
        vision_token_grids: torch.LongTensor | None = None,
        image_indices: torch.LongTensor | None = None,
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
