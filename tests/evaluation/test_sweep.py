import copy
import io

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tokenflex.data.examples import Example
from tokenflex.data.synthetic import SyntheticVQA
from tokenflex.evaluation import exact_match, predict, score
from tokenflex.evaluation.sweep import Prediction
from tokenflex.towers.tiny import tiny_model_and_processor
from tokenflex.training import to_example


COUNTS = [1, 4, 16, 36, 64]


def predict_quietly(tiny, rows, counts, **options):
    return predict(*tiny, rows, counts, max_new_tokens=4, show_progress=False, **options)


@pytest.fixture(scope="module")
def rows():
    return SyntheticVQA(5, seed=2, questions_per_image=3)


@pytest.fixture(scope="module")
def predictions(tiny, rows):
    return predict_quietly(tiny, rows, COUNTS)


def plain_answer(tiny, images, content, count):
    model, processor = tiny
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=images, text=prompt, num_vision_tokens=count, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_answers_equal_asking_each_question_alone_at_each_count(tiny, rows, predictions):
    asked = iter(predictions)
    for index in range(len(rows)):
        row = rows[index]
        for family, question, answer in zip(row["families"], row["questions"], row["answers"]):
            prediction = next(asked)
            assert (prediction.index, prediction.family) == (index, family)
            assert (prediction.question, prediction.answer) == (question, answer)
            content = [{"type": "image"}, {"type": "text", "text": question}]
            expected = {count: plain_answer(tiny, row["image"], content, count) for count in COUNTS}
            assert prediction.predictions == expected
    assert next(asked, None) is None


def test_the_comparison_can_tell_counts_apart(predictions):
    assert any(len(set(prediction.predictions.values())) > 1 for prediction in predictions)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_batch_size_changes_no_answer(tiny, rows, predictions, batch_size):
    assert predict_quietly(tiny, rows, COUNTS, batch_size=batch_size) == predictions


def test_counts_do_not_influence_each_other(tiny, rows, predictions):
    alone = predict_quietly(tiny, rows, [16])
    assert [p.predictions[16] for p in alone] == [p.predictions[16] for p in predictions]


@pytest.mark.parametrize("counts, batch_size", [([4], 64), (COUNTS, 64), (COUNTS, 2)])
def test_tower_sees_every_image_once(tiny, rows, counts, batch_size):
    seen = []
    handle = tiny[0].model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    predict_quietly(tiny, rows, counts, batch_size=batch_size)
    handle.remove()
    assert sum(seen) == len(rows)


def test_several_images_and_turns(tiny):
    images = [row["image"] for row in SyntheticVQA(2, 5)]
    content = [
        {"type": "image"},
        {"type": "text", "text": "and"},
        {"type": "image"},
        {"type": "text", "text": "same?"},
    ]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "no"}]
    (prediction,) = predict_quietly(tiny, [{"images": images, "messages": messages}], [4, 16])
    assert prediction.predictions == {count: plain_answer(tiny, images, content, count) for count in (4, 16)}
    assert prediction.family == "all" and prediction.answer == "no"

    later = [*messages, {"role": "user", "content": "why?"}, {"role": "assistant", "content": "they differ"}]
    (prediction,) = predict_quietly(tiny, [{"images": images, "messages": later}], [4])
    assert (prediction.question, prediction.answer) == ("why?", "they differ")


def test_rows_without_images_are_answered_too(tiny, rows):
    dialog = [{"role": "user", "content": "hello?"}, {"role": "assistant", "content": "hi"}]
    text_row = Example(
        [], [[{**message, "content": [{"type": "text", "text": message["content"]}]} for message in dialog]]
    )
    mixed = predict_quietly(tiny, [text_row, rows[0], text_row], [4, 16])
    assert mixed[0].predictions == mixed[-1].predictions == predict_quietly(tiny, [text_row], [4, 16])[0].predictions
    assert [p.predictions for p in mixed[1:-1]] == [p.predictions for p in predict_quietly(tiny, [rows[0]], [4, 16])]


def test_message_parts_as_arrow_stores_them(tiny, tmp_path):
    buffer = io.BytesIO()
    image = SyntheticVQA(1, 5)[0]["image"]
    image.save(buffer, "PNG")
    user = [{"type": "image"}, {"type": "text", "text": "which color?"}]
    messages = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    expected = plain_answer(tiny, image, user, 4)
    row = {"images": [{"bytes": buffer.getvalue(), "path": None}], "messages": messages}
    for extra in ({}, {"image": None}):
        for part in user:
            part.update(extra)
        path = tmp_path / "messages.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
        (stored,) = pyarrow.parquet.read_table(path).to_pylist()
        (prediction,) = predict_quietly(tiny, [to_example(stored)], [4])
        assert (prediction.question, prediction.answer) == ("which color?", "red")
        assert prediction.predictions == {4: expected}


def test_global_random_state_is_left_alone(tiny, rows):
    state = torch.get_rng_state()
    predict_quietly(tiny, rows, [4])
    assert torch.equal(torch.get_rng_state(), state)


def test_scores_are_what_counting_by_hand_gives():
    predictions = [
        Prediction(0, "color", "q", "red", {4: "red", 36: "Red."}),
        Prediction(1, "color", "q", "blue", {4: "red", 36: "blue"}),
        Prediction(2, "color", "q", "red", {4: "blue", 36: "red"}),
        Prediction(3, "count", "q", "3", {4: "3", 36: "2"}),
    ]
    report = score(predictions, [4, 36])
    assert report["questions"] == {"color": 3, "count": 1}
    assert report["majority"] == {"color": pytest.approx(2 / 3), "count": 1.0}
    assert report["accuracy"][4] == pytest.approx({"color": 1 / 3, "count": 1.0})
    assert report["accuracy"][36] == pytest.approx({"color": 1.0, "count": 0.0})
    assert report["mean"] == pytest.approx({4: 2 / 3, 36: 0.5})
    assert report["overall"] == pytest.approx({4: 0.5, 36: 0.75})


