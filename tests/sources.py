"""Random-weight checkpoints of vision-language models, saved by transformers' own classes and processors."""

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available


TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
TEXT = {**TINY, "vocab_size": 400, "num_key_value_heads": 2, "max_position_embeddings": 1024}
TEXT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CLIP = {"model_type": "clip_vision_model", **TINY, "image_size": 28, "patch_size": 4}
SIGLIP = {"model_type": "siglip_vision_model", **TINY, "image_size": 28, "patch_size": 4}
LARGER = {"image_size": 32, "patch_size": 4}
INTERNVIT = {**TINY, "image_size": [32, 32], "patch_size": [4, 4]}
LINES = "{% for m in messages %}{{ m.role }}: {% for p in m.content %}{% if p.type == 'image' %}"
TEMPLATE = (
    LINES + "IMAGE{% else %}{{ p.text }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
PINPOINTS = [[28, 56], [56, 28], [56, 56]]


def text(kind, **options):
    return {"model_type": kind, **TEXT, **options}


def make_tokenizer(special, adds_bos=True, **attributes):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = ["<pad>", "<s>", "</s>", *special]
    trainer = trainers.BpeTrainer(
        vocab_size=300 + len(named),
        special_tokens=named,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user assistant: which color is the shape in the picture?"] * 4, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=attributes,
        padding_side="left",
    )


def square(size):
    return {"height": size, "width": size}


LIKE_CLIP = {
    "image_processor": ("CLIPImageProcessorPil", {"size": {"shortest_edge": 28}, "crop_size": square(28)}),
    "processor": {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
}
# The model's class and configuration; its tokenizer's special tokens, by attribute; its image processor and the
# processor's options; whether the tokenizer or the template writes the token that begins a text.
SOURCES = {
    "llava": {
        "model": "LlavaForConditionalGeneration",
        "config": {"vision_config": CLIP, "text_config": text("llama"), "vision_feature_layer": -2},
        "tokens": {"image_token": "<image>"},
        **LIKE_CLIP,
    },
    "llava-interleave": {
        "model": "LlavaForConditionalGeneration",
        "config": {
            "vision_config": SIGLIP,
            "text_config": text("qwen2"),
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        "tokens": {"image_token": "<image>"},
        "image_processor": ("SiglipImageProcessorPil", {"size": square(28)}),
        "processor": {"patch_size": 4, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 0},
        "adds_bos": False,
    },
    "llava-layers": {
        "model": "LlavaForConditionalGeneration",
        "config": {
            "vision_config": CLIP,
            "text_config": text("mistral"),
            "vision_feature_layer": [-2, 1],
            "multimodal_projector_bias": False,
        },
        "tokens": {"image_token": "<image>"},
        **LIKE_CLIP,
    },
    "vipllava": {
        "model": "VipLlavaForConditionalGeneration",
        "config": {"vision_config": CLIP, "text_config": text("llama"), "vision_feature_layers": [-1, -2, 1]},
        "tokens": {"image_token": "<image>"},
        **LIKE_CLIP,
    },
    "llava_next": {
        "model": "LlavaNextForConditionalGeneration",
        "config": {"vision_config": CLIP, "text_config": text("mistral"), "image_grid_pinpoints": PINPOINTS},
        "tokens": {"image_token": "<image>"},
        "image_processor": (
            "LlavaNextImageProcessorPil",
            {"size": {"shortest_edge": 28}, "crop_size": square(28), "image_grid_pinpoints": PINPOINTS},
        ),
        "processor": LIKE_CLIP["processor"],
    },
    "llava_onevision": {
        "model": "LlavaOnevisionForConditionalGeneration",
        "config": {
            "vision_config": SIGLIP,
            "text_config": text("qwen2"),
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "image_grid_pinpoints": PINPOINTS,
        },
        "tokens": {"image_token": "<image>", "video_token": "<video>"},
        "image_processor": (
            "LlavaOnevisionImageProcessorPil",
            {"size": square(28), "image_grid_pinpoints": PINPOINTS},
        ),
        "video_processor": "LlavaOnevisionVideoProcessor",
        "processor": {"num_image_tokens": 49, "vision_feature_select_strategy": "full"},
        "adds_bos": False,
    },
    "internvl": {
        "model": "InternVLForConditionalGeneration",
        "config": {"vision_config": INTERNVIT, "text_config": text("qwen2")},
        "tokens": {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        "image_token": "<IMG_CONTEXT>",
        "image_processor": ("GotOcr2ImageProcessorPil", {"size": square(32), "crop_to_patches": True}),
        "video_processor": "InternVLVideoProcessor",
        "processor": {"image_seq_length": 16},
        "adds_bos": False,
    },
    "aya_vision": {
        "model": "AyaVisionForConditionalGeneration",
        "config": {
            "vision_config": {**SIGLIP, **LARGER},
            "text_config": text("cohere2", tie_word_embeddings=True),
            "alignment_intermediate_size": 80,
        },
        "tokens": {},
        "special": [
            "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE", "TILE_GLOBAL", "<|IMG_LINE_BREAK|>",
        ],
        "image_token": "<|IMG_PATCH|>",
        "marker": "<image>",
        "image_processor": ("GotOcr2ImageProcessorPil", {"size": square(32), "crop_to_patches": True}),
        "processor": {"patch_size": 4, "img_size": 32, "downsample_factor": 2},
        "writes_bos": True,
    },
    "idefics3": {
        "model": "Idefics3ForConditionalGeneration",
        "config": {"vision_config": {**TINY, **LARGER}, "text_config": text("llama"), "scale_factor": 2},
        "tokens": {"image_token": "<image>"},
        "special": ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<row_1_col_1>"],
        "image_processor": (
            "Idefics3ImageProcessorPil",
            {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}, "return_row_col_info": True},
        ),
        "processor": {"image_seq_len": 16},
    },
    "smolvlm": {
        "model": "SmolVLMForConditionalGeneration",
        "config": {
            "vision_config": {**TINY, **LARGER},
            "text_config": text("llama", tie_word_embeddings=True),
            "scale_factor": 2,
            "tie_word_embeddings": True,
        },
        "tokens": {
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
        "image_processor": (
            "SmolVLMImageProcessorPil",
            {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}, "return_row_col_info": True},
        ),
        "video_processor": "SmolVLMVideoProcessor",
        "processor": {"image_seq_len": 16},
        "writes_bos": True,
    },
    "fast_vlm": {
        "model": "FastVlmForConditionalGeneration",
        "config": {
            "vision_config": {
                "model_type": "timm_wrapper",
                "architecture": "fastvit_mci3",
                "hidden_size": 64,
                "do_pooling": True,
                "global_pool": "avg",
                "model_args": {"inference_mode": True, "layers": [1] * 5, "embed_dims": [8, 8, 16, 32, 32]},
            },
            "text_config": text("qwen2"),
        },
        "tokens": {"image_token": "<image>"},
        "image_processor": ("CLIPImageProcessorPil", {"size": {"shortest_edge": 256}, "crop_size": square(256)}),
        "processor": {"patch_size": 64, "vision_feature_select_strategy": "full"},
        "adds_bos": False,
    },
    "perception_lm": {
        "model": "PerceptionLMForConditionalGeneration",
        "config": {
            "vision_config": {
                "model_type": "timm_wrapper",
                "architecture": "vit_pe_core_large_patch14_336",
                "model_args": {
                    "embed_dim": 32, "img_size": [32, 32], "depth": 2, "num_heads": 2,
                    "patch_size": 4, "global_pool": "", "use_post_transformer_norm": False, "init_values": 0.1,
                    "ref_feat_shape": [8, 8],
                },
            },
            "text_config": text("llama"),
            "projector_pooling_ratio": 2,
        },
        "tokens": {"image_token": "<|image|>", "video_token": "<|video|>"},
        "image_token": "<|image|>",
        "image_processor": ("PerceptionLMImageProcessor", {"tile_size": 32, "max_num_tiles": 4}),
        "video_processor": "PerceptionLMVideoProcessor",
        "processor": {"patch_size": 4, "pooling_ratio": 2},
    },
}  # fmt: skip


# With the tiny model's image token and as large a grid, for tests that take the one as well as the other.
LIKE_TINY = {
    **SOURCES["internvl"],
    "config": {
        "vision_config": {**INTERNVIT, "image_size": [64, 64]},
        "text_config": text("qwen2", hidden_size=64),  # vLLM asks for heads of 32
    },
    "tokens": {**SOURCES["internvl"]["tokens"], "context_image_token": "<|image_pad|>"},
    "image_token": "<|image_pad|>",
    "image_processor": ("GotOcr2ImageProcessorPil", {"size": square(64)}),
    "processor": {"image_seq_length": 64},
    "adds_bos": True,
}


def save_source(source, folder, dtype=torch.float32, **changes):
    """Saves a random checkpoint of a source with its processor; `changes` go into its configuration."""
    model_class = getattr(transformers, source["model"])
    special = [*source["tokens"].values(), *source.get("special", [])]
    tokenizer = make_tokenizer(special, source.get("adds_bos", True), **source["tokens"])
    image_token = source.get("image_token", "<image>")
    options = {"image_token_id": tokenizer.convert_tokens_to_ids(image_token), **source["config"], **changes}
    config = model_class.config_class(**options)
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():  # those that start at zero or one get values of their own
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.to(dtype).save_pretrained(folder)

    kind, image_options = source["image_processor"]
    begins = "{{ bos_token }}" if source.get("writes_bos") else ""
    processor_class, videos = PROCESSOR_MAPPING.get(type(config), LlavaProcessor), {}
    if "video_processor" in source:
        if is_torchvision_available():
            videos["video_processor"] = getattr(transformers, source["video_processor"])()
        else:
            processor_class, videos["video_processor"] = without_videos(processor_class), None
    processor_class(
        image_processor=getattr(transformers, kind)(**image_options),
        tokenizer=tokenizer,
        chat_template=begins + TEMPLATE.replace("IMAGE", source.get("marker", image_token)),
        **videos,
        **source["processor"],
    ).save_pretrained(folder)
    return str(folder)


def without_videos(processor_class):
    """The class without its video processor, which needs torchvision."""

    def get_attributes(cls):
        return ["image_processor", "tokenizer"]

    return type(processor_class.__name__, (processor_class,), {"get_attributes": classmethod(get_attributes)})
