"""Parts of a TokenFLEX checkpoint, read off pretrained ones: towers, tokenizer and image statistics."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    SiglipImageProcessorPil,
)
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.tokenization_utils_base import FULL_TOKENIZER_FILE
from transformers.utils import (
    CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    cached_file,
    is_torchvision_available,
    logging,
)

from ..configuration_tokenflex import NAFLEX, TokenFlexConfig
from ..processing_tokenflex import IMAGE_TOKEN


logger = logging.get_logger(__name__)

CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]
# Image mean and standard deviation of towers that come without a preprocessor config, as their authors publish them.
IMAGE_STATISTICS = {
    "clip_vision_model": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "dinov2": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "dinov2_with_registers": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "internvl_vision": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    NAFLEX: (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
    "siglip_vision_model": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
}
IMAGE_OPTIONS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "resample")


def read_vision_config(checkpoint: str) -> PreTrainedConfig:
    """
    The configuration of a vision tower, alone or in a checkpoint with other parts.

    Args:
        checkpoint (`str`): Hub id or folder.

    Raises:
        ValueError: If there is no tower with a fixed grid of patches.
    """
    whole = read_config("vision_tower", checkpoint)
    config = getattr(whole, "vision_config", whole)
    sizes = ("num_patches" if config.model_type == NAFLEX else "image_size", "patch_size")
    if any(getattr(config, size, None) is None for size in sizes):
        raise ValueError(
            f"`vision_tower`={checkpoint!r} is of type {config.model_type!r}, which has no fixed grid of patches "
            "(`image_size` and `patch_size`). Give a vision tower, such as 'google/siglip-so400m-patch14-384'."
        )
    # Parts that only pre-training needs; transformers 5.18 makes SigLIP's unless it is told not to.
    if config.model_type in ("siglip_vision_model", NAFLEX):
        config.vision_use_head = False
    if getattr(config, "use_mask_token", False):
        config.use_mask_token = False
    config.dtype = whole.dtype or config.dtype
    return config


def read_text_config(checkpoint: str) -> PreTrainedConfig:
    """
    The configuration of a text-only causal language model.

    Args:
        checkpoint (`str`): Hub id, folder, or GGUF file.

    Raises:
        ValueError: If it is something else.
    """
    folder, gguf = _find_gguf(checkpoint)
    if gguf:
        _read_gguf(checkpoint, folder, **gguf)
    config = read_config("language_model", checkpoint, **gguf)
    if config.sub_configs or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = "has other parts than text" if config.sub_configs else "is no causal language model"
        raise ValueError(
            f"`language_model`={checkpoint!r} is of type {config.model_type!r}, which {kind}. Give a text-only one, "
            "such as 'Qwen/Qwen2.5-7B-Instruct'."
        )
    return config


def load_vision_tower(checkpoint: str, config: PreTrainedConfig, dtype: str | torch.dtype = "auto") -> PreTrainedModel:
    """
    Loads a vision tower; other parts of its checkpoint are left unread.

    Args:
        checkpoint (`str`): Hub id or folder.
        config (`PreTrainedConfig`): As [`read_vision_config`] returns it.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): The dtype of its weights; `"auto"` keeps it.

    Raises:
        ValueError: If weights are missing.
    """
    with quiet_loading():
        tower, info = AutoModel.from_pretrained(
            checkpoint,
            config=config,
            dtype=dtype,
            key_mapping={r"^(model\.)?vision_tower\.": ""},  # the tower's name in vision-language models
            output_loading_info=True,
        )
    refuse_missing("vision_tower", checkpoint, tower, info)
    return tower


def load_language_model(
    checkpoint: str, config: PreTrainedConfig, dtype: str | torch.dtype = "auto"
) -> PreTrainedModel:
    """
    Loads a causal language model, that of a GGUF file dequantized.

    Args:
        checkpoint (`str`): Hub id, folder, or GGUF file.
        config (`PreTrainedConfig`): As [`read_text_config`] returns it.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): The dtype of its weights; `"auto"` keeps it.

    Raises:
        ValueError: If weights are missing.
    """
    folder, gguf = _find_gguf(checkpoint)
    options = {**gguf, "quantization_config": GgufConfig(dequantize=True)} if gguf else {}
    causal_lm, info = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, output_loading_info=True, **options
    )
    refuse_missing("language_model", checkpoint, causal_lm, info)
    if gguf:
        tensors = _read_gguf(checkpoint, folder, **gguf).tensors
        bits = 8 * sum(tensor.n_bytes for tensor in tensors) / sum(tensor.n_elements for tensor in tensors)
        logger.warning(
            f"`language_model`={checkpoint!r}: its weights, of {bits:.1f} bits on average, are dequantized to "
            f"{causal_lm.dtype}; they stay as coarse as they were."
        )
        if any(tensor.name.startswith("rope_") for tensor in tensors):
            logger.warning(
                f"`language_model`={checkpoint!r} scales its rotary frequencies, as Llama 3.1 does, and transformers "
                "reads none off GGUF files: answers will differ, to long texts most. Better give the checkpoint that "
                "it was made from."
            )
    return causal_lm


def _find_gguf(checkpoint: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` takes for a language model: Hub id or folder, and the name of the GGUF file it is in."""
    path, files = Path(checkpoint), []
    if path.suffix == ".gguf" and path.is_file():
        files = [path]
    elif path.is_dir() and not (path / CONFIG_NAME).is_file():
        files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(
            f"`language_model`={checkpoint!r} holds {len(files)} GGUF files ({names}): name one of them, such as "
            f"{str(files[0])!r}."
        )
    return (str(files[0].parent), {"gguf_file": files[0].name}) if files else (checkpoint, {})


