"""`tokenflex build`: a TokenFLEX checkpoint from a pretrained vision tower and a pretrained language model."""

from argparse import ArgumentParser
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME, cached_file, logging
from transformers.utils.hub import get_checkpoint_shard_files

from ..checkpoints.files import save_checkpoint
from ..checkpoints.provenance import add_stage, public_names
from ..choices_tokenflex import parse_choice, sort_choices
from ..configuration_tokenflex import TokenFlexConfig
from ..modeling_tokenflex import TokenFlexForConditionalGeneration, TokenFlexProjector
from ..processing_tokenflex import TokenFlexProcessor
from .pretrained import (
    CHATML_TOKENS,
    load_image_processor,
    load_language_model,
    load_tokenizer,
    load_vision_tower,
    quiet_loading,
    read_text_config,
    read_vision_config,
)


logger = logging.get_logger(__name__)

SAMPLING_OPTIONS = (
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
)  # fmt: skip


def build_from_towers(
    vision_tower: str | Path,
    language_model: str | Path,
    *,
    num_vision_tokens: int | str | None = None,
    vision_token_choices: list[int | str] | None = None,
    vision_token_weights: list[float] | None = None,
    vision_feature_layer: int = -1,
    num_prefix_tokens: int | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
) -> tuple[TokenFlexForConditionalGeneration, TokenFlexProcessor]:
    """
    Joins a pretrained vision tower and a pretrained language model with a new projector. Both towers' weights stay as
    they are; only the projector, and embeddings of tokens that the language model lacks, have to be trained.

    The tower may be SigLIP, SigLIP2 (also NaFlex), CLIP, DINOv2 (with or without registers) or InternViT in
    transformers' format, alone or inside a checkpoint with other parts (a whole CLIP or SigLIP, an InternVL). The
    language model may be any causal language model of transformers whose logits are one linear layer (soft-capped or
    not) on its base model's output, such as Qwen2, Qwen2.5, Qwen3, Llama, SmolLM or Gemma: a short text is run
    through it before and after, and the logits must be identical.

    Images are resized to the size that the tower's config names, whole and without a center crop, and normalized as
    the tower's preprocessor config says (without one: as its authors publish it). For a NaFlex tower that is a square
    of twice its own side, which the model shrinks to the image's shape.

    Args:
        vision_tower (`str` or `Path`):
            Hub id or folder of the vision tower.
        language_model (`str` or `Path`):
            Hub id or folder of the language model and its tokenizer, or a GGUF file (also alone in a folder), which is
            dequantized. The tokenizer's image token, else `<|image_pad|>`, becomes the placeholder and is added where
            it is missing; without a chat template, so are the tokens of ChatML, which then have to be trained.
        num_vision_tokens (`int` or `str`, *optional*, defaults to the largest choice):
            The vision-token count per image when none is asked for.
        vision_token_choices (`list[int | str]`, *optional*):
            The counts that training draws from. Default to [`default_vision_tokens`] of the patch grid.
        vision_token_weights (`list[float]`, *optional*):
            One weight per choice; given together with the choices.
        vision_feature_layer (`int`, *optional*, defaults to -1):
            The tower's hidden state that feeds the projector; -1 is the tower's output, which all but CLIP normalize.
        num_prefix_tokens (`int`, *optional*):
            Number of class tokens and registers before the patches. Known for the towers named above; must be
            given for others.
        dtype (`str` or `torch.dtype`, *optional*):
            The dtype of all weights. By default each tower keeps its own, and the projector takes the language
            model's.
        seed (`int`, *optional*, defaults to 0):
            The seed of the new weights. The global random state is left alone.

    Returns:
        `tuple[TokenFlexForConditionalGeneration, TokenFlexProcessor]`: To be saved with
        [`~tokenflex.checkpoints.files.save_checkpoint`], which makes towers of different dtypes load without rounding.

    Raises:
        ValueError: If either argument is not a model that can be built in, or a count is not allowed.

    Example:

    ```python
    >>> import tempfile
    >>> from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel
    >>> from tokenflex.towers.build import build_from_towers
    >>> from tokenflex.towers.tiny import train_tokenizer

    >>> tower, language_model = tempfile.mkdtemp(), tempfile.mkdtemp()  # yours are Hub ids or folders
    >>> size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> SiglipVisionModel(SiglipVisionConfig(**size, image_size=56, patch_size=8)).save_pretrained(tower)
    >>> tokenizer = train_tokenizer(["a small language model"])
    >>> LlamaForCausalLM(LlamaConfig(**size, vocab_size=len(tokenizer))).save_pretrained(language_model)
    >>> _ = tokenizer.save_pretrained(language_model)

    >>> model, processor = build_from_towers(tower, language_model)
    >>> model.config.patch_grid, model.config.vision_token_choices, processor.num_vision_tokens
    ((7, 7), [9, 25, 49], 49)
    ```
    """
    vision_tower, language_model = str(vision_tower), str(language_model)
    # Whatever can be wrong is found before weights are read.
    vision_config, text_config = read_vision_config(vision_tower), read_text_config(language_model)
    tokenizer, image_token_id, end_token_id = load_tokenizer(language_model)
    parts = {
        "vision_config": vision_config,
        "text_config": text_config,
        "image_token_id": image_token_id,
        "vision_feature_layer": vision_feature_layer,
        "num_prefix_tokens": num_prefix_tokens,
    }
    if vision_token_choices is None and vision_token_weights is None:
        smallest = {"num_vision_tokens": 1, "vision_token_choices": [1], "vision_token_weights": [1.0]}
        config = TokenFlexConfig(**parts, **smallest)
        patch_grid = config.patch_grid_at(config.own_resolution())
        vision_token_choices, vision_token_weights = default_vision_tokens(patch_grid)
        logger.info(f"`vision_token_choices` for the patch grid {patch_grid}: {vision_token_choices}")
    if num_vision_tokens is None:
        num_vision_tokens = sort_choices(vision_token_choices or [1])[-1]
    config = TokenFlexConfig(
        **parts,
        num_vision_tokens=num_vision_tokens,
        vision_token_choices=vision_token_choices,
        vision_token_weights=vision_token_weights,
    )
    _check_vision_config(vision_tower, config)
    image_processor = load_image_processor(vision_tower, vision_config, config.image_size)
    options = {"match_aspect_ratio": config.max_num_patches is not None, "max_num_patches": config.max_num_patches}
    processor = TokenFlexProcessor(image_processor, tokenizer, num_vision_tokens, config.patch_size[0], **options)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tower = load_vision_tower(vision_tower, vision_config, dtype or "auto")
        causal_lm = load_language_model(language_model, text_config, dtype or "auto")
        model = _assemble(config, tower, causal_lm)
        num_tokens = max(image_token_id, end_token_id or 0) + 1
        if num_tokens > text_config.vocab_size:
            with quiet_loading():
                model.resize_token_embeddings(num_tokens)
    model.generation_config = flexible_generation_config(
        causal_lm.generation_config, tokenizer, image_token_id, end_token_id
    )
    for part in (vision_config, text_config):
        if Path(part.name_or_path).exists():
            part.name_or_path = ""  # a path of this machine is of no use in a checkpoint
    if tokenizer.chat_template is None:
        logger.warning(
            f"`language_model`={language_model!r} comes without a chat template: chats are written with "
            f"{' and '.join(CHATML_TOKENS)}, which it has to learn before its answers end: do not freeze "
            "it throughout."
        )
    if tower.dtype != causal_lm.dtype:
        logger.warning(
            f"`vision_tower` is {tower.dtype}, `language_model` {causal_lm.dtype}: both are kept as they are, but "
            "transformers loads a checkpoint in one dtype, by default in the wider one. Pass `dtype`, here or there, "
            "to choose."
        )
    return model, processor