answers = st.sampled_from(["red", "Red", "red.", "blue", " blue ", "2"])


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), answers, answers, answers), min_size=1, max_size=12))
@settings(deadline=None)
def test_scores_agree_with_the_metric(drawn):
    predictions = [Prediction(i, family, "q", a, {4: b, 36: c}) for i, (family, a, b, c) in enumerate(drawn)]
    report = score(predictions, [4, 36])
    assert sum(report["questions"].values()) == len(predictions)
    for family, number in report["questions"].items():
        members = [p for p in predictions if p.family == family]
        assert number == len(members)
        best = max(sum(exact_match(guess.answer, p.answer) for p in members) for guess in members)
        assert report["majority"][family] == pytest.approx(best / number)
    for count, scores in report["accuracy"].items():
        right = [exact_match(p.predictions[count], p.answer) for p in predictions]
        assert report["overall"][count] == pytest.approx(sum(right) / len(right))
        assert report["mean"][count] == pytest.approx(sum(scores[f] for f in report["questions"]) / len(scores))


def test_odd_images_are_answered(tiny):
    rows = [
        {"image": Image.new(mode, size), "question": "which color?", "answer": "red"}
        for mode, size in (("L", (1, 200)), ("CMYK", (9, 9)), ("I;16", (5, 7)), ("P", (3, 3)), ("RGBA", (64, 1)))
    ]
    assert len(predict_quietly(tiny, rows, [4, 36])) == len(rows)


@pytest.mark.parametrize("options", [{"match_aspect_ratio": True}, {"crop_to_patches": True, "max_patches": 2}])
def test_shaped_grids_and_tiles_are_answered_as_the_processor_encodes_them(tiny, options):
    model, processor = tiny[0], copy.copy(tiny[1])
    for name, value in options.items():
        setattr(processor, name, value)
    images = [Image.linear_gradient("L").resize(size) for size in ((128, 64), (64, 64), (64, 120))]
    rows = [{"image": image, "questions": ["which color?", "how many?"], "answers": ["red", "2"]} for image in images]
    asked = iter(predict_quietly((model, processor), rows, COUNTS))
    for row in rows:
        for question in row["questions"]:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            expected = {n: plain_answer((model, processor), row["image"], content, n) for n in COUNTS}
            assert next(asked).predictions == expected


def test_several_answers_reach_the_metric():
    people = ["yes"] * 2 + ["yeah"] * 7 + ["no"]
    row = {"image": Image.new("RGB", (64, 64)), "question": "is it dark?", "answers": people}
    model, processor = tiny_model_and_processor(width=32)
    (prediction,) = predict(model, processor, [row], [4], max_new_tokens=2, show_progress=False)
    assert (prediction.answer, prediction.references) == ("yeah", people)
    for said, expected in (("yes", 0.6), ("yeah", 1), ("no", 0.3), ("maybe", 0)):
        prediction.predictions = {4: said}
        report = score([prediction], [4], "vqa_accuracy")
        assert report["overall"][4] == pytest.approx(expected)
        assert report["majority"] == {"all": 1}
    prediction.predictions = {4: "no"}
    assert score([prediction], [4])["overall"][4] == 1  # any of them is an exact match


def test_replies_that_choose_no_option_are_counted():
    replies = [("B", "B"), ("The answer is (B).", "B"), ("A or B", "A"), ("В, in Cyrillic", "B"), ("\\boxed{C}", "B")]
    predictions = [
        Prediction(index, "all", "which?", answer, {4: reply, 16: answer})
        for index, (reply, answer) in enumerate(replies)
    ]
    report = score(predictions, [4, 16], "multiple_choice")
    assert report["unparsed"] == {4: 2, 16: 0}
    assert report["overall"] == {4: 2 / 5, 16: 1}
    assert "unparsed" not in score(predictions, [4], "exact_match")


def test_the_commonest_answer_is_scored_as_it_is_written():
    predictions = [Prediction(i, "all", "how?", "Stra\u00dfe", {4: ""}) for i in range(2)]
    assert score(predictions, [4], "anls")["majority"] == {"all": 1}


def test_answers_are_the_likeliest_whatever_the_checkpoint_asks_for(tiny, rows, predictions):
    model, processor = copy.deepcopy(tiny[0]), tiny[1]
    asked = {"num_beams": 3, "num_return_sequences": 2, "do_sample": True, "temperature": 3.0, "top_k": 5}
    for name, value in asked.items():
        setattr(model.generation_config, name, value)
    assert predict_quietly((model, processor), rows, COUNTS) == predictions


def test_images_in_their_own_shapes_are_seen_once_and_answered_as_alone(pristine_naflex):
    model, processor = pristine_naflex
    rows = SyntheticVQA(4, 3, questions_per_image=2)
    rows = [
        {**rows[i], "image": rows[i]["image"].resize(size)}
        for i, size in enumerate([(64, 64), (160, 60), (60, 200), (160, 60)])
    ]
    seen = []
    hook = model.model.vision_tower.register_forward_hook(lambda _, args, output: seen.append(len(args[0])))
    together = predict(model, processor, rows, [4, 10, 64], max_new_tokens=4, show_progress=False)
    hook.remove()
    assert sum(seen) == 4
    for i, row in enumerate(rows):
        alone = predict(model, processor, [row], [4, 10, 64], max_new_tokens=4, show_progress=False)
        assert [p.predictions for p in together if p.index == i] == [p.predictions for p in alone]
