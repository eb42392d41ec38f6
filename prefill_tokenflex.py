"""The prefill of a batch whose rows have different numbers of vision tokens."""

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.distributed import is_fsdp_managed_module
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import ModelOutput


MAX_PADDING = 0.05


def group_by_length(lengths: list[int], max_padding: float = MAX_PADDING) -> list[list[int]]:
    """
    Rows that can share a batch without much padding: each is padded by no more than a fraction of its own length.

    Args:
        lengths (`list[int]`): The number of tokens of each row.
        max_padding (`float`, *optional*, defaults to 0.05): That fraction.

    Returns:
        `list[list[int]]`: The rows of each group, the group of the longest rows first.

    Example:

    ```python
    >>> from tokenflex.prefill_tokenflex import group_by_length

    >>> group_by_length([280, 90, 275, 88])
    [[0, 2], [1, 3]]
    ```
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if groups and lengths[groups[-1][0]] <= (1 + max_padding) * lengths[row]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


class TokenFlexPrefillMixin(GenerationMixin):
    """Prefills rows of like length together, so that a short prompt is not padded to the length of a long one."""

    def _prefill(
        self,
        input_ids: torch.LongTensor,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        is_first_iteration: bool = True,
    ) -> ModelOutput:
        groups = self._groups(input_ids, generation_config, model_kwargs) if is_first_iteration else []
        if len(groups) < 2:
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        cache, mask = model_kwargs["past_key_values"], model_kwargs["attention_mask"]
        features = _features_by_row(input_ids, model_kwargs, self.config.image_token_id)
        length = input_ids.shape[1]
        logits, parts = None, []
        for rows, longest in groups:
            index = torch.tensor(rows, device=input_ids.device)
            part = DynamicCache(config=self.config)
            inputs = {
                **model_kwargs,
                "attention_mask": mask[index.to(mask.device), length - longest :],
                "past_key_values": part,
                "mm_encoder_outputs": {
                    "image": BaseModelOutputWithPooling(pooler_output=torch.cat([features[row] for row in rows]))
                },
            }
            for name in _ALONG_SEQUENCE:
                if inputs.get(name) is not None:
                    inputs[name] = inputs[name][index.to(inputs[name].device), length - longest :]
            prepared = self.prepare_inputs_for_generation(
                input_ids[index, length - longest :], is_first_iteration=True, **inputs
            )
            outputs = self(**prepared, return_dict=True)
            if logits is None:
                logits = outputs.logits.new_empty((len(input_ids), *outputs.logits.shape[1:]))
            logits[index.to(logits.device)] = outputs.logits
            parts.append((index, part))
        _join_caches(cache, parts, len(input_ids), length)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _groups(
        self, input_ids: torch.LongTensor, generation_config: GenerationConfig, model_kwargs: dict
    ) -> list[tuple[list[int], int]]:
        """The rows of each group and their longest's length; nothing where the batch has to stay together."""
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        if (
            type(cache) is not DynamicCache
            or not cache.layers
            or any(type(layer) is not DynamicLayer for layer in cache.layers)
            or cache.get_seq_length()
            or cache.offloading
            or not (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
            or model_kwargs.get("inputs_embeds") is not None
            or model_kwargs.get("logits_to_keep") != 1
            or mask is None
            or mask.shape != input_ids.shape
            or generation_config.prefill_chunk_size is not None
            or generation_config.output_hidden_states
            or generation_config.output_attentions
            or _are_weights_shared_out(self)
        ):
            return []
        counts = (input_ids == self.config.image_token_id).sum(-1).tolist()
        if len(set(counts)) < 2:
            return []
        if not mask[:, -1].all():  # padded on the right
            return []
        lengths = (mask.shape[1] - mask.long().argmax(-1)).tolist()
        return [(rows, lengths[rows[0]]) for rows in group_by_length(lengths)]


_ALONG_SEQUENCE = ("position_ids", "mm_token_type_ids", "token_type_ids")


def _features_by_row(input_ids: torch.LongTensor, model_kwargs: dict, image_token_id: int) -> tuple[torch.Tensor, ...]:
    """The vision tokens of each row, tensors of shape `(num_vision_tokens, hidden_size)`."""
    features = model_kwargs["mm_encoder_outputs"]["image"].pooler_output
    features = torch.cat(list(features)) if isinstance(features, (list, tuple)) else features.flatten(0, -2)
    return features.split((input_ids == image_token_id).sum(-1).tolist())


def _join_caches(
    cache: DynamicCache, parts: list[tuple[torch.Tensor, DynamicCache]], batch_size: int, length: int
) -> None:
    """Fills an empty cache with the rows of several, padded on the left. Empties these as it goes."""
    for number, layer in enumerate(cache.layers):
        if not parts[0][1].layers[number].is_initialized:  # shares another layer's
            continue
        states = []
        for name in ("keys", "values"):
            joined = None
            for index, part in parts:
                state = getattr(part.layers[number], name)
                if joined is None:
                    joined = state.new_zeros(batch_size, state.shape[1], length, state.shape[3])
                joined[index.to(state.device), :, length - state.shape[2] :] = state
            states.append(joined)
        for _, part in parts:
            part.layers[number].reset()
        layer.lazy_initialization(*states)
        layer.keys, layer.values = states


def _are_weights_shared_out(model) -> bool:
    """Whether all processes have to make the same calls."""
    return is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
