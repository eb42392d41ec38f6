import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers import assert_same_weights, write_gguf
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    GgufConfig,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)

from tokenflex.towers.pretrained import (
    load_image_processor,
    load_language_model,
    load_tokenizer,
    load_vision_tower,
    read_text_config,
    read_vision_config,
)
from tokenflex.towers.tiny import tiny_model_and_processor, train_tokenizer


TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**TINY, "image_size": 28, "patch_size": 4}
TEXT = {**TINY, "vocab_size": 300, "num_key_value_heads": 2, "max_position_embeddings": 256}
LLAVA = transformers.LlavaConfig(
    vision_config={"model_type": "clip_vision_model", **VISION},
    text_config={"model_type": "llama", **TEXT},
    image_token_id=5,
)


def saved(folder, model, dtype=torch.float32):
    model.to(dtype).save_pretrained(folder)
    return str(folder)


def siglip(**options):
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**{**VISION, **options}))


def causal(model_type, **options):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**TEXT, **options}))


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_tower_is_read_without_what_it_stands_in(tmp_path, caplog):
    whole = transformers.LlavaForConditionalGeneration(LLAVA)
    folder = saved(tmp_path, whole, torch.bfloat16)
    config = read_vision_config(folder)
    assert (config.model_type, config.dtype) == ("clip_vision_model", torch.bfloat16)
    tower = load_vision_tower(folder, config)
    wanted = whole.model.vision_tower.state_dict()
    own = tower.state_dict()
    assert set(own) == set(wanted) and all(torch.equal(own[key], wanted[key]) for key in own)
    assert load_vision_tower(folder, config, "float32").dtype == torch.float32
    assert "UNEXPECTED" not in caplog.text
    load_language_model(saved(tmp_path / "llama", causal("llama")), read_text_config(str(tmp_path / "llama")))
    assert transformers.logging.get_verbosity() == transformers.logging.WARNING


@pytest.mark.parametrize(
    ("model_class", "part"),
    [("SiglipVisionModel", "head."), ("Siglip2VisionModel", "head."), ("Dinov2Model", "embeddings.mask_token")],
)
def test_parts_that_only_pretraining_needs_are_left_out(tmp_path, model_class, part):
    model_class = getattr(transformers, model_class)
    model = model_class(model_class.config_class(**VISION))
    folder = saved(tmp_path, model)
    left_out = set(model.state_dict()) - set(load_vision_tower(folder, read_vision_config(folder)).state_dict())
    assert left_out and all(key.startswith(part) for key in left_out)


def test_what_is_no_tower_is_refused(tmp_path):
    def refused(checkpoint, message):
        with pytest.raises(ValueError, match=message):
            load_vision_tower(checkpoint, read_vision_config(checkpoint))

    (tmp_path / "empty").mkdir()
    refused(str(tmp_path / "empty"), "`vision_tower`='.*empty' is not a checkpoint.*config.json")
    refused("no/such-model", "`vision_tower`='no/such-model' is not a checkpoint")
    refused(saved(tmp_path / "text", causal("qwen2")), "type 'qwen2'.*no fixed grid.*Give a vision tower, such as")
    tokenflex = saved(tmp_path / "tokenflex", tiny_model_and_processor(width=32)[0])
    refused(tokenflex, "`vision_tower`=.*whole TokenFLEX checkpoint: load it with")
    folder = saved(tmp_path / "siglip", siglip())
    edit_config(tmp_path / "siglip", num_hidden_layers=3)
    refused(folder, "lacks 16 weights of a SiglipVisionModel, such as 'encoder.layers.2")
    edit_config(tmp_path / "siglip", num_hidden_layers=2, quantization_config={"quant_method": "awq"})
    refused(folder, "`vision_tower`=.* is quantized")