def default_vision_tokens(patch_grid: tuple[int, int], largest: int = 16) -> tuple[list[int], list[float]]:
    """
    The counts to train with and their weights: the paper's 64, 144 and 256 at 2:3:5 where the patch grid has 16 x 16
    patches or more. On another grid with at most `n * n` tokens, the squares nearest to a quarter and to 9/16 of
    these, and all of them, as the paper's counts are of 256; equal ones are one choice with the sum of their weights.

    Args:
        patch_grid (`tuple[int, int]`): Rows and columns of the vision tower's patch grid.
        largest (`int`, *optional*, defaults to 16): The side of the largest count, where the grid has as many.

    Example:

    ```python
    >>> from tokenflex.towers.build import default_vision_tokens

    >>> default_vision_tokens((27, 27))
    ([64, 144, 256], [0.2, 0.3, 0.5])
    >>> default_vision_tokens((14, 14))
    ([49, 100, 196], [0.2, 0.3, 0.5])
    ```
    """
    largest = min(*patch_grid, largest)
    weights = {}
    for share, weight in ((1 / 4, 0.2), (9 / 16, 0.3), (1, 0.5)):
        side = min(range(1, largest + 1), key=lambda side: abs(side**2 - share * largest**2))
        weights[side**2] = weights.get(side**2, 0) + weight
    return list(weights), list(weights.values())