def _read_gguf(checkpoint: str, folder: str, gguf_file: str):
    """The `gguf.GGUFReader` of a whole file."""
    try:
        from gguf import GGUFReader

        return GGUFReader(Path(folder, gguf_file))
    except ImportError:
        raise ValueError(
            f"`language_model`={checkpoint!r} needs the package that reads GGUF files: `pip install gguf`, or "
            '`pip install "tokenflex[gguf]"`.'
        ) from None
    except Exception as error:  # readers raise whatever they like on damaged files
        raise ValueError(
            f"`language_model`={checkpoint!r}: {gguf_file} is no GGUF file, or not all of one: copy it once more. "
            f"({error})"
        ) from None


def load_tokenizer(checkpoint: str) -> tuple[PreTrainedTokenizerBase, int, int | None]:
    """
    Loads a language model's tokenizer and gives it what images and chats need: an image token, ChatML's tokens if it
    comes without a chat template, and its end token for padding if it has no other.

    Args:
        checkpoint (`str`): Hub id, folder, or GGUF file.

    Returns:
        `tuple[PreTrainedTokenizerBase, int, int | None]`: The tokenizer, the image token's id, and the id of ChatML's
        end token if the tokenizer came without a chat template.

    Raises:
        ValueError: If there is no tokenizer, or it has no token to pad with.
    """
    folder, gguf = _find_gguf(checkpoint)
    if gguf and Path(folder, FULL_TOKENIZER_FILE).exists():
        raise ValueError(
            f"`language_model`={checkpoint!r}: beside {FULL_TOKENIZER_FILE} transformers does not read the tokenizer "
            "of a GGUF file. Move the GGUF file to a folder of its own."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **gguf)
    except (OSError, ValueError) as error:
        raise ValueError(f"`language_model`={checkpoint!r} comes without a tokenizer: add one. ({error})") from None
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # the result of missing files
        raise ValueError(f"`language_model`={checkpoint!r} comes without a tokenizer: add one.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(
            f"`language_model`={checkpoint!r} has a tokenizer with neither `pad_token` nor `eos_token`: set one and "
            "save it."
        )
    tokens = [getattr(tokenizer, "image_token", None) or IMAGE_TOKEN]
    if tokenizer.chat_template is None:
        tokens += CHATML_TOKENS
    tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)
    image_token_id, *chat_token_ids = tokenizer.convert_tokens_to_ids(tokens)
    return tokenizer, image_token_id, chat_token_ids[-1] if chat_token_ids else None