def test_what_is_no_language_model_is_refused(tmp_path):
    def refused(checkpoint, message):
        with pytest.raises(ValueError, match=message):
            load_language_model(checkpoint, read_text_config(checkpoint))

    (tmp_path / "empty").mkdir()
    refused(str(tmp_path / "empty"), "`language_model`='.*empty' is not a checkpoint")
    refused(saved(tmp_path / "siglip", siglip()), "'siglip_vision_model', which is no causal.*Give a text-only one")
    llava = saved(tmp_path / "llava", transformers.LlavaForConditionalGeneration(LLAVA))
    refused(llava, "'llava', which has other parts than text")
    tokenflex = saved(tmp_path / "tokenflex", tiny_model_and_processor(width=32)[0])
    refused(tokenflex, "`language_model`=.* whole TokenFLEX checkpoint")
    refused(saved(tmp_path / "body", causal("qwen2").model), "lacks 1 weights.*'lm_head.weight'")
    edit_config(tmp_path / "body", quantization_config={"quant_method": "awq"})
    refused(str(tmp_path / "body"), "`language_model`=.* is quantized: give the checkpoint that it was made from")


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("named", ["file", "folder"])
def test_a_gguf_file_is_dequantized(tmp_path, caplog, named, dtype):
    tokenizer = train_tokenizer(["which color?"])
    file = write_gguf(tmp_path / "llama.gguf", tokenizer)
    checkpoint = {"file": file, "folder": str(tmp_path)}[named]
    model = load_language_model(checkpoint, read_text_config(checkpoint), dtype)
    own = {"gguf_file": "llama.gguf", "quantization_config": GgufConfig(dequantize=True)}
    assert_same_weights(
        model.state_dict(), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, **own).state_dict()
    )
    gguf = pytest.importorskip("gguf")
    stored = next(tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name == "output.weight")
    weight = torch.tensor(gguf.quants.dequantize(stored.data, stored.tensor_type))
    assert torch.equal(model.lm_head.weight, weight.to(model.dtype))
    wanted = torch.float32 if dtype == "auto" else torch.bfloat16
    assert model.dtype == wanted
    # Blocks of 32 weights are 34 bytes; few weights, those of norms, have 32 bits.
    assert f"its weights, of 8.6 bits on average, are dequantized to {wanted}; they stay" in caplog.text
    text = "which color? <|im_start|>a  b日本\n"
    assert load_tokenizer(checkpoint)[0](text)["input_ids"] == tokenizer(text)["input_ids"]


def test_what_transformers_leaves_out_of_a_gguf_file_is_told(tmp_path, caplog):
    for name, more in (("plain", []), ("scaled", ["rope_freqs"])):
        file = write_gguf(tmp_path / f"{name}.gguf", train_tokenizer(["which color?"]), more=more)
        load_language_model(file, read_text_config(file))
        assert ("scales its rotary frequencies" in caplog.text) == bool(more)


def test_a_gguf_file_beside_a_config_is_left_unread(tmp_path):
    saved(tmp_path, causal("qwen2"))
    write_gguf(tmp_path / "llama.gguf", train_tokenizer(["which color?"]))
    assert read_text_config(str(tmp_path)).model_type == "qwen2"
    assert read_text_config(str(tmp_path / "llama.gguf")).model_type == "llama"


def test_a_gguf_file_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    def refused(checkpoint, message):
        with pytest.raises(ValueError, match="`language_model`='" + message):
            config = read_text_config(checkpoint)
            load_tokenizer(checkpoint)
            load_language_model(checkpoint, config)

    tokenizer = train_tokenizer(["which color?"])
    file = write_gguf(tmp_path / "whole.gguf", tokenizer)
    content = Path(file).read_bytes()
    for folder, size in (("empty", 0), ("magic", 4), ("header", 1000), ("weights", len(content) - 4000)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.gguf").write_bytes(content[:size])
        with pytest.raises(ValueError, match="a.gguf is no GGUF file, or not all of one: copy it once more"):
            read_text_config(str(tmp_path / folder))
    (tmp_path / "text.gguf").write_text("no model, but a long enough text")
    with pytest.raises(ValueError, match="text.gguf is no GGUF file"):
        read_text_config(str(tmp_path / "text.gguf"))
    refused(str(tmp_path), r".* holds 2 GGUF files \(text.gguf, whole.gguf\): name one .*such as '.*text.gguf'")
    refused(write_gguf(tmp_path / "rwkv.gguf", tokenizer, "rwkv6"), ".*not a checkpoint that.*rwkv6 is not supported")
    refused(write_gguf(tmp_path / "short.gguf", tokenizer, without=["blk.1.ffn_up"]), ".* lacks 1 weights.*up_proj")
    mute = write_gguf(tmp_path / "mute.gguf", tokenizer, without=["tokenizer"])
    refused(mute, ".*mute.gguf' comes without a tokenizer")
    refused(str(tmp_path / "nowhere.gguf"), ".*nowhere.gguf' is not a checkpoint that")
    tokenizer.save_pretrained(tmp_path)
    refused(file, ".*whole.gguf': beside tokenizer.json .* Move the GGUF file")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"whole.gguf' needs the package .*`pip install gguf`.*tokenflex\[gguf\]"):
        read_text_config(file)


