"""Liger kernels ([arXiv 2410.10989](https://huggingface.co/papers/2410.10989)): training without logits in memory."""

import functools
from types import MethodType

from transformers.utils.generic import can_return_tuple

from ..modeling_tokenflex import TokenFlexCausalLMOutputWithPast, TokenFlexForConditionalGeneration


def register_liger() -> None:
    """
    Tells the package liger-kernel of this model, so that `TrainingArguments(use_liger_kernel=True)` works: the
    language model gets the kernels that Liger has for its type, and the head is fused with the loss, so that a
    training step never holds the logits. Called once, before training.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    MODEL_TYPE_TO_APPLY_LIGER_FN[TokenFlexForConditionalGeneration.config_class.model_type] = apply_liger_kernels


def apply_liger_kernels(
    model: TokenFlexForConditionalGeneration,
    rope: bool = True,
    rms_norm: bool = True,
    swiglu: bool = True,
    geglu: bool = True,
    cross_entropy: bool = False,
    fused_linear_cross_entropy: bool = True,
) -> None:
    """
    Applies Liger's kernels to one model. Like Liger's own functions this replaces parts of transformers' module for
    the language model, so that models made from then on have them too.

    Args:
        model ([`TokenFlexForConditionalGeneration`]):
            The model, which is changed in place.
        rope, rms_norm, swiglu, geglu (`bool`, *optional*, default to `True`):
            Whether the language model's rotary embedding, norms and gated layers are replaced, as far as Liger has
            them for its type.
        cross_entropy (`bool`, *optional*, defaults to `False`):
            Whether the loss of given logits is replaced.
        fused_linear_cross_entropy (`bool`, *optional*, defaults to `True`):
            Whether training computes the loss without making logits; the output's `logits` are then `None`.

    Raises:
        ValueError: If both losses are asked for.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    if cross_entropy and fused_linear_cross_entropy:
        raise ValueError(
            "`cross_entropy`=True takes logits, which `fused_linear_cross_entropy`=True does not make: choose one."
        )
    _apply_liger_kernel_to_instance(
        model=model.model.language_model,
        rope=rope,
        rms_norm=rms_norm,
        swiglu=swiglu,
        geglu=geglu,
        cross_entropy=cross_entropy,
        fused_linear_cross_entropy=False,  # the language model here has no head
    )
    if fused_linear_cross_entropy:
        model.forward = MethodType(_fused_forward, model)


# `generate` reads the signature to tell which arguments a model takes.
@functools.wraps(TokenFlexForConditionalGeneration.forward)
@can_return_tuple
def _fused_forward(self, *args, labels=None, logits_to_keep=0, skip_logits=None, **kwargs):
    from liger_kernel.transformers.model.loss_utils import LigerForCausalLMLoss

    # The Trainer says `skip_logits` when it evaluates the loss alone.
    if labels is None or not (self.training if skip_logits is None else skip_logits):
        return type(self).forward(self, *args, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
    outputs = self.model(*args, return_dict=True, **kwargs)
    text_config = self.config.text_config
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    loss = LigerForCausalLMLoss(
        outputs.last_hidden_state[:, kept, :].contiguous(),
        self.lm_head.weight,
        labels,
        hidden_size=text_config.hidden_size,
        final_logit_softcapping=getattr(text_config, "final_logit_softcapping", None),
        **kwargs,
    )
    return TokenFlexCausalLMOutputWithPast(
        loss=loss,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
        image_outputs=outputs.image_outputs,
    )
