import copy
import threading

import pytest
import torch
import transformers
from helpers import MIXED, answer, assert_same, chat, compiles_checks, encode, generate
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounter
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    GenerationConfig,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from tokenflex.towers.tiny import tiny_model_and_processor


@pytest.fixture(scope="module")
def small():
    model, processor = tiny_model_and_processor(width=32)
    return model.eval(), processor


@pytest.fixture(scope="module")
def assistants(tiny):
    torch.manual_seed(0)
    text_model = AutoModelForCausalLM.from_config(tiny[0].config.text_config)
    return {"itself": tiny[0], "another": tiny_model_and_processor(seed=1)[0].eval(), "text": text_model.eval()}


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


BATCH, ROW = [1, 3, 0, 2], [3]
MODES = {
    "greedy": (BATCH, {}),
    "sampling": (BATCH, {"do_sample": True}),
    "several samples": (BATCH, {"do_sample": True, "num_return_sequences": 3}),
    "beams": (BATCH, {"num_beams": 3}),
    "several beams": (BATCH, {"num_beams": 3, "num_return_sequences": 2}),
    "sampled beams": (BATCH, {"num_beams": 2, "do_sample": True}),
    "penalties": (BATCH, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}),
    "guidance": (BATCH, {"guidance_scale": 1.5}),
    "custom": (BATCH, {"custom_generate": lambda model, *args, **kwargs: type(model)._sample(model, *args, **kwargs)}),
    "no cache": (BATCH, {"use_cache": False}),
    "no cache, beams": (BATCH, {"use_cache": False, "num_beams": 2}),
    "static cache": (BATCH, {"cache_implementation": "static"}),
    "static cache, beams": (BATCH, {"cache_implementation": "static", "num_beams": 2}),
    "8-bit cache": (BATCH, {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}),
    "chunked prefill": (BATCH, {"prefill_chunk_size": 7}),
    "chunked prefill, beams": (BATCH, {"prefill_chunk_size": 7, "num_beams": 2}),
    "chunked prefill, static cache": (BATCH, {"prefill_chunk_size": 7, "cache_implementation": "static"}),
    "assisted by itself": (ROW, {"assistant_model": "itself"}),
    "assisted": (ROW, {"assistant_model": "another"}),
    "assisted by a text model": (ROW, {"assistant_model": "text"}),
    "assisted sampling": (ROW, {"assistant_model": "another", "do_sample": True}),
    "prompt lookup": (ROW, {"prompt_lookup_num_tokens": 3}),
    "prompt lookup by one token": (ROW, {"prompt_lookup_num_tokens": 9, "max_matching_ngram_size": 1}),
}
NOT_LIKE_GREEDY = ("sampl", "beams", "penalties", "guidance", "8-bit")


