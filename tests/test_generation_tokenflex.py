import copy
import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounter
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    StaticCache,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from tokenflex.data.synthetic import draw_scene
from tokenflex.towers.tiny import tiny_model_and_processor


COUNTS = [4, 16, 36, 64, (2, 5)]
MIXED = [(2, 5), 4, 64, 16, 36, (3, 1)]
IMAGES = [draw_scene(7, index).image for index in range(6)]
QUESTION = "which color?"


def encode(processor, images_per_row, count=36, words=(QUESTION, "hi", "how tall is the red bar?"), first=0):
    """A batch whose rows hold the given numbers of images and texts of different lengths."""
    texts = ["<|image_pad|> and ".join([word] * (n + 1)) for n, word in zip(images_per_row, words * 4)]
    images = [IMAGES[(first + i) % len(IMAGES)] for i in range(sum(images_per_row))] or None
    kwargs = {"num_vision_tokens": count} if images else {}
    return processor(images=images, text=texts, padding=True, return_tensors="pt", **kwargs)


def generate(model, inputs, **kwargs):
    settings_ = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    output = model.generate(**inputs, **{**settings_, **kwargs})
    return output.sequences, torch.stack(output.logits)


def answer(model, inputs, **kwargs):
    """Five new tokens of each row, and the logits they were chosen by."""
    sequences, logits = generate(model, inputs, min_new_tokens=5, **kwargs)
    return sequences[:, inputs["input_ids"].shape[1] :], logits


def assert_same(got, expected):
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], atol=1e-4, rtol=0)


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


@pytest.fixture
def tower_passes(tiny):
    passes = []
    hook = tiny[0].model.vision_tower.register_forward_hook(lambda *_: passes.append(1))
    yield passes
    hook.remove()


# Counts


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("encoded_at", [4, 36])
def test_generating_at_a_count_equals_encoding_at_it(tiny, encoded_at, count, num_beams):
    model, processor = tiny
    images_per_row = [1, 3, 0, 2]
    encoded, expected = encode(processor, images_per_row, encoded_at), encode(processor, images_per_row, count)
    sequences, logits = generate(model, encoded, num_vision_tokens=count, num_beams=num_beams)
    expected_sequences, expected_logits = generate(model, expected, num_beams=num_beams)
    length = encoded["input_ids"].shape[1]
    assert torch.equal(sequences[:, :length], encoded["input_ids"])
    assert torch.equal(sequences[:, length:], expected_sequences[:, expected["input_ids"].shape[1] :])
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=0)
    plain = model.generate(**encoded, num_vision_tokens=count, num_beams=num_beams, max_new_tokens=5, do_sample=False)
    assert torch.equal(plain, sequences)


def test_each_image_can_have_its_own_count(tiny):
    model, processor = tiny
    counts = [4, 64, (2, 5), 16]
    sequences, logits = generate(model, encode(processor, [1, 3]), num_vision_tokens=counts)
    _, expected = generate(model, encode(processor, [1, 3], counts))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_return_sequences_stand_behind_the_callers_prompt(tiny):
    model, processor = tiny
    inputs = encode(processor, [1, 2])
    output = model.generate(
        **inputs, num_vision_tokens=4, num_beams=2, num_return_sequences=2, max_new_tokens=3, do_sample=False
    )
    assert torch.equal(output[:, : inputs["input_ids"].shape[1]], inputs["input_ids"].repeat_interleave(2, dim=0))


def test_precedence_of_counts(tiny):
    _, processor = tiny
    model = tiny_model_and_processor()[0].eval()
    inputs = encode(processor, [1, 2])
    at = {count: generate(model, encode(processor, [1, 2], count))[1] for count in (4, 16, 64)}
    own = GenerationConfig(**model.generation_config.to_dict(), num_vision_tokens=4)
    model.generation_config = own
    torch.testing.assert_close(generate(model, inputs)[1], at[4], atol=1e-4, rtol=0)
    passed = GenerationConfig(
        num_vision_tokens=16, max_new_tokens=5, return_dict_in_generate=True, output_logits=True, do_sample=False
    )
    logits = torch.stack(model.generate(**inputs, generation_config=passed).logits)
    torch.testing.assert_close(logits, at[16], atol=1e-4, rtol=0)
    logits = torch.stack(model.generate(**inputs, generation_config=passed, num_vision_tokens=64).logits)
    torch.testing.assert_close(logits, at[64], atol=1e-4, rtol=0)


def test_hand_built_inputs_without_grids_or_mask(tiny):
    model, processor = tiny
    inputs = encode(processor, [1])
    bare = {"inputs": inputs["input_ids"], "pixel_values": inputs["pixel_values"]}
    _, expected = generate(model, encode(processor, [1], 4))
    torch.testing.assert_close(generate(model, bare, num_vision_tokens=4)[1], expected, atol=1e-4, rtol=0)


def test_a_padded_batch_without_mask_is_recounted_by_its_padding(tiny):
    model, processor = tiny
    inputs, expected = encode(processor, [2, 1]), encode(processor, [2, 1], 4)
    assert inputs.pop("attention_mask").min() == expected.pop("attention_mask").min() == 0
    logits = generate(model, inputs, num_vision_tokens=4)[1]
    torch.testing.assert_close(logits, generate(model, expected)[1], atol=1e-4, rtol=0)


