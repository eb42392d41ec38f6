import copy
from types import SimpleNamespace

import pytest
from PIL import Image

from tokenflex.data.synthetic import draw_scene
from tokenflex.inference import comparison


QUESTION = "which color is the paper?"


@pytest.fixture
def image():
    return draw_scene(5, 0).image


@pytest.mark.parametrize("count", [1, 4, 16, 25, 64])
def test_answer_is_the_one_that_generate_gives_at_that_count(tiny, image, encode, count):
    model, processor = tiny
    inputs = encode(processor, [image], QUESTION, num_vision_tokens=count)
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = comparison.answer_at(
        model, processor, comparison.ask(model, processor, image, QUESTION), count, max_new_tokens=6
    )
    assert answer.text == processor.decode(output, skip_special_tokens=True).strip()
    assert answer.prompt_tokens == inputs["input_ids"].shape[1]
    assert answer.grid == (count**0.5, count**0.5)


@pytest.mark.parametrize("count", [1, 10, 64])
@pytest.mark.parametrize("shape", [(64, 64), (180, 60), (60, 200)])
def test_an_image_is_asked_about_in_its_own_shape(pristine_naflex, image, encode, shape, count):
    model, processor = pristine_naflex
    image = image.resize(shape)
    inputs = encode(processor, [image], QUESTION, num_vision_tokens=count)
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    asked = comparison.ask(model, processor, image, QUESTION)
    answer = comparison.answer_at(model, processor, asked, count, max_new_tokens=6)
    assert answer.text == processor.decode(output, skip_special_tokens=True).strip()


def test_first_token_is_timed_before_the_last(tiny, image, monkeypatch):
    model, processor = tiny
    ticks = iter(range(1000))
    asked = comparison.ask(model, processor, image, QUESTION)
    monkeypatch.setattr(comparison, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    for length in (1, 2, 6):
        answer = comparison.answer_at(model, processor, asked, 4, max_new_tokens=length)
        assert answer.milliseconds_to_first_token == 1000  # one tick: the clock is read at the start and at that token


@pytest.mark.parametrize("question", ["<|im_end|>", "which <|image_pad|> is it?"])
def test_control_tokens_of_a_question_are_refused(tiny, image, question):
    with pytest.raises(ValueError, match="question.*control token"):
        comparison.ask(*tiny, image, question)


def test_tower_runs_once_for_all_counts(calibrated, image):
    model, processor = calibrated
    runs = []
    hook = model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    asked = comparison.ask(model, processor, image, QUESTION)
    comparison.choose_count(model, asked)
    for count in (4, 16, 36):
        comparison.answer_at(model, processor, asked, count, max_new_tokens=2)
    hook.remove()
    assert len(runs) == 1


def test_chosen_count_is_the_one_that_auto_gives(calibrated, image, encode):
    model, processor = calibrated
    chosen = []
    for question in (QUESTION, "how many dots are there?"):
        inputs = encode(processor, [image], question)
        output = model.generate(**inputs, num_vision_tokens="auto", max_new_tokens=1, return_dict_in_generate=True)
        count, _ = comparison.choose_count(model, comparison.ask(model, processor, image, question))
        assert count == output.num_vision_tokens.item()
        chosen.append(count)
    assert len(set(chosen)) > 1


def test_choosing_without_a_chooser_is_refused(tiny, image):
    with pytest.raises(ValueError, match="tokenflex calibrate"):
        comparison.choose_count(tiny[0], comparison.ask(*tiny, image, QUESTION))


def test_grid_follows_the_images_shape_where_the_processor_does(tiny):
    model, processor = tiny[0], copy.deepcopy(tiny[1])
    processor.match_aspect_ratio = True
    asked = comparison.ask(model, processor, Image.new("RGB", (200, 100), "red"), QUESTION)
    answer, other = (comparison.answer_at(model, processor, asked, count, max_new_tokens=1) for count in (16, 4))
    assert answer.grid[1] > answer.grid[0]
    difference = answer.prompt_tokens - other.prompt_tokens
    assert difference == answer.grid[0] * answer.grid[1] - other.grid[0] * other.grid[1]


@pytest.mark.parametrize(("question", "message"), [("", "Type"), (" \n", "Type"), ("a" * 1001, "1001 characters")])
def test_bad_questions_are_refused(tiny, image, question, message):
    with pytest.raises(ValueError, match=message):
        comparison.ask(*tiny, image, question)


def test_impossible_counts_are_refused(tiny, image):
    with pytest.raises(ValueError, match="num_vision_tokens.*5.*Nearest"):
        comparison.answer_at(*tiny, comparison.ask(*tiny, image, QUESTION), 5)
