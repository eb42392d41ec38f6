"""Conversations that go on in a kept cache, encoded at the counts that it holds."""

import copy

import pytest
import torch
import transformers
from helpers import IMAGES, MIXED, answer, assert_same, encode, fill, next_turn, without_images
from packaging.version import Version
from transformers import DynamicCache, StaticCache


@pytest.fixture
def tower_passes(tiny):
    passes = []
    hook = tiny[0].model.vision_tower.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    yield passes
    hook.remove()


def first_turn(model, processor, images_per_row, count, encoded_at=36, **kwargs):
    """Inputs at `count`, the answers that `generate` gives at it, and the cache of all but their last token."""
    cache = DynamicCache()
    inputs = encode(processor, images_per_row, encoded_at)
    kwargs = {"past_key_values": cache, **kwargs}
    answers, _ = answer(model, inputs, num_vision_tokens=count, **kwargs)
    return encode(processor, images_per_row, count), answers, kwargs["past_key_values"]


@pytest.mark.parametrize("told", [False, True], ids=["untold", "told"])
@pytest.mark.parametrize("given_images", [False, True], ids=["no images", "all images"])
@pytest.mark.parametrize("encoded_at", [4, 36])
@pytest.mark.parametrize("count", [4, 64, "mixed"])
@pytest.mark.parametrize("images_per_row", [[2], [1, 2], [0, 2]])
def test_a_second_question_goes_on_in_the_cache(tiny, images_per_row, count, encoded_at, given_images, told):
    model, processor = tiny
    count = MIXED[: sum(images_per_row)] if count == "mixed" else count
    inputs, answers, cache = first_turn(model, processor, images_per_row, count, encoded_at)
    second = next_turn(processor, inputs, answers, images_per_row)
    turn = second if given_images else without_images(second)
    kwargs = {"num_vision_tokens": count} if told else {}
    assert_same(answer(model, turn, past_key_values=cache, **kwargs), answer(model, second))


@pytest.mark.parametrize("given_images", ["all images", "new images"])
@pytest.mark.parametrize("new_count", [36, "mixed"])
@pytest.mark.parametrize("count", [4, 64])
@pytest.mark.parametrize(
    ("images_per_row", "new"), [([1], [1]), ([1, 2], [1, 1]), ([1, 2], [1, 0]), ([0, 1], [2, 1]), ([2, 1], [0, 2])]
)
def test_new_images_come_into_a_conversation(tiny, tower_passes, images_per_row, new, count, new_count, given_images):
    model, processor = tiny
    inputs, answers, cache = first_turn(model, processor, images_per_row, count)
    new_counts = MIXED[: sum(new)] if new_count == "mixed" else [new_count] * sum(new)
    second = next_turn(processor, inputs, answers, images_per_row, new, new_counts)
    expected = answer(model, second)
    if given_images == "new images":
        second.update({**encode(processor, new, new_counts, first=sum(images_per_row)), **without_images(second)})
    tower_passes.clear()
    assert_same(answer(model, second, past_key_values=cache), expected)
    assert tower_passes == [sum(new)], "the images in the cache are not encoded again"


@pytest.mark.parametrize("filled_by", ["forward", "generate"])
@pytest.mark.parametrize("given_images", [False, True])
def test_a_conversation_goes_on_for_many_turns(tiny, given_images, filled_by):
    model, processor = tiny
    images_per_row = [1, 2]
    if filled_by == "generate":
        inputs, answers, cache = first_turn(model, processor, images_per_row, 4)
    else:
        inputs = encode(processor, images_per_row, 4)
        answers, cache = inputs["input_ids"][:, :0], fill(model, inputs)
    for word in ("and now?", "why?", "how tall is the red bar?"):
        inputs = next_turn(processor, inputs, answers, images_per_row, words=(word,))
        turn = inputs if given_images else without_images(inputs)
        got = answer(model, turn, past_key_values=cache)
        assert_same(got, answer(model, inputs))
        answers = got[0]


@pytest.mark.parametrize("filled_by", ["forward", "generate"])
def test_images_come_behind_a_cached_text(tiny, filled_by):
    model, processor = tiny
    text = {**encode(processor, [0, 0])}
    answers = text["input_ids"][:, :0]
    if filled_by == "forward":
        cache = fill(model, text)
    else:
        answers, _ = answer(model, text, past_key_values=(cache := DynamicCache()))
    second = next_turn(processor, text, answers, [0, 0], [1, 2], 4)
    assert_same(answer(model, second, past_key_values=cache), answer(model, second))