@pytest.mark.parametrize("count", [4, "mixed"])
@pytest.mark.parametrize("name", MODES)
def test_every_mode_gives_at_a_count_what_encoding_at_it_gives(tiny, assistants, name, count):
    if name == "8-bit cache" and Version(transformers.__version__) < Version("5.21"):
        pytest.skip("before 5.21 transformers has no cache in fp8")
    if "chunked" in name and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("before 5.23 transformers drops the images of later chunks, so that this is refused")
    model, processor = tiny
    images_per_row, mode = MODES[name]
    count = MIXED[: sum(images_per_row)] if count == "mixed" else count
    encoded, expected = encode(processor, images_per_row), encode(processor, images_per_row, count)
    mode = {**mode, "min_new_tokens": 6, "max_new_tokens": 6, "return_dict_in_generate": True}
    if "assistant_model" in mode:
        mode["assistant_model"] = assistants[mode["assistant_model"]]
    outputs = []
    for kwargs in ({**encoded, "num_vision_tokens": count}, expected):
        torch.manual_seed(0)
        outputs.append(
            model.generate(**kwargs, **{"do_sample": False, **mode}, output_logits=True, output_scores=True)
        )
    output, plain = outputs
    length, plain_length = encoded["input_ids"].shape[1], expected["input_ids"].shape[1]
    copies = mode.get("num_return_sequences", 1)
    assert torch.equal(output.sequences[:, :length], encoded["input_ids"].repeat_interleave(copies, dim=0))
    assert torch.equal(output.sequences[:, length:], plain.sequences[:, plain_length:])
    torch.testing.assert_close(output.logits, plain.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(output.scores, plain.scores, atol=1e-4, rtol=0)
    if not any(word in name for word in NOT_LIKE_GREEDY):
        greedy, logits = generate(model, expected, min_new_tokens=6, max_new_tokens=6)
        assert torch.equal(plain.sequences, greedy)
        torch.testing.assert_close(torch.stack(plain.logits), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("owner", ["passed", "model's", "assistant's"])
def test_an_assistant_drafts_whatever_count_a_config_names(owner):
    model, processor = tiny_model_and_processor(width=32)
    assistant = tiny_model_and_processor(width=32, seed=1)[0].eval()
    options = {"max_new_tokens": 12}
    expected = answer(model.eval(), encode(processor, [3], 16), **options)
    if owner == "passed":
        options["generation_config"] = GenerationConfig(num_vision_tokens=4)
    else:
        (model if owner == "model's" else assistant).generation_config.num_vision_tokens = 4
    got = answer(model, encode(processor, [3]), num_vision_tokens=16, assistant_model=assistant, **options)
    assert_same(got, expected)


def test_one_compiled_graph_decodes_every_count(small, fresh_compiler):
    _, processor = small
    model = tiny_model_and_processor(width=32)[0].eval()
    counter = CompileCounter()
    compile_config = CompileConfig(fullgraph=True, backend=lambda graph, inputs: counter(graph, inputs), mode=None)
    compile_config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compile_config}
    model.generation_config.max_cache_len = 256
    for count in (4, 16, 36):
        got = answer(model, encode(processor, [1, 2]), num_vision_tokens=count, **options)
        assert_same(got, answer(small[0], encode(processor, [1, 2], count)))
        assert counter.frame_count == 1


@compiles_checks
def test_a_compiled_forward_prefills_and_decodes_every_count(small, fresh_compiler):
    _, processor = small
    model = tiny_model_and_processor(width=32)[0].eval()
    counter = CompileCounter()
    model.forward = torch.compile(model.forward, fullgraph=True, backend=counter, dynamic=True)
    model.generation_config.max_cache_len = 256
    for count in (4, 16, 64):
        got = answer(model, encode(processor, [1, 2]), num_vision_tokens=count, cache_implementation="static")
        assert_same(got, answer(small[0], encode(processor, [1, 2], count)))
        assert counter.frame_count == 2


def test_streamers_print_the_answer_only(tiny, capsys):
    model, processor = tiny
    inputs = encode(processor, [2])
    expected = processor.decode(answer(model, encode(processor, [2], 4))[0][0])
    options = {"skip_prompt": True, "clean_up_tokenization_spaces": False}
    answer(model, inputs, num_vision_tokens=4, streamer=TextStreamer(processor.tokenizer, **options))
    assert capsys.readouterr().out == expected + "\n"
    streamer = TextIteratorStreamer(processor.tokenizer, timeout=60, **options)
    thread = threading.Thread(
        target=answer, args=(model, inputs), kwargs={"num_vision_tokens": 4, "streamer": streamer}
    )
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


def test_lengths_and_criteria_see_the_prompt_as_generated_at(tiny):
    model, processor = tiny
    inputs, expected = encode(processor, [1, 2]), encode(processor, [1, 2], 4)
    length, used_length = inputs["input_ids"].shape[1], expected["input_ids"].shape[1]
    output = model.generate(**inputs, num_vision_tokens=4, max_length=used_length + 3, do_sample=False)
    plain = model.generate(**expected, max_length=used_length + 3, do_sample=False)
    assert torch.equal(output[:, length:], plain[:, used_length:]) and output.shape[1] == length + 3

    seen = []

    def stop(input_ids, scores, **kwargs):
        seen.append(input_ids)
        return torch.full((len(input_ids),), input_ids.shape[1] == used_length + 2)

    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    config = GenerationConfig(num_vision_tokens=4, max_new_tokens=9, do_sample=False)
    output = model.generate(inputs["input_ids"], config, None, StoppingCriteriaList([stop]), **rest)
    assert torch.equal(seen[0][:, :used_length], expected["input_ids"])
    assert output.shape[1] == length + 2


def answer_chat(model, processor, messages, count):
    template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(messages, **template, processor_kwargs={"num_vision_tokens": count})
    return processor.decode(answer(model, inputs)[0][0], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("way", ["generate_kwargs", "processor_kwargs", "argument"])
def test_pipelines_take_a_count(tiny, way, batch_size):
    model, processor = tiny
    chats = [chat(0), chat(1, 2), chat(3)]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    seen = set()
    for count in (4, 64):
        kwargs = {"generate_kwargs": dict(options), "return_full_text": False, "batch_size": batch_size}
        if way == "argument":
            kwargs["num_vision_tokens"] = count
        else:
            kwargs[way] = {**kwargs.get(way, {}), "num_vision_tokens": count}
        texts = [output[0]["generated_text"] for output in pipe(text=chats, **kwargs)]
        assert texts == [answer_chat(model, processor, messages, count) for messages in chats]
        assert pipe(text=chats[1], **kwargs)[0]["generated_text"] == texts[1]
        seen.add(tuple(texts))
    assert len(seen) == 2, "the counts differ in what they say"


def test_a_lora_model_takes_a_count(small):
    model, processor = copy.deepcopy(small[0]), small[1]
    before = answer(model, encode(processor, [1, 2], 4))[1]
    targets = r".*language_model.*\.(q_proj|v_proj)"
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    expected = answer(model, encode(processor, [1, 2], 4))
    assert (expected[1] - before).abs().max() > 1e-2
    assert_same(answer(model, encode(processor, [1, 2]), num_vision_tokens=4), expected)