def test_text_only_prompts_have_no_count(tiny):
    model, processor = tiny
    inputs = encode(processor, [0, 0])
    assert torch.equal(generate(model, inputs, num_vision_tokens=4)[0], generate(model, inputs)[0])
    with pytest.raises(ValueError, match="`num_vision_tokens`=5"):
        model.generate(**inputs, num_vision_tokens=5)


@pytest.mark.parametrize("count", [1, 16, (2, 5), (8, 1), MIXED])
def test_each_image_gets_exactly_what_it_gets_alone(tiny, count):
    model, processor = tiny
    counts = count if isinstance(count, list) else [count] * len(IMAGES)
    inputs = encode(processor, [3, 1, 2])
    grids = [count if isinstance(count, tuple) else (math.isqrt(count), math.isqrt(count)) for count in counts]
    together = model.get_image_features(inputs["pixel_values"], num_vision_tokens=count)
    assert together.vision_token_grids == grids
    for i, alone in enumerate(counts):
        features = model.get_image_features(inputs["pixel_values"][i : i + 1], num_vision_tokens=alone).pooler_output
        torch.testing.assert_close(together.pooler_output[i], features[0], atol=1e-5, rtol=0)
    assert_same(answer(model, inputs, num_vision_tokens=count), answer(model, encode(processor, [3, 1, 2], counts)))


def draw_counts(data, number):
    return data.draw(st.lists(st.sampled_from([1, 4, 9, 36, 64, (2, 5), (8, 1)]), min_size=number, max_size=number))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_batch_gives_row_by_row_what_single_prompts_give(small, data):
    model, processor = small
    images_per_row = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any))
    words = [f"is it {'very ' * data.draw(st.integers(0, 8))}red?" for _ in images_per_row]
    encoded, counts = (draw_counts(data, sum(images_per_row)) for _ in range(2))
    options = {"max_new_tokens": 2, "min_new_tokens": 2}
    batch = encode(processor, images_per_row, encoded, tuple(words))
    sequences, logits = generate(model, batch, num_vision_tokens=counts, **options)
    never = [processor.image_token_id, processor.tokenizer.eos_token_id]
    first = 0
    for row, (n, word) in enumerate(zip(images_per_row, words)):
        single = encode(processor, [n], counts[first : first + n], (word,), first)
        first += n
        single_sequences, single_logits = generate(model, single, **options)
        for step in (0, 1):
            expected = single_logits[step, 0]
            torch.testing.assert_close(logits[step, row], expected, atol=1e-4, rtol=0)
            best, second = expected.index_fill(0, torch.tensor(never), -torch.inf).topk(2).values
            if best - second < 1e-3:  # either token may win, and the next step depends on it
                break
            assert sequences[row, step - 2] == single_sequences[0, step - 2]


# Decoding modes


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


def chat(*image_indices):
    content = [{"type": "image", "image": IMAGES[i]} for i in image_indices] + [{"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": content}]


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


# Kept images


def test_one_tower_pass_serves_every_count_and_question(tiny):
    model, processor = tiny
    passes = []
    hook = model.model.vision_tower.register_forward_hook(lambda *_: passes.append(1))
    try:
        features = model.get_image_features(encode(processor, [2])["pixel_values"])
        for count in (4, 16, 64):
            inputs = encode(processor, [2], words=(f"question {count}",))
            expected = generate(model, encode(processor, [2], count, words=(f"question {count}",)))[1]
            inputs.pop("pixel_values")
            passes.clear()
            kept = {"image": features}
            logits = generate(model, inputs, mm_encoder_outputs=kept, num_vision_tokens=count, num_beams=1)[1]
            assert not passes
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
            assert kept == {"image": features}
        passes.clear()
        generate(model, encode(processor, [2, 1]), num_vision_tokens=4)
        assert len(passes) == 1
    finally:
        hook.remove()


def test_three_counts_and_three_questions_take_one_tower_pass(tiny, tower_passes):
    model, processor = tiny
    questions = ("which color?", "how tall is the red bar?", "where?")
    expected = [
        answer(model, encode(processor, [1], count, (question,))) for count in (4, 16, 64) for question in questions
    ]
    tower_passes.clear()
    kept = {"image": model.get_image_features(encode(processor, [1])["pixel_values"])}
    prompts = [encode(processor, [1], words=(question,)) for question in questions]
    for prompt in prompts:
        prompt.pop("pixel_values")
    got = [
        answer(model, prompt, mm_encoder_outputs=kept, num_vision_tokens=count)
        for count in (4, 16, 64)
        for prompt in prompts
    ]
    assert len(tower_passes) == 1
    for one, other in zip(got, expected):
        assert_same(one, other)


# Conversations


def first_turn(model, processor, images_per_row, count, **kwargs):
    """Inputs encoded at 36, the answers at `count`, and the cache that holds all but their last token."""
    inputs = encode(processor, images_per_row)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    output = model.generate(**inputs, num_vision_tokens=count, **{**options, **kwargs})
    return inputs, output.sequences[:, inputs["input_ids"].shape[1] :], output.past_key_values


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