@pytest.mark.parametrize("options", [{"match_aspect_ratio": True}, {"crop_to_patches": True, "max_patches": 2}])
def test_new_shapes_and_tiles_come_into_a_conversation(tiny, options):
    model, processor = tiny
    images = [IMAGES[0].resize((120, 60)), IMAGES[1].resize((60, 120))]
    texts, options = ("<|image_pad|> hi", "and <|image_pad|> now?"), {**options, "return_tensors": "pt"}
    options["num_vision_tokens"] = 4
    first, second = (processor(images=image, text=text, **options) for image, text in zip(images, texts))
    answers, _ = answer(model, first, past_key_values=(cache := DynamicCache()))
    later = {name: value for name, value in second.items() if name != "attention_mask"}
    later["input_ids"] = torch.cat([first["input_ids"], answers, second["input_ids"]], dim=-1)
    whole = {
        name: torch.cat([first[name], second[name]]) for name in second if name not in ("input_ids", "attention_mask")
    }
    whole["input_ids"] = later["input_ids"]
    expected = answer(model, whole)
    for turn in (later, whole):
        assert_same(answer(model, turn, past_key_values=copy.deepcopy(cache)), expected)


def test_a_cache_by_its_new_name_is_looked_at_as_well(tiny):
    model, processor = tiny
    _, answers, cache = first_turn(model, processor, [1], 4)
    second = next_turn(processor, encode(processor, [1], 36), answers, [1])
    with pytest.raises(ValueError, match="`past_key_values` holds .* encode the conversation"):
        model.generate(**second, cache=cache)


def test_a_copied_cache_answers_several_questions(tiny, tower_passes):
    model, processor = tiny
    inputs, answers, cache = first_turn(model, processor, [2], 4)
    for word in ("and now?", "but why?", "or what?"):
        second = next_turn(processor, inputs, answers, [2], words=(word,))
        expected = answer(model, second)
        tower_passes.clear()
        assert_same(answer(model, second, past_key_values=copy.deepcopy(cache)), expected)
        assert not tower_passes


@pytest.mark.parametrize(
    "mode",
    [{"num_beams": 2}, {"prefill_chunk_size": 2}, {"do_sample": True, "num_return_sequences": 2}],
    ids=["beams", "chunked prefill", "several samples"],
)
def test_other_modes_go_on_in_the_cache(tiny, mode):
    if "prefill_chunk_size" in mode and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("before 5.23 transformers drops the images of later chunks, so that this is refused")
    model, processor = tiny
    inputs, answers, cache = first_turn(model, processor, [1, 2], 4)
    cache.batch_repeat_interleave(max(mode.get("num_beams", 1), mode.get("num_return_sequences", 1)))
    second = next_turn(processor, inputs, answers, [1, 2])
    torch.manual_seed(0)
    expected = answer(model, second, **mode)
    torch.manual_seed(0)
    assert_same(answer(model, without_images(second), past_key_values=cache, **mode), expected)


def test_samples_of_one_prompt_go_on_in_their_cache(tiny):
    model, processor = tiny
    torch.manual_seed(0)
    options = {"do_sample": True, "num_return_sequences": 2}
    inputs, answers, cache = first_turn(model, processor, [2], 4, **options)
    copies = {name: torch.cat([value] * 2) for name, value in inputs.items()}
    second = next_turn(processor, copies, answers, [2, 2])
    assert_same(answer(model, second, past_key_values=cache), answer(model, second))


def test_a_static_cache_goes_on(tiny):
    model, processor = tiny
    cache = StaticCache(config=model.config.text_config, max_cache_len=256)
    inputs, answers, _ = first_turn(model, processor, [2], 4, past_key_values=cache)
    second = next_turn(processor, inputs, answers, [2])
    assert_same(answer(model, second, past_key_values=cache), answer(model, second))


def test_kept_features_go_on_in_the_cache(tiny, tower_passes):
    model, processor = tiny
    inputs, answers, cache = first_turn(model, processor, [1], 4)
    second = next_turn(processor, inputs, answers, [1], [1], 16)
    expected = answer(model, second)
    kept = model.get_image_features(second["pixel_values"])
    tower_passes.clear()
    turn = {**second, "mm_encoder_outputs": {"image": kept}}
    del turn["pixel_values"]
    assert_same(answer(model, turn, past_key_values=cache), expected)
    assert not tower_passes


