"""LoRA and QLoRA through PEFT: adapters on the language model, the projector trained whole."""

import re
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from ..modeling_tokenflex import TokenFlexForConditionalGeneration


def lora_config(
    model: TokenFlexForConditionalGeneration,
    rank: int = 16,
    alpha: int = 32,
    dropout: float = 0.0,
    vision_tower: bool = False,
):
    """
    Adapters on every linear layer inside the language model's decoder layers; the projector is trained whole, and
    embeddings, head and vision tower stay as they are.

    Args:
        model ([`TokenFlexForConditionalGeneration`]): The model to adapt, of which only the names of layers are read.
        rank (`int`, *optional*, defaults to 16): The rank of each adapter.
        alpha (`int`, *optional*, defaults to 32): Adapters are scaled by `alpha / rank`.
        dropout (`float`, *optional*, defaults to 0.0): The dropout on the adapters' inputs.
        vision_tower (`bool`, *optional*, defaults to `False`): Give the vision tower's layers adapters too.

    Returns:
        `peft.LoraConfig`: For [`add_adapters`], `peft.get_peft_model` or TRL's `peft_config`.

    Raises:
        ValueError: If `rank` is not positive.

    Example:

    ```python
    >>> from tokenflex.training.lora import lora_config
    >>> from tokenflex.towers.tiny import tiny_model_and_processor

    >>> model, processor = tiny_model_and_processor()
    >>> lora_config(model).target_modules.split("|")[0]
    'model\\\\.language_model\\\\.layers\\\\.\\\\d+\\\\.mlp\\\\.down_proj'
    ```
    """
    from peft import LoraConfig

    if rank < 1:
        raise ValueError(f"`rank`={rank}: an adapter needs a positive rank, such as 16.")
    patterns = set()
    for part in ("language_model", *["vision_tower"] * vision_tower):
        for layer_name, layer in getattr(model.model, part).named_modules(prefix=f"model.{part}"):
            if not isinstance(layer, GradientCheckpointingLayer):
                continue
            for name, module in layer.named_modules(prefix=layer_name):
                if isinstance(module, nn.Linear):
                    patterns.add(re.sub(r"\d+(?=\\\.)", r"\\d+", re.escape(name)))
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="|".join(sorted(patterns)),  # PEFT matches an expression whole, a list by any name's ending
        modules_to_save=["multi_modal_projector"],
    )


def add_adapters(model: TokenFlexForConditionalGeneration, config):
    """
    `peft.get_peft_model` with all that is trained in float32, also in a model of a narrower dtype or quantized: there
    PEFT widens adapters, but would train the projector in bfloat16, where small updates are lost to rounding.

    Args:
        model ([`TokenFlexForConditionalGeneration`]): The model, which is changed in place.
        config (`peft.LoraConfig`): As [`lora_config`] makes it.

    Returns:
        `peft.PeftModel`: To be given to a `Trainer`.

    Example:

    ```python
    >>> from tokenflex.training.lora import add_adapters, lora_config
    >>> from tokenflex.towers.tiny import tiny_model_and_processor

    >>> model, processor = tiny_model_and_processor()
    >>> adapted = add_adapters(model, lora_config(model, rank=8))
    >>> sum(weight.requires_grad for weight in adapted.parameters())  # 2 layers x 7 x (A, B), and the projector's 3
    31
    ```
    """
    from peft import get_peft_model

    adapted = get_peft_model(model, config)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return adapted


def merge_adapters(
    base: str | Path, adapter: str | Path, dtype: str | torch.dtype = "auto"
) -> TokenFlexForConditionalGeneration:
    """
    Loads the checkpoint that adapters were trained on, and adds them to its weights. A head tied to the embeddings
    gets weights of its own where adapters change one of the two.

    Args:
        base (`str` or `Path`):
            Hub id or folder of the checkpoint, as it was before it was adapted, and not quantized.
        adapter (`str` or `Path`):
            Hub id or folder of the adapters, as `PeftModel.save_pretrained` or the `Trainer` wrote it.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            The dtype of the merged weights; `"auto"` is the checkpoint's, to which the sum is rounded.

    Returns:
        [`TokenFlexForConditionalGeneration`]: A model without adapters, to be saved with
        [`~tokenflex.checkpoints.files.save_checkpoint`].

    Raises:
        ValueError: If `base` is a quantized checkpoint.

    Example:

    ```python
    >>> import tempfile
    >>> from tokenflex.training.lora import add_adapters, lora_config, merge_adapters
    >>> from tokenflex.towers.tiny import tiny_model_and_processor

    >>> base, adapter = tempfile.mkdtemp(), tempfile.mkdtemp()
    >>> model, processor = tiny_model_and_processor()
    >>> model.save_pretrained(base)
    >>> add_adapters(model, lora_config(model)).save_pretrained(adapter)
    >>> type(merge_adapters(base, adapter)).__name__
    'TokenFlexForConditionalGeneration'
    ```
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if getattr(AutoConfig.from_pretrained(base), "quantization_config", None) is not None:
        raise ValueError(
            f"`base`={str(base)!r} holds quantized weights, to which adapters cannot be added without rounding them "
            "again: name the checkpoint from which it was quantized."
        )
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype)
    adapted = PeftModel.from_pretrained(model, adapter)
    for module in (model.get_output_embeddings(), model.get_input_embeddings()):
        if isinstance(module, BaseTunerLayer):  # what it adds to its weight must not be added to one tied to it
            layer = module.get_base_layer()
            layer.weight = nn.Parameter(layer.weight.detach().clone())
    return adapted.merge_and_unload()


def nf4_config(compute_dtype: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """
    QLoRA's quantization ([arXiv 2305.14314](https://huggingface.co/papers/2305.14314)): 4-bit NormalFloat with
    quantized constants. As `quantization_config` of `from_pretrained` it leaves vision tower, projector and head as
    they are. Needs the package bitsandbytes.

    Args:
        compute_dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): The dtype of products.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