@pytest.mark.parametrize("told", [False, True], ids=["untold", "told"])
@pytest.mark.parametrize("given_images", [False, True], ids=["no images", "all images"])
@pytest.mark.parametrize("encoded_at", ["36", "used"])
@pytest.mark.parametrize("count", [4, 64, "mixed"])
@pytest.mark.parametrize("images_per_row", [[2], [1, 2], [0, 2]])
def test_a_second_question_goes_on_in_the_cache(tiny, images_per_row, count, encoded_at, given_images, told):
    model, processor = tiny
    count = MIXED[: sum(images_per_row)] if count == "mixed" else count
    inputs, answers, cache = first_turn(model, processor, images_per_row, count)
    at_count = next_turn(processor, encode(processor, images_per_row, count), answers, images_per_row)
    second = at_count if encoded_at == "used" else next_turn(processor, inputs, answers, images_per_row)
    second = second if given_images else without_images(second)
    kwargs = {"num_vision_tokens": count} if told else {}
    assert_same(answer(model, second, past_key_values=cache, **kwargs), answer(model, at_count))


@pytest.mark.parametrize("given_images", ["all images", "new images"])
@pytest.mark.parametrize("new_count", ["as encoded", "as cached", "mixed"])
@pytest.mark.parametrize("count", [4, 64])
@pytest.mark.parametrize(
    ("images_per_row", "new"), [([1], [1]), ([1, 2], [1, 1]), ([1, 2], [1, 0]), ([0, 1], [2, 1]), ([2, 1], [0, 2])]
)
def test_new_images_come_into_a_conversation(tiny, images_per_row, new, count, new_count, given_images):
    model, processor = tiny
    inputs, answers, cache = first_turn(model, processor, images_per_row, count)
    new_counts = [{"as encoded": 36, "as cached": count, "mixed": mixed}[new_count] for mixed in MIXED[: sum(new)]]
    at_count = encode(processor, images_per_row, count)
    expected = answer(model, next_turn(processor, at_count, answers, images_per_row, new, new_counts))
    second = next_turn(processor, inputs, answers, images_per_row, new)
    if given_images == "new images":
        second.update({**encode(processor, new, first=sum(images_per_row)), **without_images(second)})
    kwargs = {}
    if new_count == "as cached":
        kwargs["num_vision_tokens"] = count
    elif new_count == "mixed":
        new_counts = iter(new_counts)
        kwargs["num_vision_tokens"] = [
            one
            for earlier, later in zip(images_per_row, new)
            for one in [count] * earlier + [next(new_counts) for _ in range(later)]
        ]
    assert_same(answer(model, second, past_key_values=cache, **kwargs), expected)


@pytest.mark.parametrize("given_images", [False, True])
def test_a_conversation_goes_on_for_many_turns(tiny, given_images):
    model, processor = tiny
    images_per_row = [1, 2]
    inputs, answers, cache = first_turn(model, processor, images_per_row, 4)
    at_count = encode(processor, images_per_row, 4)
    for word in ("and now?", "why?", "how tall is the red bar?"):
        at_count = next_turn(processor, at_count, answers, images_per_row, words=(word,))
        inputs = next_turn(processor, inputs, answers, images_per_row, words=(word,))
        turn = inputs if given_images else without_images(inputs)
        got = answer(model, turn, past_key_values=cache)
        assert_same(got, answer(model, at_count))
        answers = got[0]


@pytest.mark.parametrize("length", [60, 100])
def test_a_long_text_behind_recounted_images_stays_in_the_cache(tiny, length):
    model, processor = tiny
    words = (" ".join(["red"] * length),)
    inputs = encode(processor, [1], words=words)
    answers, _ = answer(model, inputs, num_vision_tokens=4, past_key_values=(cache := DynamicCache()))
    used_length = cache.get_seq_length()
    at_count = next_turn(processor, encode(processor, [1], 4, words), answers, [1])
    expected = answer(model, at_count)
    second = next_turn(processor, inputs, answers, [1])
    assert used_length < int((inputs["input_ids"] == processor.image_token_id).nonzero()[-1, 1]) + length
    for turn in (second, without_images(second), at_count, without_images(at_count)):
        assert_same(answer(model, turn, past_key_values=copy.deepcopy(cache)), expected)


@pytest.mark.parametrize("count", [4, 64])
@pytest.mark.parametrize("encoded_at", ["36", "used"])
def test_conversations_may_be_padded_anew(tiny, encoded_at, count):
    model, processor = tiny
    inputs, answers, cache = first_turn(model, processor, [1, 2], count)
    at_count = encode(processor, [1, 2], count)
    words = ("and now?", "how tall is the red bar?")
    expected = answer(model, next_turn(processor, at_count, answers, [1, 2], words=words))
    second = next_turn(processor, at_count if encoded_at == "used" else inputs, answers, [1, 2], words=words)
    rows = [ids[mask == 1].tolist() for ids, mask in zip(second["input_ids"], second["attention_mask"])]
    second.update(processor.tokenizer.pad({"input_ids": rows}, return_tensors="pt"))
    assert second["attention_mask"].min() == 0
    assert_same(answer(model, second, past_key_values=cache), expected)


