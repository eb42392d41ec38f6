import copy
import logging
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import TrainerControl, TrainerState, TrainingArguments

from tokenflex.data.examples import BadRowError, Example
from tokenflex.data.synthetic import SyntheticVQA
from tokenflex.training import TokenFlexDataCollator, draw_num_vision_tokens, to_example


END = "<|im_end|>"
few = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"], exclude_characters="<"), min_size=1)
words = texts.map(str.strip).filter(bool)
questions = st.sampled_from(["which color?", "which color is the dot?", "how many?", "how"]) | words
pairs = st.lists(st.tuples(questions, words), min_size=1, max_size=4)


def segments(batch):
    return batch.get("segment_ids", batch["attention_mask"] - 1)


def at(processor, count):
    return TokenFlexDataCollator(processor, [count], [1.0])


def row_of(asked, index=0):
    questions, answers = zip(*asked)
    return {"image": SyntheticVQA(100, 7)[index]["image"], "questions": list(questions), "answers": list(answers)}


def one_per_row(row):
    return [
        {"image": row["image"], "question": question, "answer": answer}
        for question, answer in zip(row["questions"], row["answers"])
    ]


def assert_same_batch(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@given(pairs)
@few
def test_labels_are_the_answers_and_their_end_tokens(narrow, asked):
    processor = narrow[1]
    batch = at(processor, 4)([row_of(asked)])
    labeled = batch["labels"] != -100
    assert torch.equal(batch["labels"][labeled], batch["input_ids"][labeled])
    said = processor.tokenizer.decode(batch["labels"][labeled], clean_up_tokenization_spaces=False)
    assert said == "".join(answer + END for _, answer in asked)
    tokens = [processor.tokenizer(answer + END, add_special_tokens=False)["input_ids"] for _, answer in asked]
    assert batch["labels"][labeled].tolist() == [token for ids in tokens for token in ids]


@given(st.lists(pairs, min_size=1, max_size=3), st.sampled_from([1, 4, 16, 36, 64]))
@few
def test_image_tokens_and_padding_are_never_labeled(narrow, batch_of, count):
    model, processor = narrow
    batch = at(processor, count)([row_of(asked, i) for i, asked in enumerate(batch_of)])
    hidden = batch["labels"] == -100
    image_tokens = batch["input_ids"] == model.config.image_token_id
    assert hidden[image_tokens].all() and hidden[batch["attention_mask"] == 0].all()
    assert (image_tokens.sum(-1) == count).all()
    assert batch["vision_token_grids"].prod(-1).tolist() == [count] * len(batch_of)
    assert ("segment_ids" in batch) == any(len(asked) > 1 for asked in batch_of)
    assert torch.equal(segments(batch) == -1, batch["attention_mask"] == 0)


def test_every_turn_of_a_conversation_is_labeled(narrow):
    processor = narrow[1]
    turns = [("user", "one?"), ("assistant", "first"), ("user", "two?"), ("assistant", "second")]
    messages = [{"role": role, "content": text} for role, text in [("system", "be brief"), *turns]]
    batch = at(processor, 4)([{"image": Image.new("RGB", (8, 8)), "messages": messages}])
    assert processor.tokenizer.decode(batch["labels"][batch["labels"] != -100]) == f"first{END}second{END}"


def test_rows_read_as_the_chat_template_renders_them(narrow):
    processor = narrow[1]
    row = row_of([("which color?", "red")])
    dialog = to_example(row).dialogs[0]
    text = processor.apply_chat_template(dialog).removesuffix("\n")
    expected = processor(images=row["image"], text=text, num_vision_tokens=16, return_tensors="pt")
    batch = at(processor, 16)([row])
    for key in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(batch[key], expected[key]), key


def test_labels_hold_the_answer_when_the_template_ends_turns_unlike_the_tokenizer(narrow):
    processor = copy.deepcopy(narrow[1])
    processor.tokenizer.eos_token = "<|endoftext|>"
    batch = at(processor, 4)([row_of([("which color?", "red")])])
    assert processor.tokenizer.decode(batch["labels"][batch["labels"] != -100]).startswith("red")


@given(pairs, st.sampled_from([4, 36]))
@few
def test_packed_questions_have_the_loss_of_one_question_per_row(narrow, asked, count):
    model, processor = narrow
    row = row_of(asked)
    with torch.no_grad():
        packed = model(**at(processor, count)([row])).loss
        separate = model(**at(processor, count)(one_per_row(row))).loss
    torch.testing.assert_close(packed, separate, rtol=1e-5, atol=1e-5)


def test_asking_the_same_twice_costs_what_asking_apart_costs(narrow):
    model, processor = narrow
    row = row_of([("which color?", "red"), ("which color?", "blue"), ("which color?", "red")])
    with torch.no_grad():
        packed = model(**at(processor, 4)([row])).loss
        separate = model(**at(processor, 4)(one_per_row(row))).loss
    torch.testing.assert_close(packed, separate, rtol=1e-5, atol=1e-5)


def test_packed_questions_have_the_gradients_of_one_question_per_row(narrow):
    processor = narrow[1]
    gradients = []
    row = row_of([("which color?", "red"), ("how many dots?", "three"), ("where?", "top left")])
    for rows in ([row], one_per_row(row)):
        model = copy.deepcopy(narrow[0])
        model(**at(processor, 16)(rows)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-5, msg=name)


def answer_logits(model, batch, segment):
    labeled = (batch["labels"] != -100) & (segments(batch) == segment)
    with torch.no_grad():
        logits = model(**batch).logits
    return logits[:, :-1][labeled[:, 1:]]


@given(words, words, words, words)
@few
def test_a_question_does_not_see_its_neighbors(narrow, question, answer, other_question, other_answer):
    model, processor = narrow
    logits = []
    for second in ((question, answer), (other_question, other_answer)):
        batch = at(processor, 4)([row_of([("which color?", "red"), second, ("how many?", "three")])])
        logits.append(answer_logits(model, batch, 3))
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


def test_a_packed_answer_has_the_logits_it_has_alone(narrow):
    model, processor = narrow
    row = row_of([("which color?", "red"), ("how many dots?", "three"), ("where?", "top left")])
    packed = at(processor, 16)([row])
    for number, alone in enumerate(one_per_row(row)):
        expected = answer_logits(model, at(processor, 16)([alone]), 0)
        torch.testing.assert_close(answer_logits(model, packed, number + 1), expected, rtol=1e-5, atol=1e-5)


@given(st.lists(pairs, min_size=2, max_size=3), st.sampled_from([4, 36]))
@few
def test_batched_rows_equal_rows_one_by_one(narrow, batch_of, count):
    model, processor = narrow
    rows = [row_of(asked, i) for i, asked in enumerate(batch_of)]
    batch = at(processor, count)(rows)
    with torch.no_grad():
        together = model(**batch).logits
        for i, row in enumerate(rows):
            alone = at(processor, count)([row])
            length = alone["input_ids"].shape[1]
            for key in ("input_ids", "labels", "attention_mask"):
                assert torch.equal(batch[key][i, :length], alone[key][0]), key
            assert torch.equal(segments(batch)[i, :length], segments(alone)[0])
            torch.testing.assert_close(together[i, :length], model(**alone).logits[0], rtol=1e-4, atol=1e-5)


def test_text_only_rows_can_stand_beside_images(narrow):
    model, processor = narrow
    text_row = Example([], [[{"role": "user", "content": "hello?"}, {"role": "assistant", "content": "hi"}]])
    rows = [text_row, row_of([("which color?", "red")]), text_row]
    collator = at(processor, 16)
    with torch.no_grad():
        together = model(**collator(rows)).logits
        for i, row in enumerate(rows):
            alone = model(**collator([row])).logits[0]
            torch.testing.assert_close(together[i, : len(alone)], alone, rtol=1e-4, atol=1e-5)


@given(
    st.lists(pairs, min_size=1, max_size=3),
    st.sampled_from([1, 4, "16@48", 36, 64]),
    st.sampled_from([1, 9, "9@32", "36@48", 64]),
)
@few
def test_recounting_equals_collating_at_that_count(narrow, batch_of, before, after):
    processor = narrow[1]
    rows = [row_of(asked, i) for i, asked in enumerate(batch_of)]
    batch = at(processor, before)(rows)
    kept = {key: value.clone() for key, value in batch.items()}
    assert_same_batch(at(processor, before).recount(batch, after), at(processor, after)(rows))
    assert_same_batch(batch, kept)


def test_several_images_in_one_row(narrow):
    model, processor = narrow
    images = [SyntheticVQA(3, 1)[i]["image"] for i in range(2)]
    row = {"images": images, "questions": ["first <image> second <image> same?"] * 2, "answers": ["yes", "no"]}
    batch = at(processor, 16)([row, row_of([("which color?", "red")])])
    assert (batch["input_ids"] == processor.image_token_id).sum(-1).tolist() == [32, 16]
    assert model(**batch).loss.isfinite()


def test_an_image_in_other_places_of_each_question_is_collated_or_refused_as_a_row(narrow):
    model, processor = narrow
    row = row_of([("look <image> is it red?", "no"), ("is <image> blue?", "yes")])
    try:
        example = to_example(row)
    except BadRowError:
        return
    with torch.no_grad():
        packed = model(**at(processor, 4)([example])).loss
        separate = model(**at(processor, 4)(one_per_row(row))).loss
    torch.testing.assert_close(packed, separate, rtol=1e-5, atol=1e-5)


def test_collator_leaves_its_rows_alone(narrow):
    row = row_of([("which color?", "red"), ("how many?", "two")])
    kept = copy.deepcopy(row)
    at(narrow[1], 4)([row])
    assert row == kept


@pytest.mark.parametrize("key", ["question", "answer"])
def test_image_token_in_the_text_is_refused(narrow, key):
    row = {"image": Image.new("RGB", (8, 8)), "question": "what?", "answer": "that"}
    row[key] = "what does <|image_pad|> mean?"
    with pytest.raises(ValueError, match=r"<\|image_pad\|>"):
        at(narrow[1], 4)([row])


@pytest.mark.parametrize("count", [5, 40, -4, 100])
def test_count_that_the_model_cannot_have_is_refused(narrow, count):
    with pytest.raises(ValueError, match=str(count)):
        at(narrow[1], count)([row_of([("which color?", "red")])])
    with pytest.raises(ValueError, match=str(count)):
        at(narrow[1], 4).recount(at(narrow[1], 4)([row_of([("which color?", "red")])]), count)


def test_choices_and_weights_come_together_and_fit(narrow):
    for choices, weights in (([4], None), (None, [1.0]), ([4, 16], [1.0]), ([4], [0.0])):
        with pytest.raises(ValueError, match="vision_token_weights"):
            TokenFlexDataCollator(narrow[1], choices, weights)


def test_what_is_no_processor_is_refused(narrow):
    for other in (narrow[0], narrow[1].tokenizer, narrow[0].config):
        with pytest.raises(ValueError, match=f"`processor` is a {type(other).__name__}"):
            TokenFlexDataCollator(other)


def test_unknown_counts_are_refused_with_the_way_out(narrow):
    with pytest.raises(ValueError, match="callbacks=.collator.callback"):
        TokenFlexDataCollator(narrow[1])([row_of([("which color?", "red")])])


def test_alone_it_warns_once_and_draws_by_batch_number(narrow, caplog):
    choices, weights = [4, 16, 36], [2, 3, 5]
    collator = TokenFlexDataCollator(narrow[1], choices, weights, seed=3)
    with caplog.at_level(logging.WARNING):
        drawn = [int(collator([row_of([("which color?", "red")])])["vision_token_grids"].prod()) for _ in range(12)]
    assert drawn == [draw_num_vision_tokens(choices, weights, 3, number) for number in range(12)]
    assert len(set(drawn)) > 1
    assert caplog.text.count("without its callback") == 1


def test_pickled_collator_gives_the_same_batches(narrow, tmp_path):
    model, processor = copy.deepcopy(narrow[0]), narrow[1]
    rows = [row_of([("which color?", "red"), ("how many?", "two")])]
    collator = TokenFlexDataCollator(processor, [4, 16], [1, 1], seed=1)
    assert_same_batch(pickle.loads(pickle.dumps(collator))(rows), collator(rows))
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    collator.callback.on_train_begin(args, TrainerState(), TrainerControl(), model=model)
    assert_same_batch(pickle.loads(pickle.dumps(collator))(rows), collator(rows))
    collator.callback.on_train_end(args, TrainerState(), TrainerControl(), model=model)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "I", "I;16", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"]
)
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (37, 20)])
def test_odd_images_are_collated(narrow, mode, size):
    image = Image.new(mode, size)
    batch = at(narrow[1], 4)([{"image": image, "question": "which color?", "answer": "red"}])
    assert batch["pixel_values"].shape == (1, 3, 64, 64)
    assert batch["pixel_values"].isfinite().all() and batch["pixel_values"].abs().max() <= 1 + 1e-6


