"""The embedded default: a tiny tower, language model and tokenizer that train in minutes on two CPU cores."""

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from ..configuration_tokenflex import TokenFlexConfig
from ..data.synthetic import IMAGE_SIZE, draw_scene
from ..modeling_tokenflex import TokenFlexForConditionalGeneration
from ..processing_tokenflex import IMAGE_TOKEN, TokenFlexProcessor


PATCH_SIZE = 8
VISION_TOKEN_CHOICES = (4, 16, 36)
VISION_TOKEN_WEIGHTS = (0.2, 0.3, 0.5)  # the paper's 2:3:5
# About 1 / sqrt(width): with the usual 0.02 so narrow a model's attention starts flat and binds nothing for minutes.
INITIALIZER_RANGE = 0.08
PAD_TOKEN, START_TOKEN, END_TOKEN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def train_tokenizer(texts, vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """
    A byte-level BPE tokenizer with the chat and image tokens of Qwen2.5-VL.

    Args:
        texts (iterable of `str`): Texts to train on.
        vocab_size (`int`, *optional*, defaults to 512): At least 256 bytes and six special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD_TOKEN, START_TOKEN, END_TOKEN, "<|vision_start|>", "<|vision_end|>", IMAGE_TOKEN]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        extra_special_tokens={
            "image_token": IMAGE_TOKEN,
            "im_start_token": START_TOKEN,
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        },
        padding_side="left",
        model_max_length=2048,
    )


def tiny_config(tokenizer: PreTrainedTokenizerFast, width: int = 128) -> TokenFlexConfig:
    """
    A SigLIP-type tower of 8 x 8 patches and a Qwen2-type language model, for counts 4, 16 and 36.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]): As [`train_tokenizer`] makes it.
        width (`int`, *optional*, defaults to 128): The hidden size of both towers.
    """
    return TokenFlexConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
        ),
        text_config=Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            initializer_range=INITIALIZER_RANGE,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        num_vision_tokens=max(VISION_TOKEN_CHOICES),
        vision_token_choices=list(VISION_TOKEN_CHOICES),
        vision_token_weights=list(VISION_TOKEN_WEIGHTS),
        initializer_range=INITIALIZER_RANGE,
    )


def tiny_model_and_processor(
    seed: int = 0, width: int = 128, texts: Iterable[str] | None = None
) -> tuple[TokenFlexForConditionalGeneration, TokenFlexProcessor]:
    """
    A freshly initialized tiny model and its processor, with a tokenizer trained on the spot.

    Args:
        seed (`int`, *optional*, defaults to 0): The seed of the weights.
        width (`int`, *optional*, defaults to 128): The hidden size of both towers.
        texts (iterable of `str`, *optional*):
            Questions and answers to train the tokenizer on. Defaults to the synthetic ones.
    """
    if texts is None:
        texts = (text for i in range(400) for _, *pair in draw_scene(0, i).questions for text in pair)
    tokenizer = train_tokenizer([*texts, *["user", "assistant", "system"] * 100])
    config = tiny_config(tokenizer, width)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TokenFlexForConditionalGeneration(config)
    # Fresh, since the config that a model derives for itself drops unknown keys when it is loaded again.
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        suppress_tokens=[config.image_token_id],
    )
    image_processor = SiglipImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return model, TokenFlexProcessor(image_processor, tokenizer, config.num_vision_tokens, PATCH_SIZE)