def test_an_answer_that_ends_early_is_padded_in_the_cache(tiny):
    model, processor = tiny
    _, answers, _ = first_turn(model, processor, [1, 2], 4)
    end = int(answers[0, 1])
    assert end not in answers[1]
    _, answers, cache = first_turn(model, processor, [1, 2], 4, eos_token_id=end, min_new_tokens=None)
    assert (answers[0, 2:] == processor.tokenizer.pad_token_id).all() and answers.shape[1] == 5
    turns = []
    for count in (4, 36):
        before = encode(processor, [1, 2], count)
        turn = next_turn(processor, before, answers, [1, 2])
        length = before["input_ids"].shape[1]
        turn["attention_mask"][0, length + 2 : length + 5] = 0
        turns.append(turn)
    expected = answer(model, turns[0])
    alone = {name: turns[0][name][:1] for name in turns[0]}
    kept = alone["attention_mask"][0] == 1
    alone.update({name: alone[name][:, kept] for name in ("input_ids", "attention_mask")})
    torch.testing.assert_close(expected[1][:, :1], answer(model, alone)[1], atol=1e-4, rtol=0)
    for turn in (turns[1], without_images(turns[1]), turns[0], without_images(turns[0])):
        assert_same(answer(model, turn, past_key_values=copy.deepcopy(cache)), expected)


@pytest.mark.parametrize("first_count", [4, 36])
def test_padding_that_all_rows_share_stays_in_its_place(tiny, first_count):
    model, processor = tiny
    inputs = {
        **encode(processor, [1]),
        **processor.tokenizer.pad(
            {name: encode(processor, [1])[name] for name in ("input_ids", "attention_mask")},
            padding="max_length",
            max_length=90,
        ),
    }
    answers, _ = answer(model, inputs, num_vision_tokens=first_count, past_key_values=(cache := DynamicCache()))
    at_counts = next_turn(processor, encode(processor, [1], first_count), answers, [1], [1], 9)
    second = next_turn(processor, inputs, answers, [1], [1])
    got = answer(model, second, past_key_values=cache, num_vision_tokens=[first_count, 9])
    assert_same(got, answer(model, at_counts))


@pytest.mark.parametrize("in_one_batch", [False, True])
def test_a_copied_cache_answers_several_questions(tiny, tower_passes, in_one_batch):
    model, processor = tiny
    inputs, answers, cache = first_turn(model, processor, [2], 4)
    questions = ("and now?", "but why?", "or what?")
    at_count = encode(processor, [2], 4)
    expected = [answer(model, next_turn(processor, at_count, answers, [2], words=(word,))) for word in questions]
    tower_passes.clear()
    if in_one_batch:
        batch = {name: torch.cat([inputs[name]] * 3) for name in inputs}
        batch = without_images(next_turn(processor, batch, torch.cat([answers] * 3), [2] * 3, words=questions))
        cache.batch_repeat_interleave(3)
        tokens, logits = answer(model, batch, past_key_values=cache)
        got = [(tokens[i : i + 1], logits[:, i : i + 1]) for i in range(3)]
    else:
        turns = [without_images(next_turn(processor, inputs, answers, [2], words=(word,))) for word in questions]
        got = [answer(model, turn, past_key_values=copy.deepcopy(cache)) for turn in turns]
    assert not tower_passes
    for one, other in zip(got, expected):
        assert_same(one, other)


@pytest.mark.parametrize(
    "mode",
    [{"num_beams": 2}, {"prefill_chunk_size": 2}, {"do_sample": True, "num_return_sequences": 2}],
    ids=["beams", "chunked prefill", "several samples"],
)
def test_other_modes_go_on_in_the_cache(tiny, mode):
    model, processor = tiny
    inputs, answers, cache = first_turn(model, processor, [1, 2], 4)
    cache.batch_repeat_interleave(max(mode.get("num_beams", 1), mode.get("num_return_sequences", 1)))
    at_count = next_turn(processor, encode(processor, [1, 2], 4), answers, [1, 2])
    second = without_images(next_turn(processor, inputs, answers, [1, 2]))
    torch.manual_seed(0)
    expected = answer(model, at_count, **mode)
    torch.manual_seed(0)
    assert_same(answer(model, second, past_key_values=cache, **mode), expected)


LONG = " ".join(["red"] * 80)  # longer than re-counting from 4 to 36 makes a prompt


@pytest.mark.parametrize("given_images", [False, True])
@pytest.mark.parametrize(("encoded_at", "count"), [(36, 4), (4, 36)])
def test_a_cache_of_beams_goes_on_when_cropped_to_the_prompt(tiny, encoded_at, count, given_images):
    model, processor = tiny
    inputs, at_count = encode(processor, [1, 2], encoded_at), encode(processor, [1, 2], count)
    options = {"num_beams": 2, "past_key_values": (cache := DynamicCache())}
    answer(model, inputs, num_vision_tokens=count, **options)
    cache.crop(at_count["input_ids"].shape[1] - cache.get_seq_length())
    no_answers = inputs["input_ids"][:, :0]
    expected = answer(model, next_turn(processor, at_count, no_answers, [1, 2], words=(LONG,)), num_beams=2)
    second = next_turn(processor, inputs, no_answers, [1, 2], words=(LONG,))
    assert_same(answer(model, second if given_images else without_images(second), **options), expected)