def test_palette_with_transparency_is_collated(narrow):
    image = Image.effect_noise((9, 7), 60).convert("P")
    image.info["transparency"] = 3
    assert (
        at(narrow[1], 4)([{"image": image, "question": "which?", "answer": "this"}])["pixel_values"].isfinite().all()
    )


def test_sixteen_bit_grey_keeps_its_brightness(narrow):
    def pixels(image):
        return at(narrow[1], 4)([{"image": image, "question": "which?", "answer": "this"}])["pixel_values"]

    for value in (0, 1000, 40_000, 65_535):
        gray = pixels(Image.new("L", (5, 5), value >> 8))
        torch.testing.assert_close(pixels(Image.new("I;16", (5, 5), value)), gray)
        torch.testing.assert_close(pixels(Image.new("I", (5, 5), value)), gray)


def conversation(num_turns, image=True):
    turns = [
        {"role": role, "content": f"{role} {turn} " + "word " * 5}
        for turn in range(num_turns)
        for role in ("user", "assistant")
    ]
    return {"images": [Image.new("RGB", (8, 8))] if image else [], "messages": turns}


@given(st.integers(1, 5), st.booleans(), st.integers(40, 400), st.sampled_from([4, 36]))
@few
def test_long_rows_are_cut_at_their_end_and_never_in_an_image(narrow, turns, image, max_length, count):
    processor = narrow[1]
    row = conversation(turns, image)
    whole = at(processor, count)([row])["input_ids"]
    length, needed = at(processor, count).measure(row)
    assert length == whole.shape[1] and needed <= length
    collator = TokenFlexDataCollator(processor, [count], [1.0], max_length=max_length)
    if needed > max_length:
        with pytest.raises(ValueError, match=f"needs {needed} tokens.*`max_length` is {max_length}"):
            collator([row])
        return
    cut = collator([row])
    assert torch.equal(cut["input_ids"], whole[:, :max_length])
    assert int((cut["input_ids"] == processor.image_token_id).sum()) == (count if image else 0)
    assert (cut["labels"] != -100).any()
    collator = TokenFlexDataCollator(processor, [count], [1.0], max_length=needed)
    assert int((collator([row])["labels"] != -100).sum()) == 1, "just what cannot be spared"


