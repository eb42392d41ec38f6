import base64

import pytest
import torch
from helpers import give_chooser

from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.data.images import ImageError
from tokenflex.data.synthetic import draw_scene
from tokenflex.evaluation.harness import HarnessModel
from tokenflex.towers.tiny import tiny_model_and_processor


CHOICES = [4, 16, 36]


@pytest.fixture(scope="module")
def conversations():
    """One image each, then two, then none."""
    conversations = []
    for index, number in enumerate([1] * 8 + [2, 0]):
        scene = draw_scene(5, index)
        parts = [{"type": "image", "image": scene.image}] * number
        conversations.append(
            [{"role": "user", "content": [*parts, {"type": "text", "text": scene.questions[index % 3 - 1][1]}]}]
        )
    return conversations


def encode(processor, conversations):
    return processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, conversations):
    """Calibrated with a head that finds the smallest count enough for some conversations and not for others."""
    model, processor = tiny_model_and_processor()
    read = model.eval().read_questions(**encode(processor, conversations))
    spread = (read - read.mean(0)).norm(dim=-1).mean()
    weight = torch.randn(3, read.shape[1], generator=torch.Generator().manual_seed(0)) / spread
    give_chooser(model, CHOICES, weight, bias=-weight @ read.mean(0))
    folder = tmp_path_factory.mktemp("harness") / "checkpoint"
    save_checkpoint(folder, model, processor)
    return str(folder)


@pytest.mark.parametrize("name, count", [("low", 4), ("high", 36)])
def test_names_of_counts_are_the_counts(checkpoint, conversations, name, count):
    named = HarnessModel(checkpoint, num_vision_tokens=name).answer(conversations, max_new_tokens=3)
    assert named == HarnessModel(checkpoint, num_vision_tokens=count).answer(conversations, max_new_tokens=3)


def test_auto_answers_at_the_count_that_each_conversation_chooses(checkpoint, conversations):
    auto = HarnessModel(checkpoint, num_vision_tokens="auto")
    answers = auto.answer(conversations, max_new_tokens=3)
    chosen = auto.model.choose_vision_tokens(**encode(auto.processor, conversations))
    assert len(set(chosen)) > 1
    at = {n: HarnessModel(checkpoint, num_vision_tokens=n).answer(conversations, max_new_tokens=3) for n in CHOICES}
    for row, (answer, count) in enumerate(zip(answers, chosen)):
        own = at[count][row]
        assert (answer.text, answer.output_tokens, answer.vision_tokens) == (
            own.text, own.output_tokens, own.vision_tokens,
        )  # fmt: skip
        # The text, which is read to choose, is paid for as well.
        assert answer.input_tokens == 2 * own.input_tokens - own.vision_tokens


def test_auto_without_images_reads_nothing_twice(checkpoint, conversations):
    text = [conversations[-1]]
    expected = HarnessModel(checkpoint, num_vision_tokens=4).answer(text, max_new_tokens=3)
    assert HarnessModel(checkpoint, num_vision_tokens="auto").answer(text, max_new_tokens=3) == expected


def test_auto_of_a_checkpoint_that_cannot_choose_is_refused(tmp_path):
    save_checkpoint(tmp_path / "checkpoint", *tiny_model_and_processor(width=32))
    with pytest.raises(ValueError, match="`num_vision_tokens`='auto'.*tokenflex calibrate.*36"):
        HarnessModel(str(tmp_path / "checkpoint"), num_vision_tokens="auto")


def test_other_names_are_refused_before_weights_are_read(checkpoint):
    with pytest.raises(ValueError, match="`num_vision_tokens`='medium'"):
        HarnessModel(checkpoint, num_vision_tokens="medium")


@pytest.mark.parametrize("written", ["4x6", (4, 6), [4, 6]])
def test_a_grid_may_be_a_text_a_tuple_or_a_list(checkpoint, conversations, written):
    """JSON files have no tuples, and all images have one count."""
    [answer] = HarnessModel(checkpoint, num_vision_tokens=written).answer(conversations[:1], max_new_tokens=1)
    assert answer.vision_tokens == 24


def test_addresses_of_images_are_fetched(checkpoint, conversations, tmp_path):
    [message] = conversations[0]
    image, question = message["content"]
    image["image"].save(tmp_path / "image.png")
    url = f"data:image/png;base64,{base64.b64encode((tmp_path / 'image.png').read_bytes()).decode()}"
    model = HarnessModel(checkpoint)

    def ask(image):
        return model.answer(
            [[{**message, "content": [{"type": "image", "image": image}, question]}]], max_new_tokens=3
        )

    expected = ask(image["image"])
    assert ask(url) == ask(str(tmp_path / "image.png")) == expected
    with pytest.raises(ImageError, match="neither a data: nor an http"):
        ask("ftp://example.org/image.png")
    with pytest.raises(ImageError, match="cannot be decoded"):
        ask(str(tmp_path / "missing.png"))