@pytest.mark.parametrize("given_images", [False, True])
@pytest.mark.parametrize("change", ["beams", "longer", "one row"])
def test_a_recounted_cache_that_was_changed_is_refused(tiny, change, given_images):
    model, processor = tiny
    inputs = encode(processor, [1, 1], 4)
    options = {"num_beams": 2} if change == "beams" else {}
    answers, _ = answer(model, inputs, num_vision_tokens=36, past_key_values=(cache := DynamicCache()), **options)
    second = next_turn(processor, inputs, answers, [1, 1], words=(LONG,))
    second = second if given_images else without_images(second)
    if change == "longer":
        with torch.no_grad():
            model(input_ids=answers[:, -1:], past_key_values=cache)
    elif change == "one row":
        cache.batch_select_indices(torch.tensor([1]))
        second = {name: value[1:] for name, value in second.items()}
    with pytest.raises(ValueError, match="past_key_values"):
        model.generate(**second, past_key_values=cache, **options)


def test_samples_of_one_prompt_go_on_in_their_cache(tiny):
    model, processor = tiny
    torch.manual_seed(0)
    inputs = encode(processor, [2])
    options = {"do_sample": True, "num_return_sequences": 2, "past_key_values": (cache := DynamicCache())}
    answers, _ = answer(model, inputs, num_vision_tokens=4, **options)
    copies = {name: torch.cat([value] * 2) for name, value in inputs.items()}
    at_count = {name: torch.cat([value] * 2) for name, value in encode(processor, [2], 4).items()}
    expected = answer(model, next_turn(processor, at_count, answers, [2, 2]))
    second = without_images(next_turn(processor, copies, answers, [2, 2]))
    assert_same(answer(model, second, past_key_values=cache), expected)


def test_a_static_cache_goes_on(tiny):
    model, processor = tiny
    cache = StaticCache(config=model.config.text_config, max_cache_len=256)
    inputs, answers, _ = first_turn(model, processor, [2], 4, past_key_values=cache)
    at_count = next_turn(processor, encode(processor, [2], 4), answers, [2])
    second = without_images(next_turn(processor, inputs, answers, [2]))
    assert_same(answer(model, second, past_key_values=cache), answer(model, at_count))


def test_kept_features_go_on_in_the_cache(tiny, tower_passes):
    model, processor = tiny
    inputs, answers, cache = first_turn(model, processor, [1], 4)
    second = next_turn(processor, inputs, answers, [1], [1])
    at_count = next_turn(processor, encode(processor, [1], 4), answers, [1], [1], 16)
    expected = answer(model, at_count)
    features = [model.get_image_features(images) for images in (second["pixel_values"], second["pixel_values"][1:])]
    tower_passes.clear()
    for kept in features:
        turn = {**without_images(second), "mm_encoder_outputs": {"image": kept}, "num_vision_tokens": [4, 16]}
        assert_same(answer(model, turn, past_key_values=copy.deepcopy(cache)), expected)
    assert not tower_passes


def test_a_stored_default_leaves_images_in_the_cache_as_they_are(small):
    model, processor = copy.deepcopy(small[0]), small[1]
    model.generation_config.num_vision_tokens = 4
    inputs, answers, cache = first_turn(model, processor, [1], 16)
    at_count = next_turn(processor, encode(processor, [1], 16), answers, [1], [1], 4)
    second = next_turn(processor, inputs, answers, [1], [1])
    assert_same(answer(model, second, past_key_values=cache), answer(small[0], at_count))


@pytest.mark.parametrize("given_images", [False, True])
@pytest.mark.parametrize("encoded_at", [4, 36])
def test_another_count_than_the_caches_is_refused(tiny, encoded_at, given_images):
    model, processor = tiny
    inputs, answers, cache = first_turn(model, processor, [1, 2], 4)
    second = next_turn(processor, encode(processor, [1, 2], encoded_at), answers, [1, 2])
    second = second if given_images else without_images(second)
    length = cache.get_seq_length()
    for count in (16, 36, [4, 4, 16]):
        message = rf"`num_vision_tokens`=.*16.*{length} tokens.*\(2, 2\)" if count != 36 else "`num_vision_tokens`=36"
        with pytest.raises(ValueError, match=message):
            model.generate(**second, past_key_values=cache, num_vision_tokens=count)
    assert cache.get_seq_length() == length


@torch.no_grad()
def fill(model, inputs):
    cache = DynamicCache(config=model.config.text_config)
    position_ids = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    model(**inputs, past_key_values=cache, position_ids=position_ids)
    return cache


