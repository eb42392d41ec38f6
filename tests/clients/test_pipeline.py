"""Pipelines from checkpoints, with plain prompts and with named counts."""

import pytest
from transformers import pipeline

from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.data.synthetic import draw_scene


IMAGES = [draw_scene(7, index).image for index in range(3)]
QUESTIONS = ["which color is the paper?", "how tall is the red bar?", "how many dots are there?"]
OPTIONS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def chat(number):
    content = [{"type": "image", "image": IMAGES[number]}, {"type": "text", "text": QUESTIONS[number]}]
    return [{"role": "user", "content": content}]


def answer(model, processor, count, **prompt):
    """The answer of `generate` to a prompt that is encoded at the count and alone."""
    inputs = processor(num_vision_tokens=count, return_tensors="pt", **prompt)
    output = model.generate(**inputs, **OPTIONS)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def answer_chat(model, processor, count, number):
    text = processor.apply_chat_template(chat(number), add_generation_prompt=True)
    return answer(model, processor, count, images=IMAGES[number], text=text)


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline") / "checkpoint"
    save_checkpoint(path, *tiny)
    return pipeline("image-text-to-text", model=str(path))


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("way", ["generate_kwargs", "processor_kwargs"])
def test_a_saved_folder_makes_the_same_pipeline(tiny, saved, way, batch_size):
    model, processor = tiny
    said = set()
    for count in (4, 36, (2, 5)):
        kwargs = {"generate_kwargs": dict(OPTIONS)}
        kwargs[way] = {**kwargs.get(way, {}), "num_vision_tokens": count}
        outputs = saved(text=[chat(i) for i in range(3)], batch_size=batch_size, return_full_text=False, **kwargs)
        texts = [output[0]["generated_text"] for output in outputs]
        assert texts == [answer_chat(model, processor, count, number) for number in range(3)]
        said.add(tuple(texts))
    assert len(said) == 3, "the counts differ in what they say"


@pytest.mark.parametrize(("name", "count"), [("low", 4), ("high", 36)])
def test_a_count_has_a_name_in_a_pipeline(tiny, saved, name, count):
    output = saved(text=chat(0), generate_kwargs={**OPTIONS, "num_vision_tokens": name}, return_full_text=False)
    assert output[0]["generated_text"] == answer_chat(*tiny, count, 0)


@pytest.mark.parametrize("count", [4, 16])
def test_the_full_text_is_the_prompt_and_the_answer(tiny, saved, count):
    model, processor = tiny
    kwargs = {"generate_kwargs": {**OPTIONS, "num_vision_tokens": count}}
    messages = saved(text=chat(1), return_full_text=True, **kwargs)[0]["generated_text"]
    assert messages[:-1] == chat(1)
    assert messages[-1] == {"role": "assistant", "content": answer_chat(model, processor, count, 1)}

    prompts = [f"<|image_pad|>{question}" for question in QUESTIONS]
    expected = [answer(model, processor, count, images=image, text=text) for image, text in zip(IMAGES, prompts)]
    full = saved(images=IMAGES, text=prompts, return_full_text=True, **kwargs)
    assert [output["generated_text"] for output in full] == [*map("".join, zip(prompts, expected))]
    new = saved(images=IMAGES, text=prompts, return_full_text=False, **kwargs)
    assert [output["generated_text"] for output in new] == expected


def test_token_ids_begin_with_the_prompt_as_it_was_encoded(tiny, saved):
    processor = tiny[1]
    kwargs = {"generate_kwargs": {**OPTIONS, "num_vision_tokens": 4}, "processor_kwargs": {"num_vision_tokens": 36}}
    ids = saved(text=chat(2), return_tensors=True, **kwargs)[0]["generated_token_ids"]
    assert int((ids == processor.image_token_id).sum()) == 36
    answered = processor.decode(ids[-OPTIONS["max_new_tokens"] :], skip_special_tokens=True)
    assert answered == answer_chat(*tiny, 4, 2)


def test_a_count_that_is_no_square_is_refused_with_its_neighbors(saved):
    for kwargs in ({"generate_kwargs": {"num_vision_tokens": 5}}, {"processor_kwargs": {"num_vision_tokens": 5}}):
        with pytest.raises(ValueError, match="Nearest: 4 or 9"):
            saved(text=chat(0), **kwargs)