def load_image_processor(
    checkpoint: str, vision_config: PreTrainedConfig, image_size: tuple[int, int]
) -> SiglipImageProcessorPil:
    """
    An image processor that resizes whole images to one size, with the mean, standard deviation, scale and
    resampling of the tower's own preprocessor config, or those its authors publish if there is none.

    Args:
        checkpoint (`str`): Hub id or folder of the tower.
        vision_config (`PreTrainedConfig`): The tower's configuration.
        image_size (`tuple[int, int]`): Height and width in pixels.

    Raises:
        ValueError: If mean and standard deviation are not known.
    """
    options = {}
    if vision_config.model_type in IMAGE_STATISTICS:
        options["image_mean"], options["image_std"] = IMAGE_STATISTICS[vision_config.model_type]
    for name in (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME):
        file = cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False)
        own = json.loads(Path(file).read_text()) if file is not None else {}
        own = own.get("image_processor", own)
        options |= {option: own[option] for option in IMAGE_OPTIONS if option in own}
    if "image_mean" not in options:
        raise ValueError(
            f"`vision_tower`={checkpoint!r} has no {IMAGE_PROCESSOR_NAME} and is of type "
            f"{vision_config.model_type!r}, whose `image_mean` and `image_std` are not known: add that file."
        )
    height, width = image_size
    # Where torchvision is installed, what this class saves loads as its torchvision counterpart.
    return SiglipImageProcessorPil(size={"height": height, "width": width}, **options)


def load_images_processor(checkpoint: str, config: PreTrainedConfig) -> ProcessorMixin:
    """
    Loads a vision-language model's processor; where what its videos need is not installed, for images alone.

    Args:
        checkpoint (`str`): Hub id or folder.
        config (`PreTrainedConfig`): The model's configuration.

    Raises:
        ValueError: If parts of the processor are missing.
    """
    processor_class = PROCESSOR_MAPPING.get(type(config), None)
    needs_videos = processor_class is not None and "video_processor" in processor_class.get_attributes()
    try:
        if needs_videos and not is_torchvision_available():
            processor = _images_only(processor_class).from_pretrained(checkpoint, video_processor=None)
        else:
            processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=False)
        if not isinstance(processor, ProcessorMixin):
            raise TypeError(f"It has a {type(processor).__name__} alone.")
        return processor
    except ImportError as error:
        raise ValueError(f"`model`={checkpoint!r}: its processor needs a package that is not here: {error}") from None
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"`model`={checkpoint!r} comes without a processor that can be loaded: add the files that its processor's "
            f"`save_pretrained` writes. ({error})"
        ) from None


def _images_only(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    class ImagesOnly(processor_class):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

    return ImagesOnly


def read_config(argument: str, checkpoint: str, gguf_file: str | None = None) -> PreTrainedConfig:
    """
    The configuration of a checkpoint of transformers, whose weights are as they were trained.

    Args:
        argument (`str`): The argument to name in errors.
        checkpoint (`str`): Hub id or folder.
        gguf_file (`str`, *optional*): The name of the GGUF file that it is, or that is in its folder.

    Raises:
        ValueError: If there is none, it is quantized, or it is a TokenFLEX checkpoint.
    """
    try:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False, gguf_file=gguf_file)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`{argument}`={checkpoint!r} is not a checkpoint that transformers can read: give a Hub id, or a folder "
            f"with a config.json as `save_pretrained` writes it. ({error})"
        ) from None
    if config.model_type == TokenFlexConfig.model_type:
        raise ValueError(
            f"`{argument}`={checkpoint!r} is a whole TokenFLEX checkpoint: load it with "
            "`AutoModelForImageTextToText`, or give what it was built from."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"`{argument}`={checkpoint!r} is quantized: give the checkpoint that it was made from.")
    return config


def refuse_missing(argument: str, checkpoint: str, model: PreTrainedModel, info: dict) -> None:
    """
    Refuses a model that was loaded with weights missing.

    Args:
        argument (`str`): The argument to name in errors.
        checkpoint (`str`): Hub id or folder.
        model ([`~transformers.PreTrainedModel`]): The model.
        info (`dict`): What `from_pretrained` says with `output_loading_info`.

    Raises:
        ValueError: If weights are missing.
    """
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"`{argument}`={checkpoint!r} lacks {len(missing)} weights of a {type(model).__name__}, such as "
            f"{missing[0]!r}: give a checkpoint that holds all of them."
        )


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Keeps transformers from listing every weight that is left unread, and from explaining how new ones are drawn."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