@pytest.mark.parametrize("told", [False, True], ids=["untold", "told"])
@pytest.mark.parametrize("given_images", [False, True], ids=["no images", "all images"])
@pytest.mark.parametrize("images_per_row", [[2], [1, 2]])
def test_a_cache_that_forward_filled_goes_on_at_its_own_count(tiny, images_per_row, given_images, told):
    model, processor = tiny
    inputs = encode(processor, images_per_row, 16)
    cache = fill(model, inputs)
    kwargs = {"num_vision_tokens": 16} if told else {}
    answers = inputs["input_ids"][:, :0]
    for word in ("and now?", "why?"):
        inputs = next_turn(processor, inputs, answers, images_per_row, words=(word,))
        turn = inputs if given_images else without_images(inputs)
        got = answer(model, turn, past_key_values=cache, **kwargs)
        assert_same(got, answer(model, inputs))
        answers = got[0]


@pytest.mark.parametrize("given_images", [False, True], ids=["no images", "all images"])
def test_a_cache_that_forward_filled_refuses_another_count(tiny, given_images):
    model, processor = tiny
    inputs = encode(processor, [1, 2], 16)
    cache = fill(model, inputs)
    second = next_turn(processor, inputs, inputs["input_ids"][:, :0], [1, 2])
    second = second if given_images else without_images(second)
    with pytest.raises(ValueError, match=rf"`num_vision_tokens`=4.*{cache.get_seq_length()} tokens"):
        model.generate(**second, past_key_values=cache, num_vision_tokens=4)


@pytest.mark.parametrize("given_images", ["all images", "new images"])
def test_new_images_come_behind_a_cache_that_forward_filled(tiny, given_images):
    model, processor = tiny
    inputs = encode(processor, [1], 4)
    cache = fill(model, inputs)
    second = next_turn(processor, inputs, inputs["input_ids"][:, :0], [1], [1], 16)
    turn = second
    if given_images == "new images":
        turn = {**second, **{name: second[name][1:] for name in ("pixel_values", "vision_token_grids")}}
    assert_same(answer(model, turn, past_key_values=cache), answer(model, second))


@pytest.mark.parametrize("count", [None, 4])
@pytest.mark.parametrize("filled_by", ["forward", "generate"])
def test_images_come_behind_a_cached_text(tiny, filled_by, count):
    model, processor = tiny
    text = {**encode(processor, [0, 0])}
    answers = text["input_ids"][:, :0]
    if filled_by == "forward":
        cache = fill(model, text)
    else:
        answers, _ = answer(model, text, past_key_values=(cache := DynamicCache()))
    second = next_turn(processor, text, answers, [0, 0], [1, 2])
    kwargs = {} if count is None else {"num_vision_tokens": count}
    expected = next_turn(processor, text, answers, [0, 0], [1, 2], count or 36)
    assert_same(answer(model, second, past_key_values=cache, **kwargs), answer(model, expected))


@pytest.mark.parametrize("count", [None, 16])
def test_a_cache_cropped_before_an_image_forgets_it(tiny, count):
    model, processor = tiny
    text = "hello there <|image_pad|> which color?"
    prompts = {n: processor(images=IMAGES[0], text=text, num_vision_tokens=n, return_tensors="pt") for n in (16, 36)}
    answer(model, prompts[36], num_vision_tokens=4, past_key_values=(cache := DynamicCache()))
    cache.crop(2 - cache.get_seq_length())
    kwargs = {} if count is None else {"num_vision_tokens": count}
    got = answer(model, prompts[36], past_key_values=cache, **kwargs)
    assert_same(got, answer(model, prompts[count or 36]))


def test_rows_in_another_order_than_the_caches_are_refused(tiny):
    model, processor = tiny
    inputs, answers, cache = first_turn(model, processor, [1, 1], [4, 64])
    second = without_images(next_turn(processor, inputs, answers, [1, 1]))
    with pytest.raises(ValueError, match="past_key_values"):
        model.generate(**{name: value.flip(0) for name, value in second.items()}, past_key_values=cache)


def test_a_kept_cache_goes_on_at_the_count_it_was_made_with(tiny):
    model, processor = tiny
    inputs = encode(processor, [1])
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(**inputs, **options)
    ids = torch.cat([first.sequences, torch.tensor([[70, 71]])], dim=-1)
    again = model.generate(input_ids=ids, past_key_values=first.past_key_values, **options)
    whole = model.generate(input_ids=ids, pixel_values=inputs["pixel_values"], **options)
    assert torch.equal(again.sequences, whole.sequences)


# Bad input


def test_placeholders_without_images_are_refused(tiny):
    model, processor = tiny
    inputs = encode(processor, [1])
    with pytest.raises(ValueError, match="there are no images"):
        model.generate(input_ids=inputs["input_ids"])


def test_runs_that_are_not_the_grids_are_refused(tiny):
    model, processor = tiny
    inputs = encode(processor, [2], [4, 16])
    inputs["vision_token_grids"] = inputs["vision_token_grids"].flip(0)
    with pytest.raises(ValueError, match=r"encoded as \[16, 4\] tokens in unbroken runs"):
        model.generate(**inputs)
    with pytest.raises(ValueError, match=r"`vision_token_grids` has shape \(2,\)"):
        model.generate(**{**inputs, "vision_token_grids": torch.tensor([4, 16])})


