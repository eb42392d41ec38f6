import pytest
import torch
import transformers
from helpers import answer, assert_same, chat, encode, next_turn, without_images
from packaging.version import Version
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
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


def test_placeholders_without_images_are_refused(tiny):
    model, processor = tiny
    inputs = encode(processor, [1])
    with pytest.raises(ValueError, match="there are no images"):
        model.generate(input_ids=inputs["input_ids"])


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_negative_prompt_has_no_images(tiny, use_cache):
    # transformers runs it through the model by itself, and has no place for its images.
    model, processor = tiny
    options = {"guidance_scale": 1.5, "max_new_tokens": 3, "min_new_tokens": 3, "use_cache": use_cache}
    with pytest.raises(ValueError, match="`negative_prompt_ids` takes no images.*4 image tokens"):
        model.generate(**encode(processor, [1]), negative_prompt_ids=encode(processor, [1], 4)["input_ids"], **options)
    text = encode(processor, [0], words=("an image of it",))["input_ids"]
    model.generate(**encode(processor, [1]), negative_prompt_ids=text, **options)


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
    with pytest.raises(ValueError, match=r"`text` has \[2\] per prompt, `images` holds \[1\]"):
        processor.apply_chat_template(messages, **template)
    if Version(transformers.__version__) < Version("5.23"):
        pytest.skip("before 5.23 transformers does not take a control token in a user's text as text")
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


@pytest.mark.parametrize("mode", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": "another"}])
def test_drafting_does_not_go_on_in_a_filled_cache(tiny, assistants, mode):
    # transformers 5.23 feeds the whole prompt behind what is in the cache already, and the answer is wrong.
    model, processor = tiny
    inputs = encode(processor, [1], 4)
    answers, _ = answer(model, inputs, past_key_values=(cache := DynamicCache()))
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