def test_a_cache_cropped_before_an_image_forgets_it(tiny):
    model, processor = tiny
    text = "hello there <|image_pad|> which color?"
    prompts = {n: processor(images=IMAGES[0], text=text, num_vision_tokens=n, return_tensors="pt") for n in (4, 36)}
    answer(model, prompts[4], past_key_values=(cache := DynamicCache()))
    cache.crop(2 - cache.get_seq_length())
    assert_same(answer(model, prompts[36], past_key_values=cache), answer(model, prompts[36]))


@pytest.mark.parametrize("given_images", [False, True], ids=["no images", "all images"])
@pytest.mark.parametrize("encoded_at", [16, 36, [4, 4, 16]])
def test_a_conversation_encoded_at_other_counts_than_the_caches_is_refused(tiny, encoded_at, given_images):
    model, processor = tiny
    _, answers, cache = first_turn(model, processor, [1, 2], 4)
    second = next_turn(processor, encode(processor, [1, 2], encoded_at), answers, [1, 2])
    second = second if given_images else without_images(second)
    length = cache.get_seq_length()
    with pytest.raises(
        ValueError, match=rf"`past_key_values` holds {length} tokens.*\[4\], \[4, 4\].*encode the conv"
    ):
        model.generate(**second, past_key_values=cache)
    assert cache.get_seq_length() == length


@pytest.mark.parametrize("filled_by", ["forward", "generate"])
@pytest.mark.parametrize("given_images", [False, True], ids=["no images", "all images"])
@pytest.mark.parametrize("count", [16, [4, 4, 16], (1, 16)])
def test_another_count_than_the_caches_is_refused(tiny, count, given_images, filled_by):
    model, processor = tiny
    if filled_by == "generate":
        inputs, answers, cache = first_turn(model, processor, [1, 2], 4)
    else:
        inputs = encode(processor, [1, 2], 4)
        answers, cache = inputs["input_ids"][:, :0], fill(model, inputs)
    second = next_turn(processor, inputs, answers, [1, 2])
    second = second if given_images else without_images(second)
    if count == (1, 16):
        count = (1, 8)
    with pytest.raises(ValueError, match=r"`num_vision_tokens`=.*`past_key_values` holds .*\[4\], \[4, 4\]"):
        model.generate(**second, past_key_values=cache, num_vision_tokens=count)


def test_new_images_at_another_count_are_encoded_at_it_not_recounted(tiny):
    model, processor = tiny
    inputs, answers, cache = first_turn(model, processor, [1], 4)
    second = next_turn(processor, inputs, answers, [1], [1], 36)
    with pytest.raises(ValueError, match=r"`num_vision_tokens`=\[4, 16\].*`past_key_values`"):
        model.generate(**second, past_key_values=cache, num_vision_tokens=[4, 16])


def test_rows_in_another_order_than_the_caches_are_refused(tiny):
    model, processor = tiny
    inputs, answers, cache = first_turn(model, processor, [1, 1], [4, 64])
    second = next_turn(processor, inputs, answers, [1, 1])
    with pytest.raises(ValueError, match="past_key_values"):
        turned = {name: value.flip(0) for name, value in without_images(second).items()}
        model.generate(**turned, past_key_values=cache)


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
    with pytest.raises(ValueError, match=rf"`past_key_values` ends after {cache.get_seq_length()} tokens, inside an"):
        model.generate(**second, past_key_values=cache)


def test_a_prompt_shorter_than_the_cache_is_refused(tiny):
    model, processor = tiny
    inputs, answers, cache = first_turn(model, processor, [1], 4)
    with pytest.raises(ValueError, match=r"`past_key_values` holds \d+ tokens.*`input_ids` has shape.*whole conv"):
        model.generate(**inputs, past_key_values=cache)
    only_new = torch.cat([answers[:, -1:], encode(processor, [0])["input_ids"]], dim=-1)
    width = cache.get_seq_length() + only_new.shape[1]
    with pytest.raises(ValueError, match=rf"`attention_mask` \(1, {width}\)"):
        model.generate(only_new, past_key_values=cache, attention_mask=torch.ones(1, width, dtype=torch.long))
