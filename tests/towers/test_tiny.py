import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText, AutoProcessor

from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.data.synthetic import IMAGE_SIZE, SyntheticVQA, draw_scene
from tokenflex.towers.tiny import PATCH_SIZE, VISION_TOKEN_CHOICES, VISION_TOKEN_WEIGHTS, tiny_model_and_processor


def weights_equal(first, second):
    other = second.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in first.state_dict().items())


def test_same_seed_gives_the_same_model_whatever_the_global_seed(narrow):
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again, processor = tiny_model_and_processor(width=32)
    assert torch.equal(torch.get_rng_state(), state)
    assert weights_equal(again, narrow[0])
    assert processor.tokenizer.get_vocab() == narrow[1].tokenizer.get_vocab()


def test_other_seed_gives_other_weights(narrow):
    assert not weights_equal(tiny_model_and_processor(seed=1, width=32)[0], narrow[0])


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(deadline=None)
def test_tokenizer_loses_nothing(narrow, text):
    tokenizer = narrow[1].tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert all(token < narrow[0].config.text_config.vocab_size for token in ids)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_answer_fits_the_tokens_that_the_quickstart_generates(seed):
    tokenizer = tiny_model_and_processor(seed, width=32)[1].tokenizer
    answers = {answer for i in range(200) for _, _, answer in draw_scene(9, i).questions}
    lengths = {answer: len(tokenizer(answer)["input_ids"]) for answer in answers}
    assert {answer: length for answer, length in lengths.items() if length > 4} == {}


def test_model_processor_and_constants_agree(narrow):
    model, processor = narrow
    assert model.config.patch_grid == processor.patch_grid == (IMAGE_SIZE // PATCH_SIZE,) * 2
    assert model.config.num_vision_tokens == processor.num_vision_tokens
    assert model.config.image_token_id == processor.image_token_id
    assert tuple(model.config.vision_token_choices) == VISION_TOKEN_CHOICES
    assert tuple(model.config.vision_token_weights) == VISION_TOKEN_WEIGHTS


def test_saved_and_loaded_generates_the_same(narrow, tmp_path):
    model, processor = narrow
    save_checkpoint(tmp_path / "checkpoint", model, processor)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint")
    reader = AutoProcessor.from_pretrained(tmp_path / "checkpoint")
    assert weights_equal(loaded, model)
    row = SyntheticVQA(1, 0)[0]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["questions"][0]}]}]
    for count in VISION_TOKEN_CHOICES:
        outputs = []
        for some_model, some_processor in ((model, processor), (loaded, reader)):
            prompt = some_processor.apply_chat_template(messages, add_generation_prompt=True)
            inputs = some_processor(images=row["image"], text=prompt, num_vision_tokens=count, return_tensors="pt")
            outputs.append(some_model.generate(**inputs, max_new_tokens=6))
        assert torch.equal(*outputs)
        assert not (outputs[0][:, inputs["input_ids"].shape[1] :] == model.config.image_token_id).any()