def largest_shard(checkpoint: str | Path) -> int | None:
    """
    The size in bytes of the largest file of a sharded checkpoint's weights; `None` where they are one file.

    Args:
        checkpoint (`str` or `Path`): Folder, Hub id or GGUF file.
    """
    if Path(checkpoint).is_file():
        return None
    for name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        index = cached_file(str(checkpoint), name, _raise_exceptions_for_missing_entries=False)
        if index is not None:
            files, _ = get_checkpoint_shard_files(str(checkpoint), index)
            return max(Path(file).stat().st_size for file in files)
    return None


def _check_vision_config(checkpoint: str, config: TokenFlexConfig) -> None:
    depth, layer = config.vision_config.num_hidden_layers, config.vision_feature_layer
    if not -depth - 1 <= layer <= depth:
        raise ValueError(
            f"`vision_feature_layer`={layer}: the tower has {depth} layers, so that its hidden states are "
            f"{-depth - 1} (its embeddings) to -1, or 0 to {depth}."
        )
    if len(set(config.patch_size)) > 1:
        raise ValueError(
            f"`vision_tower`={checkpoint!r} has patches of {config.patch_size} pixels: give a tower with square ones."
        )


def _assemble(
    config: TokenFlexConfig, tower: PreTrainedModel, causal_lm: PreTrainedModel
) -> TokenFlexForConditionalGeneration:
    """The model around the towers' own modules: no weight is copied."""
    token_ids = torch.linspace(0, config.text_config.vocab_size - 1, 8).long()[None]
    with torch.no_grad():
        expected = causal_lm(input_ids=token_ids, use_cache=False).logits
    head, body = causal_lm.get_output_embeddings(), causal_lm.base_model
    fits = isinstance(head, nn.Linear) and head.bias is None
    if fits := fits and getattr(body, "embed_tokens", None) is body.get_input_embeddings():
        with torch.device("meta"):
            model = TokenFlexForConditionalGeneration(config)
        projector = TokenFlexProjector(config).apply(model._init_weights)
        model.model.multi_modal_projector = projector.to(head.weight.dtype)
        model.model.vision_tower, model.model.language_model, model.lm_head = tower, body, head
        model.eval()
        with torch.no_grad():
            fits = torch.equal(model(input_ids=token_ids, use_cache=False).logits, expected)
    if not fits:
        raise ValueError(
            f"`language_model` is of type {config.text_config.model_type!r}, whose logits are not one linear layer on "
            "the output of a base model with `embed_tokens`: text would get other logits than from the language "
            "model itself. Give a Qwen, Llama, SmolLM or Gemma model."
        )
    with torch.no_grad():
        model.get_image_features(torch.zeros(1, config.vision_config.num_channels, *config.image_size))
    return model


