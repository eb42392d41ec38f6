"""The prefill of a batch whose rows have different numbers of vision tokens."""

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.configuration_utils import PreTrainedConfig
from transformers.distributed import is_fsdp_managed_module
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import ModelOutput


MAX_PADDING = 0.05
# A GPU reads the weights once for every pass, which takes as long as computing about so many tokens.
MIN_TOKENS_ON_ACCELERATORS = 256
_ALONG_SEQUENCE = ("position_ids", "mm_token_type_ids", "token_type_ids")


def group_by_length(lengths: list[int], min_tokens: int = 0) -> list[list[int]]:
    """
    Rows that share a pass: each is padded by no more than 5 % of its own length, unless a pass of their own would take
    longer than the padding.

    Args:
        lengths (`list[int]`): The number of tokens of each row.
        min_tokens (`int`, *optional*, defaults to 0): A pass over fewer tokens takes as long as one over so many.

    Returns:
        `list[list[int]]`: The rows of each group, the group of the longest rows first.

    Example:

    ```python
    >>> from tokenflex.prefill_tokenflex import group_by_length

    >>> group_by_length([280, 90, 275, 88])
    [[0, 2], [1, 3]]
    >>> group_by_length([280, 90, 275, 88], min_tokens=1000)
    [[0, 2, 1, 3]]
    ```
    """

    def cost(rows: list[int]) -> int:
        return max(len(rows) * lengths[rows[0]], min_tokens)

    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if groups and lengths[groups[-1][0]] <= (1 + MAX_PADDING) * lengths[row]:
            groups[-1].append(row)
        else:
            groups.append([row])
    joined: list[list[int]] = []
    for rows in groups:
        if joined and cost(joined[-1] + rows) <= cost(joined[-1]) + cost(rows):
            joined[-1] += rows
        else:
            joined.append(rows)
    return joined


class TokenFlexPrefillMixin(GenerationMixin):
    """Prefills rows of like length together, so that a short prompt is not padded to the length of a long one."""

    def _prefill(
        self,
        input_ids: torch.LongTensor,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        is_first_iteration: bool = True,
    ) -> ModelOutput:
        groups = []
        if is_first_iteration and _can_be_split(input_ids, generation_config, model_kwargs):
            groups = self._group_rows(input_ids, model_kwargs["attention_mask"])
        if len(groups) < 2:
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        features = model_kwargs["mm_encoder_outputs"]["image"].pooler_output
        features = torch.cat(list(features)) if isinstance(features, (list, tuple)) else features.flatten(0, -2)
        features = features.split((input_ids == self.config.image_token_id).sum(-1).tolist())
        cache, length, logits = model_kwargs["past_key_values"], input_ids.shape[1], None
        for rows, longest in groups:
            index, part = torch.tensor(rows, device=input_ids.device), DynamicCache(config=self.config)
            inputs = {**model_kwargs, "past_key_values": part}
            for name in ("attention_mask", *_ALONG_SEQUENCE):
                if inputs.get(name) is not None:
                    inputs[name] = inputs[name][index.to(inputs[name].device), length - longest :]
            own_features = torch.cat([features[row] for row in rows])
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=own_features)}
            outputs = self(
                **self.prepare_inputs_for_generation(
                    input_ids[index, length - longest :], is_first_iteration=True, **inputs
                ),
                return_dict=True,
            )
            if logits is None:
                logits = outputs.logits.new_empty((len(input_ids), *outputs.logits.shape[1:]))
            logits[index.to(logits.device)] = outputs.logits
            _place_rows(cache, part, index, len(input_ids), length)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _group_rows(
        self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor
    ) -> list[tuple[list[int], int]]:
        """The rows of each group and their longest's length; nothing where all rows have to stay together."""
        counts = (input_ids == self.config.image_token_id).sum(-1).tolist()
        if len(set(counts)) < 2 or _needs_equal_passes(self) or _rotates_by_length(self.config.text_config):
            return []
        lengths = (attention_mask.shape[1] - attention_mask.long().argmax(-1)).tolist()
        min_tokens = 0 if input_ids.device.type == "cpu" else MIN_TOKENS_ON_ACCELERATORS
        return [(rows, lengths[rows[0]]) for rows in group_by_length(lengths, min_tokens)]


def _can_be_split(input_ids: torch.LongTensor, generation_config: GenerationConfig, model_kwargs: dict) -> bool:
    """Whether nothing was asked for that one pass over all rows has to give."""
    cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
    is_plain_cache = (
        type(cache) is DynamicCache
        and not cache.offloading
        and bool(cache.layers)
        and all(type(layer) is DynamicLayer for layer in cache.layers)
        and cache.get_seq_length() == 0
    )
    is_plain_prompt = (
        model_kwargs.get("inputs_embeds") is None
        and mask is not None
        and mask.shape == input_ids.shape
        and bool((model_kwargs.get("mm_encoder_outputs") or {}).get("image"))
    )
    return (
        is_plain_cache
        and is_plain_prompt
        and model_kwargs.get("logits_to_keep") == 1
        and generation_config.prefill_chunk_size is None
        and not generation_config.output_hidden_states
        and not generation_config.output_attentions
    )


def _needs_equal_passes(model: nn.Module) -> bool:
    """
    Whether all processes have to make the same calls, weights would be moved to the device for every one of them,
    adapters were chosen for each row, or another `forward` stands in the place of the model's own, such as one that
    exporters watch or that is compiled.
    """
    replaced = vars(model).get("forward")
    if getattr(replaced, "__func__", replaced) not in (None, type(model).forward) and not hasattr(model, "_hf_hook"):
        return True
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        if any(getattr(one, "offload", False) for one in getattr(hook, "hooks", [hook])):
            return True
        if isinstance(getattr(module, "disable_adapters", None), bool) and module._forward_pre_hooks:
            return True
    return is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)


def _rotates_by_length(text_config: PreTrainedConfig) -> bool:
    """Whether the angles of rotary positions depend on how long the batch is."""
    parameters = getattr(text_config, "rope_parameters", None) or {}
    by_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
    return any(one.get("rope_type") in ("dynamic", "longrope") for one in [parameters, *by_layer_type])


def _place_rows(cache: DynamicCache, part: DynamicCache, rows: torch.LongTensor, batch_size: int, length: int) -> None:
    """Writes what some rows have cached into the cache of all, padded on the left."""
    for layer, own in zip(cache.layers, part.layers):
        if not own.is_initialized:  # it shares another layer's
            continue
        if not layer.is_initialized:
            layer.lazy_initialization(own.keys, own.values)
            layer.keys, layer.values = (
                state.new_zeros(batch_size, state.shape[1], length, state.shape[3]) for state in (own.keys, own.values)
            )
        rows = rows.to(own.keys.device)
        layer.keys[rows, :, length - own.keys.shape[2] :] = own.keys
        layer.values[rows, :, length - own.values.shape[2] :] = own.values
