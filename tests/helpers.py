"""Shared by tests: rows, batches of the tiny model's prompts, answers with their logits, a head that chooses, GGUF."""

import json

import numpy as np
import pytest
import torch
from packaging.version import Version
from transformers import DynamicCache

from tokenflex.data.arguments import DataArguments
from tokenflex.data.loading import load_rows
from tokenflex.data.synthetic import draw_scene
from tokenflex.generation_tokenflex import TokenFlexChooser


COUNTS = [4, 16, 36, 64, (2, 5)]
MIXED = [(2, 5), 4, 64, 16, 36, (3, 1)]
IMAGES = [draw_scene(7, index).image for index in range(6)]
QUESTION = "which color?"
compiles_checks = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.10"),
    reason="torch 2.9 compiles no check of placeholders",
)


def read_rows(*dataset, seed=0, processor=None, num_vision_tokens=None, **options):
    """The rows of data sets, by the names and options of the command line."""
    return load_rows(DataArguments(list(dataset), **options), processor, num_vision_tokens, seed)


def text_rows(*answers):
    return [{"question": "which?", "answer": answer} for answer in answers]


def answers_of(examples):
    """The first answers of rows as they are read."""
    return [example.dialogs[0][1]["content"][0]["text"] for example in examples]


def assert_same_weights(first, second):
    """Of two state dicts, to the bit."""
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


def encode(processor, images_per_row, count=36, words=(QUESTION, "hi", "how tall is the red bar?"), first=0):
    """A batch whose rows hold the given numbers of images and texts of different lengths."""
    texts = ["<|image_pad|> and ".join([word] * (n + 1)) for n, word in zip(images_per_row, words * 4)]
    images = [IMAGES[(first + i) % len(IMAGES)] for i in range(sum(images_per_row))] or None
    kwargs = {"num_vision_tokens": count} if images else {}
    return processor(images=images, text=texts, padding=True, return_tensors="pt", **kwargs)


def chat_prompt(processor, images, question):
    """The text of a question behind images, as the chat template has it."""
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def generate(model, inputs, **kwargs):
    """The sequences of five new tokens at most, and the logits they were chosen by."""
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    output = model.generate(**inputs, **{**options, **kwargs})
    return output.sequences, torch.stack(output.logits)


def answer(model, inputs, **kwargs):
    """Five new tokens of each row, and the logits they were chosen by."""
    sequences, logits = generate(model, inputs, min_new_tokens=5, **kwargs)
    return sequences[:, inputs["input_ids"].shape[1] :], logits


def assert_same(got, expected):
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], atol=1e-4, rtol=0)


def give_chooser(model, choices, weight, bias=None, tolerance=0.1):
    """Lets a model choose its count by a head of these weights."""
    weight = torch.as_tensor(weight)
    chooser = TokenFlexChooser(*weight.shape)
    chooser.weight.copy_(weight)
    chooser.bias.copy_(torch.zeros(len(weight)) if bias is None else torch.as_tensor(bias))
    model.model.vision_token_chooser = chooser
    model.config.vision_token_chooser = {"choices": list(choices), "tolerance": tolerance, "reads": "text"}


def chat(*image_indices):
    content = [{"type": "image", "image": IMAGES[i]} for i in image_indices] + [{"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": content}]


def next_turn(processor, before, answers, images_per_row, new=None, count=36, words=("and now?",)):
    """The conversation with answers and a question behind it; each row's new images stand behind its earlier ones."""
    new = [0] * len(images_per_row) if new is None else new
    question = encode(processor, new, count, words, first=sum(images_per_row))
    ids = [before["input_ids"], answers, question["input_ids"]]
    masks = [before["attention_mask"], torch.ones_like(answers), question["attention_mask"]]
    inputs = {"input_ids": torch.cat(ids, dim=-1), "attention_mask": torch.cat(masks, dim=-1)}
    for name in ("pixel_values", "vision_token_grids"):
        turns = [(before, images_per_row), (question, new)]
        parts = [turn[name].split(lengths) for turn, lengths in turns if name in turn]
        inputs[name] = torch.cat([part for row in zip(*parts) for part in row])
    return inputs


def without_images(inputs):
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def fill(model, inputs):
    """The cache that `forward` fills with prompts."""
    cache = DynamicCache(config=model.config.text_config)
    position_ids = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    model(**inputs, past_key_values=cache, position_ids=position_ids)
    return cache


def write_gguf(path, tokenizer, architecture="llama", without=(), more=()):
    """A random Llama in blocks of eight bits and its tokenizer, as llama.cpp names their parts; returns the path."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, architecture)
    width, inner, layers, heads, kv_heads = 32, 64, 2, 2, 1
    writer.add_block_count(layers)
    writer.add_context_length(256)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)

    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    kinds = gguf.TokenType
    if "tokenizer" not in without:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        special = tokenizer.all_special_tokens
        writer.add_token_types([kinds.CONTROL if token in special else kinds.NORMAL for token in tokens])
        merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        writer.add_token_merges([" ".join(merge) for merge in merges])
        writer.add_eos_token_id(tokenizer.eos_token_id)
        if tokenizer.chat_template is not None:
            writer.add_chat_template(tokenizer.chat_template)

    shapes = {
        **dict.fromkeys(more, (8,)),
        "token_embd": (len(tokens), width),
        "output": (len(tokens), width),
        "output_norm": (width,),
    }
    for layer in range(layers):
        kv_width = kv_heads * width // heads
        shapes |= {
            f"blk.{layer}.attn_norm": (width,),
            f"blk.{layer}.attn_q": (width, width),
            f"blk.{layer}.attn_k": (kv_width, width),
            f"blk.{layer}.attn_v": (kv_width, width),
            f"blk.{layer}.attn_output": (width, width),
            f"blk.{layer}.ffn_norm": (width,),
            f"blk.{layer}.ffn_gate": (inner, width),
            f"blk.{layer}.ffn_up": (inner, width),
            f"blk.{layer}.ffn_down": (width, inner),
        }
    random, blocks = np.random.default_rng(0), gguf.GGMLQuantizationType.Q8_0
    for name, shape in shapes.items():
        if name in without:
            continue
        values = random.standard_normal(shape, dtype=np.float32) / 4
        if len(shape) == 1:  # llama.cpp keeps norms as they are
            writer.add_tensor(f"{name}.weight", 1 + values)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, blocks), raw_dtype=blocks)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)