@pytest.mark.parametrize("count", [0, -4, 5, 81, 2.5, "4", [4], (9, 1)])
def test_a_count_that_is_not_allowed_is_refused(tiny, count):
    model, processor = tiny
    with pytest.raises(ValueError, match="num_vision_tokens"):
        model.generate(**encode(processor, [2]), num_vision_tokens=count)


def test_embeddings_cannot_be_rewritten(tiny):
    model, processor = tiny
    inputs = encode(processor, [1])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    without_ids = {name: value for name, value in inputs.items() if name != "input_ids"}
    with pytest.raises(ValueError, match="cannot be applied to `inputs_embeds`"):
        model.generate(**without_ids, inputs_embeds=embeds, num_vision_tokens=4)


@pytest.mark.parametrize("images_per_row", [[2], [0]])
@pytest.mark.parametrize("counts", [[4], [4, 4, 4]])
def test_a_list_of_counts_has_one_per_image(tiny, counts, images_per_row):
    model, processor = tiny
    message = rf"`num_vision_tokens` lists {len(counts)} counts for {sum(images_per_row)} images"
    with pytest.raises(ValueError, match=message):
        model.generate(**encode(processor, images_per_row), num_vision_tokens=counts)


@pytest.mark.parametrize(
    ("count", "message"), [(81, "=81.*8 x 8"), ((9, 1), r"=\(9, 1\).*\(8, 8\)"), ([4, 81], "=81")]
)
def test_a_count_beyond_the_patch_grid_is_refused(tiny, count, message):
    model, processor = tiny
    with pytest.raises(ValueError, match="num_vision_tokens.*" + message):
        model.generate(**encode(processor, [2]), num_vision_tokens=count)


@pytest.mark.parametrize(
    ("runs", "num_images", "message"),
    [
        ([5], 1, "`input_ids`.*=5"),
        ([4, 4], 1, "=8"),
        ([4, 3], 2, r"\[7\] image tokens for 2 images"),
        ([3, 5], 2, r"8 image tokens.*\[4, 4\] tokens in unbroken runs"),
        ([4], 2, "`input_ids`.*=2"),
    ],
)
def test_hand_made_prompts_whose_runs_do_not_match_are_refused(tiny, runs, num_images, message):
    model, processor = tiny
    ids = [token for run in runs for token in [70] + [processor.image_token_id] * run]
    pixel_values = encode(processor, [num_images])["pixel_values"]
    for kwargs in ({}, {"num_vision_tokens": 16}):
        with pytest.raises(ValueError, match=message):
            model.generate(input_ids=torch.tensor([[*ids, 71]]), pixel_values=pixel_values, **kwargs)


def test_the_image_token_in_a_users_text_is_text_or_refused(tiny):
    model, processor = tiny
    template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    messages = chat(0)
    messages[0]["content"].append({"type": "text", "text": "what does <|image_pad|> mean?"})
    with pytest.raises(ValueError, match="`text` has 2 .* holds 1"):
        processor.apply_chat_template(messages, **template)
    inputs, expected = (
        processor.apply_chat_template(
            messages, **template, sanitize_control_tokens=True, processor_kwargs={"num_vision_tokens": count}
        )
        for count in (36, 4)
    )
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 36
    assert "<|image_pad|> mean?" in processor.decode(inputs["input_ids"][0])
    assert_same(answer(model, inputs, num_vision_tokens=4), answer(model, expected))


@pytest.fixture(scope="module")
def model_that_wants_images(small):
    model = tiny_model_and_processor(width=32)[0].eval()
    model.generation_config = GenerationConfig(pad_token_id=model.generation_config.pad_token_id)
    bias = torch.zeros(model.config.text_config.vocab_size)
    bias[model.config.image_token_id] = 1000
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + bias)
    return model


@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"do_sample": True},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1},
        {"assistant_model": "itself"},
        {"use_cache": False},
        {"guidance_scale": 1.5},
    ],
    ids=["greedy", "sampling", "beams", "prompt lookup", "assisted", "no cache", "guidance"],
)
def test_no_image_token_is_generated(model_that_wants_images, small, mode):
    model, processor = model_that_wants_images, small[1]
    if "assistant_model" in mode:
        mode = {"assistant_model": model}
    inputs = encode(processor, [2], words=("which color? which color?",))
    tokens, logits = answer(model, inputs, num_vision_tokens=4, **mode)
    assert (logits.argmax(-1) == processor.image_token_id).all(), "the model wants it at every step"
    assert not (tokens == processor.image_token_id).any()


@pytest.mark.parametrize("filled_by", ["forward", "generate"])
def test_a_cache_that_ends_inside_an_image_is_refused(tiny, filled_by):
    model, processor = tiny
    if filled_by == "generate":
        inputs, answers, cache = first_turn(model, processor, [1], 16)
    else:
        inputs = encode(processor, [1])
        answers, cache = inputs["input_ids"][:, :0], fill(model, inputs)
    images = (inputs["input_ids"][0] == processor.image_token_id).nonzero()
    cache.crop(int(images[0]) + 7 - cache.get_seq_length())
    second = next_turn(processor, inputs, answers, [1])
    message = rf"`past_key_values` ends after {cache.get_seq_length()} tokens, inside an image"
    with pytest.raises(ValueError, match=message):
        model.generate(**second, past_key_values=cache)