def test_rows_are_measured_at_the_largest_count_with_all_their_tiles(narrow):
    processor = copy.deepcopy(narrow[1])
    processor.crop_to_patches, processor.max_patches = True, 4
    row = {"image": Image.new("RGB", (200, 60)), "question": "short?", "answer": "yes"}
    collator = TokenFlexDataCollator(processor, [4, 36], [1, 1])
    batch = collator.collate([row])
    assert len(batch["pixel_values"]) > 1
    assert collator.measure(row)[0] == batch["input_ids"].shape[1]


@pytest.mark.parametrize("options", [{"match_aspect_ratio": True}, {"crop_to_patches": True, "max_patches": 2}])
def test_shaped_grids_and_tiles_are_those_of_the_processor(narrow, options):
    model, processor = narrow[0], copy.copy(narrow[1])
    for name, value in options.items():
        setattr(processor, name, value)
    images = [Image.linear_gradient("L").resize(size) for size in ((128, 64), (64, 64), (64, 120))]
    rows = [{"images": images[:2], "question": "which color?", "answer": "red"}]
    rows.append({"image": images[2], "questions": ["which color?", "how many?"], "answers": ["red", "three"]})
    messages = [{"role": "user", "content": [{"type": "image"}] * 2 + [{"type": "text", "text": "which color?"}]}]
    for count in (4, 16):
        batch = at(processor, count)(rows)
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        expected = processor(images=images[:2], text=prompt, num_vision_tokens=count, return_tensors="pt")
        length = expected["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][0, :length], expected["input_ids"][0])
        tiles = len(expected["pixel_values"])
        for name in ("pixel_values", "vision_token_grids"):
            assert torch.equal(batch[name][:tiles], expected[name])
        assert (batch["vision_token_grids"] != int(count**0.5)).any() == ("match_aspect_ratio" in options)
        with torch.no_grad():
            logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
            alone = model(**expected).logits
        torch.testing.assert_close(logits[0, :length], alone[0], atol=1e-4, rtol=0)
