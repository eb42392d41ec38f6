"""`tokenflex adopt`: a TokenFLEX checkpoint from a vision-language model of transformers with a fixed count."""

from argparse import ArgumentParser
from pathlib import Path

import PIL.Image
import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from ..checkpoints.files import save_checkpoint
from ..checkpoints.provenance import ADOPTED, add_stage, public_names
from ..choices_tokenflex import parse_choice
from ..configuration_tokenflex import TokenFlexConfig, count_prefix_tokens
from ..modeling_tokenflex import TokenFlexForConditionalGeneration
from ..processing_tokenflex import TokenFlexProcessor
from .build import default_vision_tokens, flexible_generation_config, largest_shard
from .families import Family, find_family
from .identity import Identity, check_identity
from .pretrained import IMAGE_OPTIONS, load_images_processor, quiet_loading, read_config, refuse_missing


def adopt_model(
    model: str | Path,
    *,
    num_vision_tokens: int | str | None = None,
    vision_token_choices: list[int | str] | None = None,
    vision_token_weights: list[float] | None = None,
    dtype: str | torch.dtype | None = None,
) -> tuple[TokenFlexForConditionalGeneration, TokenFlexProcessor, Identity]:
    """
    Makes a vision-language model of transformers token-flexible: tower, connector, language model, image processor,
    tokenizer and chat template stay as they are, and pooling is put before the connector. At its own count the model
    is the same model, which is checked on a built-in image; at every other count it works untrained, and tuning
    (`adopt/tune.yaml`) wins back what small counts lose.

    LLaVA 1.5, LLaVA-Interleave, VipLLaVA, InternVL (in transformers' format), Aya Vision, Idefics3 and SmolVLM see an
    image whole, without tiles; of LLaVA-NeXT and LLaVA-OneVision the view of the whole image is kept, without the
    embedding that ends a line of tiles.

    Args:
        model (`str` or `Path`):
            Hub id or folder of the model and its processor.
        num_vision_tokens (`int` or `str`, *optional*):
            The vision-token count per image when none is asked for. Defaults to the model's own.
        vision_token_choices (`list[int | str]`, *optional*):
            The counts that tuning draws from. Default to about a quarter, 9/16 and all of the model's own count.
        vision_token_weights (`list[float]`, *optional*):
            One weight per choice, given together with the choices. By default the model's own count weighs four times
            as much as all others together, so that tuning leaves the model there what it was.
        dtype (`str` or `torch.dtype`, *optional*):
            The dtype of all weights. Defaults to the model's.

    Returns:
        `tuple[TokenFlexForConditionalGeneration, TokenFlexProcessor, Identity]`: The model and its processor, to be
        saved with [`~tokenflex.checkpoints.files.save_checkpoint`], and what was compared with the original.

    Raises:
        ValueError: If the family is not known, parts or weights are missing or do not fit, a count is not allowed, or
            the model would not be the same at its own count.

    Example:

    ```python
    >>> from tokenflex.towers.adopt import adopt_model

    >>> model, processor, identity = adopt_model("llava-hf/llava-1.5-7b-hf")  # doctest: +SKIP
    >>> model.config.num_vision_tokens, model.config.vision_token_choices  # doctest: +SKIP
    (576, [144, 324, 576])
    ```
    """
    checkpoint = str(model)
    # Whatever can be wrong is found before weights are read.
    source_config = read_config("model", checkpoint)
    family = find_family(checkpoint, source_config)
    source_processor = load_images_processor(checkpoint, source_config)
    image_token_id = _find_image_token(checkpoint, source_config, source_processor, family)
    _describe_tower(source_config, source_processor, family)
    parts = _read_parts(checkpoint, source_config, family) | {"image_token_id": image_token_id}
    smallest = {"num_vision_tokens": 1, "vision_token_choices": [1], "vision_token_weights": [1.0]}
    patch_grid = TokenFlexConfig(**parts, **smallest).patch_grid
    pooling = source_config.projector_pooling_ratio if family.pools_last else 1
    native = tuple(side // pooling for side in patch_grid)
    if vision_token_choices is None and vision_token_weights is None:
        vision_token_choices, _ = default_vision_tokens(patch_grid, min(native))
    has_weights = vision_token_weights is not None
    config_options = parts | {
        "num_vision_tokens": min(native) ** 2 if num_vision_tokens is None else num_vision_tokens,
        "vision_token_choices": vision_token_choices,
        "vision_token_weights": vision_token_weights if has_weights else [1] * len(vision_token_choices),
    }
    TokenFlexConfig(**config_options)
    if not has_weights:
        own, others = min(native) ** 2, len(vision_token_choices) - 1
        weights = [max(4 * others, 1) if count == own else 1 for count in vision_token_choices]
        config_options["vision_token_weights"] = weights

    source = _load_model(checkpoint, source_config, dtype or "auto")
    projector, tower = source.model.get_submodule(family.projector), source.model.get_submodule(family.vision_tower)
    head = source.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(f"`model`={checkpoint!r} has a head that is not one linear layer without bias.")
    config = TokenFlexConfig(
        **config_options,
        **_describe_connector(projector, family),
        tie_word_embeddings=head.weight is source.get_input_embeddings().weight,
    )
    with torch.device("meta"):
        adopted = TokenFlexForConditionalGeneration(config)
    weights = _connector_weights(projector, family)
    adopted.model.multi_modal_projector.connector.load_state_dict(weights, assign=True)
    adopted.model.vision_tower, adopted.lm_head = tower, head
    adopted.model.language_model = source.model.get_submodule(family.language_model)
    adopted.eval()
    processor = _make_processor(source_processor, config, family)
    adopted.generation_config = flexible_generation_config(
        source.generation_config, processor.tokenizer, config.image_token_id
    )
    for part in (config.vision_config, config.text_config):
        if Path(part.name_or_path).is_dir():
            part.name_or_path = ""  # a folder of this machine is of no use in a checkpoint
    identity = check_identity(checkpoint, source, source_processor, adopted, processor, family, native)
    return adopted, processor, identity


def _find_image_token(checkpoint: str, config: PreTrainedConfig, processor: ProcessorMixin, family: Family) -> int:
    token = getattr(processor, family.image_token)
    token_id = processor.tokenizer.convert_tokens_to_ids(token)
    if token_id != config.image_token_id:
        raise ValueError(
            f"`model`={checkpoint!r}: its config has `image_token_id`={config.image_token_id}, but its tokenizer "
            f"gives {token!r} the id {token_id}: give a checkpoint whose config and tokenizer belong together."
        )
    rows = config.text_config.vocab_size
    if token_id >= rows:
        raise ValueError(
            f"`model`={checkpoint!r}: its image token {token!r} has the id {token_id}, but its language model has "
            f"embeddings of {rows} tokens: resize them with `resize_token_embeddings({token_id + 1})` and save it."
        )
    return token_id


def _describe_tower(config: PreTrainedConfig, processor: ProcessorMixin, family: Family) -> None:
    """Gives the config of timm's towers the sizes that others have."""
    if config.vision_config.model_type != "timm_wrapper":
        return
    image = PIL.Image.new("RGB", (64, 64))
    pixel_values = processor.image_processor([image], return_tensors="pt", **family.whole_image)["pixel_values"]
    config.vision_config.image_size = list(pixel_values.shape[-2:])
    config.vision_config.patch_size = processor.patch_size
    config.vision_config.num_channels = pixel_values.shape[-3]
    if family.pools_last:
        config.vision_config.hidden_size = config.vision_config.model_args["embed_dim"]


def _read_parts(checkpoint: str, config: PreTrainedConfig, family: Family) -> dict:
    """The fields of a [`TokenFlexConfig`] that a config says."""
    vision_config, said = config.vision_config, config.to_dict()
    if vision_config.model_type == "siglip_vision_model":
        vision_config.vision_use_head = False
    drops = family.drops_class_token
    if drops is None:
        drops = said.get("vision_feature_select_strategy") == "default" or bool(said.get("vision_use_cls_token"))
    known = count_prefix_tokens(vision_config)
    if known not in (None, int(drops)):
        raise ValueError(
            f"`model`={checkpoint!r} {'drops' if drops else 'keeps'} the first of its tower's features, but a tower "
            f"of type {vision_config.model_type!r} has {known} before its patches: its vision tokens are no grid."
        )
    layer = said.get("vision_feature_layers", said.get("vision_feature_layer", -1))  # VipLLaVA's, in earlier releases
    layer = layer if isinstance(layer, int) else list(layer)
    if layer == -1 and not family.reads_output:
        layer = vision_config.num_hidden_layers
    factor = 1 if family.downsample is None else said[family.downsample]
    parts = {
        "vision_config": vision_config,
        "text_config": config.text_config,
        "vision_feature_layer": layer,
        "num_prefix_tokens": int(drops),
        "downsample_factor": round(1 / factor if factor < 1 else factor),
        "projector_connector": family.kind,
        "projector_pools_last": family.pools_last,
    }
    if family.kind == "mlp":
        parts["projector_hidden_act"] = said.get("projector_hidden_act", "gelu")
    return parts


def _load_model(checkpoint: str, config: PreTrainedConfig, dtype) -> PreTrainedModel:
    try:
        with quiet_loading():
            source, info = AutoModelForImageTextToText.from_pretrained(
                checkpoint, config=config, dtype=dtype, output_loading_info=True
            )
    except RuntimeError as error:  # weights of other shapes than the config says
        raise ValueError(
            f"`model`={checkpoint!r} holds weights that do not fit its config, for example after its vocabulary was "
            f"resized by hand: resize with `resize_token_embeddings` and save it whole. ({error})"
        ) from None
    refuse_missing("model", checkpoint, source, info)
    return source.eval()


def _describe_connector(projector: nn.Module, family: Family) -> dict:
    first = projector.get_submodule(next(name for key, name in family.linear.items() if key != "norm"))
    norm = projector.get_submodule(family.linear["norm"]) if "norm" in family.linear else None
    inner = first.out_features // (2 if family.kind == "swiglu" else 1)
    return {
        "projector_hidden_size": inner,
        "projector_bias": first.bias is not None,
        "projector_norm_eps": None if norm is None else norm.eps,
    }


def _connector_weights(projector: nn.Module, family: Family) -> dict[str, torch.Tensor]:
    weights = {}
    for key, name in family.linear.items():
        for kind, weight in projector.get_submodule(name).named_parameters():
            if key == "gate_up":
                weights[f"up.{kind}"], weights[f"gate.{kind}"] = (half.contiguous() for half in weight.chunk(2))
            else:
                weights[f"{key}.{kind}"] = weight
    return weights


def _make_processor(source: ProcessorMixin, config: TokenFlexConfig, family: Family) -> TokenFlexProcessor:
    image_processor, tokenizer = source.image_processor, source.tokenizer
    if family.has_base_view:
        options = {name: getattr(image_processor, name) for name in IMAGE_OPTIONS}
        size = dict(zip(("height", "width"), config.image_size))
        is_pil = type(image_processor).__name__.endswith("Pil")
        kind = transformers.SiglipImageProcessorPil if is_pil else transformers.SiglipImageProcessor
        image_processor = kind(size=size, **options)
    for name, value in family.whole_image.items():
        setattr(image_processor, name, value)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    token, template = getattr(source, family.image_token), source.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is not None:
        template = template.replace(source.image_token, token)  # Aya's template has a text in its place
    return TokenFlexProcessor(
        image_processor,
        tokenizer,
        config.num_vision_tokens,
        config.patch_size[0] * config.downsample_factor,
        chat_template=template,
        image_size=list(config.image_size),
        image_token=token,
        image_start="".join(getattr(source, name) for name in family.start),
        image_end="".join(getattr(source, name) for name in family.end),
        add_special_tokens=len(tokenizer("")["input_ids"]) > 0,
    )


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="tokenflex adopt",
        description="Make a fixed-count vision-language model of transformers token-flexible.",
    )
    parser.add_argument("--model", required=True, help="Hub id or folder of the model.")
    parser.add_argument("--output_dir", required=True, help="Folder for the checkpoint.")
    parser.add_argument("--num_vision_tokens", type=parse_choice, help="Default count. Default: the model's own.")
    parser.add_argument(
        "--vision_token_choices",
        type=parse_choice,
        nargs="+",
        help="Counts that tuning draws from. Default: about a quarter, 9/16 and all of the model's own count.",
    )
    parser.add_argument(
        "--vision_token_weights",
        type=float,
        nargs="+",
        help="One weight per choice. Default: the model's own count weighs four times as much as all others together.",
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="Dtype of all weights. Default: the model's."
    )
    parser.add_argument("--max_shard_size", help="Largest file of weights, such as 5GB. Default: as the model's.")
    options = vars(parser.parse_args(argv))
    output_dir, max_shard_size = options.pop("output_dir"), options.pop("max_shard_size")
    model, processor, identity = adopt_model(**options)
    max_shard_size = max_shard_size or largest_shard(options["model"]) or "50GB"
    provenance = add_stage({"base_models": public_names(options["model"]), "stages": []}, ADOPTED)
    save_checkpoint(output_dir, model, processor, max_shard_size, provenance=provenance)
    print(  # noqa: T201
        f"Saved {output_dir}: {identity} It takes {model.config.vision_token_choices} vision tokens, "
        f"{model.config.num_vision_tokens} by default."
    )