def flexible_generation_config(
    own: GenerationConfig, tokenizer: PreTrainedTokenizerBase, image_token_id: int, end_token_id: int | None = None
) -> GenerationConfig:
    """
    The generation config of a model's parts, for the whole: answers hold no image tokens.

    Args:
        own (`GenerationConfig`): The language model's.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        image_token_id (`int`): The image token.
        end_token_id (`int`, *optional*): A further token that ends answers.
    """
    # Fresh, since the config that a model derives for itself drops unknown keys when it is loaded again.
    options = own.to_diff_dict()
    # transformers refuses to save sampling options without sampling, which published configs have.
    for name in ("_from_model_config", "transformers_version", *(() if own.do_sample else SAMPLING_OPTIONS)):
        options.pop(name, None)
    end = options.get("eos_token_id", tokenizer.eos_token_id)
    end = [*end] if isinstance(end, list) else [end]
    options["eos_token_id"] = [token for token in dict.fromkeys([*end, end_token_id]) if token is not None]
    options["pad_token_id"] = tokenizer.pad_token_id
    options["suppress_tokens"] = sorted({*(options.get("suppress_tokens") or []), image_token_id})
    return GenerationConfig(**options)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="tokenflex build",
        description="Build a TokenFLEX checkpoint from a pretrained vision tower and language model.",
    )
    parser.add_argument("--vision_tower", required=True, help="Hub id or folder of the vision tower.")
    parser.add_argument("--language_model", required=True, help="Hub id, folder or GGUF file of the language model.")
    parser.add_argument("--output_dir", required=True, help="Folder for the checkpoint.")
    parser.add_argument("--num_vision_tokens", type=parse_choice, help="Default count. Default: the largest choice.")
    parser.add_argument(
        "--vision_token_choices",
        type=parse_choice,
        nargs="+",
        help="Counts that training draws from. Default: 64 144 256, or smaller ones on a patch grid below 16 x 16.",
    )
    parser.add_argument("--vision_token_weights", type=float, nargs="+", help="One weight per choice.")
    parser.add_argument(
        "--vision_feature_layer",
        type=int,
        default=-1,
        help="The tower's hidden state that feeds the projector. Default: %(default)s, its output.",
    )
    parser.add_argument(
        "--num_prefix_tokens", type=int, help="Class tokens and registers of a tower that is not known."
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="Dtype of all weights. Default: each tower's own."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the new weights. Default: %(default)s.")
    parser.add_argument(
        "--max_shard_size", help="Largest file of weights, such as 5GB. Default: as the language model is sharded."
    )
    options = vars(parser.parse_args(argv))
    output_dir, max_shard_size = options.pop("output_dir"), options.pop("max_shard_size")
    model, processor = build_from_towers(**options)
    max_shard_size = max_shard_size or largest_shard(options["language_model"]) or "50GB"
    provenance = {"base_models": public_names([options["vision_tower"], options["language_model"]]), "stages": []}
    new_tokens = CHATML_TOKENS if processor.tokenizer.chat_template is None else None
    provenance = add_stage(provenance, "new projector", seed=options["seed"], new_tokens=new_tokens)
    save_checkpoint(output_dir, model, processor, max_shard_size, provenance=provenance)
    config, (rows, columns) = model.config, model.config.patch_grid
    print(  # noqa: T201
        f"Saved {output_dir}: {config.vision_config.model_type} ({rows} x {columns} patches) and "
        f"{config.text_config.model_type}; {config.vision_token_choices} vision tokens, {config.num_vision_tokens} by "
        f"default; image token {processor.image_token} ({config.image_token_id})"
    )