def test_a_prompt_shorter_than_the_cache_is_refused(tiny):
    model, processor = tiny
    inputs, answers, cache = first_turn(model, processor, [1], 4)
    for prompt in (inputs, encode(processor, [1], 4)):
        with pytest.raises(ValueError, match=r"`past_key_values` holds \d+ tokens.* the prompt has only \d+"):
            model.generate(**prompt, past_key_values=cache)
    only_new = torch.cat([answers[:, -1:], encode(processor, [0])["input_ids"]], dim=-1)
    with pytest.raises(ValueError, match="`past_key_values`"):
        model.generate(only_new, past_key_values=cache)
    width = cache.get_seq_length() + only_new.shape[1]
    with pytest.raises(ValueError, match=rf"`attention_mask`.*{width}.*{only_new.shape[1]}"):
        model.generate(only_new, past_key_values=cache, attention_mask=torch.ones(1, width, dtype=torch.long))


@pytest.mark.parametrize("mode", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": "another"}])
def test_drafting_does_not_go_on_in_a_filled_cache(tiny, assistants, mode):
    # transformers 5.23 feeds the whole prompt behind what is in the cache already, and the answer is wrong.
    model, processor = tiny
    inputs, answers, cache = first_turn(model, processor, [1], 4)
    mode = {"assistant_model": assistants["another"]} if "assistant_model" in mode else mode
    second = without_images(next_turn(processor, inputs, answers, [1]))
    with pytest.raises(ValueError, match=rf"`past_key_values` holds {cache.get_seq_length()} tokens"):
        model.generate(**second, past_key_values=cache, max_new_tokens=5, **mode)


def test_continuous_batching_refuses_images(tiny):
    # It takes token ids only, and would answer as if the images were not there.
    model, processor = tiny
    inputs = encode(processor, [1])
    for kwargs in ({}, {"num_vision_tokens": 4}):
        with pytest.raises(ValueError, match="no images.*(4|36) image tokens"):
            model.generate(**inputs, **kwargs, cache_implementation="paged", max_new_tokens=2)
    with pytest.raises(ValueError, match="no images.*36 image tokens"):
        model.generate_batch(inputs["input_ids"].tolist(), max_new_tokens=2)


# Counts in saved configs, and shapes


def test_a_grid_in_a_config_means_the_same_once_saved(tiny, tmp_path):
    model, processor = tiny
    config = GenerationConfig(num_vision_tokens=(2, 5), max_new_tokens=3, do_sample=False, pad_token_id=0)
    config.save_pretrained(tmp_path)
    inputs = encode(processor, [2])
    expected = model.generate(**inputs, num_vision_tokens=(2, 5), max_new_tokens=3, do_sample=False)
    for stored in (config, GenerationConfig.from_pretrained(tmp_path)):
        assert torch.equal(model.generate(**inputs, generation_config=stored), expected)


def test_a_stored_count_for_shapes_leaves_prompts_without_images_alone(small):
    model, processor = copy.deepcopy(small[0]), small[1]
    model.generation_config.num_vision_tokens = 8
    text = encode(processor, [0])
    assert torch.equal(model.generate(**text, max_new_tokens=3), small[0].generate(**text, max_new_tokens=3))
    with pytest.raises(ValueError, match="`num_vision_tokens`=8"):
        model.generate(**encode(processor, [1]), max_new_tokens=3)


@pytest.mark.parametrize("options", [{"match_aspect_ratio": True}, {"crop_to_patches": True, "max_patches": 2}])
def test_new_shapes_and_tiles_come_into_a_conversation(tiny, options):
    model, processor = tiny
    images = [IMAGES[0].resize((120, 60)), IMAGES[1].resize((60, 120))]
    texts, options = ("<|image_pad|> hi", "and <|image_pad|> now?"), {**options, "return_tensors": "pt"}
    first, second = (processor(images=image, text=text, **options) for image, text in zip(images, texts))
    cache = DynamicCache()
    answers, _ = answer(model, first, num_vision_tokens=4, past_key_values=cache)
    later = {name: value for name, value in second.items() if name != "attention_mask"}
    later["input_ids"] = torch.cat([first["input_ids"], answers, second["input_ids"]], dim=-1)
    whole = {
        name: torch.cat([first[name], second[name]]) for name in second if name not in ("input_ids", "attention_mask")
    }
    whole["input_ids"] = later["input_ids"]
    expected = answer(model, whole, num_vision_tokens=4)
    for count in (4, [4]):
        assert_same(answer(model, later, num_vision_tokens=count, past_key_values=copy.deepcopy(cache)), expected)
    as_lists = {name: whole[name].tolist() for name in ("image_sizes", "num_tiles") if name in whole}
    assert_same(answer(model, {**whole, **as_lists}, num_vision_tokens=4), expected)