def test_tokens_that_are_there_are_not_added(tmp_path):
    tokenizer = train_tokenizer(["which color?"])
    saved(tmp_path, causal("llama"))
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path)
    loaded, image_token_id, end_token_id = load_tokenizer(str(tmp_path))
    assert image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>") and end_token_id is None
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.all_special_tokens.count("<|image_pad|>") == 1

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>", "tool_token": "<tool>"},
        chat_template="{{ messages[0].content }}",
    )
    tokenizer.save_pretrained(tmp_path)
    loaded, image_token_id, _ = load_tokenizer(str(tmp_path))
    assert image_token_id == tokenizer.convert_tokens_to_ids("<image>") and len(loaded) == len(tokenizer)

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="<|endoftext|>", extra_special_tokens=["<tool>"]
    )
    tokenizer.save_pretrained(tmp_path)
    loaded, _, _ = load_tokenizer(str(tmp_path))
    assert loaded.all_special_tokens == ["<|endoftext|>", "<tool>", "<|image_pad|>"]


def test_a_plain_token_of_that_name_becomes_special(tmp_path):
    tokenizer = train_tokenizer(["which color?"])
    saved(tmp_path, causal("llama"))
    tokenizer.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        values = json.loads((tmp_path / name).read_text())
        values.pop("image_token", None)
        for token in values.get("added_tokens", []):
            token["special"] = token["special"] and token["content"] != "<|image_pad|>"
        (tmp_path / name).write_text(json.dumps(values))
    ids = AutoTokenizer.from_pretrained(tmp_path)("<|image_pad|>?")["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path).decode(ids, skip_special_tokens=True) == "<|image_pad|>?"
    loaded, image_token_id, _ = load_tokenizer(str(tmp_path))
    assert loaded("<|image_pad|>?")["input_ids"] == ids and ids[0] == image_token_id
    assert loaded.decode(ids, skip_special_tokens=True) == "?"


def test_padding_falls_back_to_the_end_token(tmp_path):
    saved(tmp_path, causal("llama"))
    tokenizer = train_tokenizer(["which color?"])
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token is None
    assert load_tokenizer(str(tmp_path))[0].pad_token == "<|im_end|>"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`language_model`=.*neither `pad_token` nor `eos_token`"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma"])
def test_a_missing_tokenizer_is_noticed(tmp_path, model_type):
    folder = saved(tmp_path, causal(model_type))
    with pytest.raises(ValueError, match="`language_model`=.*comes without a tokenizer"):
        load_tokenizer(folder)


HALF = [0.5] * 3
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SIGLIP2 = SiglipImageProcessorPil(resample=2, size={"height": 9, "width": 9})
CROPPING = BitImageProcessorPil(size={"shortest_edge": 14}, crop_size=14, image_mean=[0.1] * 3, resample=0)


@pytest.mark.parametrize(
    ("model_type", "own", "resample", "mean", "std"),
    [
        ("siglip_vision_model", None, Image.BICUBIC, HALF, HALF),
        ("siglip_vision_model", SIGLIP2, Image.BILINEAR, HALF, HALF),
        ("clip_vision_model", None, Image.BICUBIC, CLIP_MEAN, CLIP_STD),
        ("clip_vision_model", CLIPImageProcessorPil(image_std=HALF), Image.BICUBIC, CLIP_MEAN, HALF),
        ("dinov2", None, Image.BICUBIC, IMAGENET_MEAN, IMAGENET_STD),
        ("dinov2", CROPPING, Image.NEAREST, [0.1] * 3, CLIP_STD),
        ("dinov2_with_registers", None, Image.BICUBIC, IMAGENET_MEAN, IMAGENET_STD),
        ("internvl_vision", None, Image.BICUBIC, IMAGENET_MEAN, IMAGENET_STD),
    ],
)
@pytest.mark.parametrize("in_processor", [False, True])
def test_images_are_resized_whole_and_normalized_as_the_tower_wants(
    tmp_path, model_type, own, resample, mean, std, in_processor
):
    config = AutoConfig.for_model(model_type, **VISION)
    config.save_pretrained(tmp_path)
    if own is not None and in_processor:
        (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": own.to_dict()}))
    elif own is not None:
        own.save_pretrained(tmp_path)
    processor = load_image_processor(str(tmp_path), config, (28, 28))
    processor.save_pretrained(tmp_path / "again")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 97, 3), dtype=np.uint8)
    resized = np.asarray(Image.fromarray(pixels).resize((28, 28), resample)) / 255
    wanted = torch.from_numpy((resized - mean) / std).permute(2, 0, 1).float()
    for version in (processor, AutoImageProcessor.from_pretrained(tmp_path / "again", backend="pil")):
        pixel_values = version(images=Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(pixel_values, wanted[None], rtol=0, atol=1e-5)
