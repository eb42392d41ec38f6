import pytest
from PIL import Image

from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.data.synthetic import SyntheticVQA
from tokenflex.inference.ask import answer, main


QUESTION = "which color is the paper?"


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    save_checkpoint(folder / "checkpoint", *tiny)
    SyntheticVQA(1, 4)[0]["image"].save(folder / "image.png")
    return folder


def printed_answers(capsys):
    lines = capsys.readouterr().out.rstrip("\n").split("\n")
    return [(line.split()[0], line.split(": ", 1)[1]) for line in lines if "vision tokens: " in line]


def ask(folder, *options):
    main([
        "--model_name_or_path", str(folder / "checkpoint"), "--image", str(folder / "image.png"),
        "--question", QUESTION, "--max_new_tokens", "4", *map(str, options),
    ])  # fmt: skip


@pytest.mark.parametrize("counts", [[], [4], [64, 1, 36]])
def test_command_prints_one_answer_per_count(folder, tiny, capsys, counts):
    ask(folder, *(["--num_vision_tokens", *counts] if counts else []))
    image = Image.open(folder / "image.png")
    asked = counts or tiny[0].config.vision_token_choices
    assert printed_answers(capsys) == [
        (str(count), answer(*tiny, image, QUESTION, count, max_new_tokens=4)) for count in asked
    ]


def test_counts_are_named_or_grids_too(folder, tiny, capsys):
    ask(folder, "--num_vision_tokens", "low", "4x6", "high")
    image = Image.open(folder / "image.png")
    asked = {"4": 4, "4x6": (4, 6), "36": 36}
    assert printed_answers(capsys) == [
        (name, answer(*tiny, image, QUESTION, count, max_new_tokens=4)) for name, count in asked.items()
    ]


def test_answer_equals_encoding_at_that_count(tiny):
    model, processor = tiny
    image = SyntheticVQA(1, 4)[0]["image"]
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    for count in (1, 4, 16, 36, 64):
        inputs = processor(images=image, text=prompt, num_vision_tokens=count, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
        expected = processor.decode(output, skip_special_tokens=True).strip()
        assert answer(model, processor, image, QUESTION, count, max_new_tokens=5) == expected


def test_answer_defaults_to_the_processors_count(tiny):
    image = SyntheticVQA(1, 4)[0]["image"]
    default = answer(*tiny, image, QUESTION, max_new_tokens=5)
    assert default == answer(*tiny, image, QUESTION, tiny[1].num_vision_tokens, max_new_tokens=5)


@pytest.mark.parametrize(
    ("count", "reason"), [("5", "`=5"), ("9x9", r"`=\(9, 9\)"), ("medium", "`='medium'"), ("4,4", "` lists 2 counts")]
)
def test_impossible_count_is_refused(folder, count, reason):
    with pytest.raises(ValueError, match=f"`num_vision_tokens{reason}"):
        ask(folder, "--num_vision_tokens", count)


@pytest.mark.parametrize("question", ["<|im_end|>", "which <|image_pad|> is it?"])
def test_a_question_s_control_tokens_are_refused(tiny, question):
    with pytest.raises(ValueError, match="`question`: .*control token"):
        answer(*tiny, SyntheticVQA(1, 4)[0]["image"], question, max_new_tokens=1)


@pytest.mark.parametrize("content", [None, b"not an image", b""])
def test_unreadable_image_is_refused_by_name(folder, tmp_path, content):
    if content is not None:
        (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(ValueError, match="broken.png"):
        main(["--model_name_or_path", str(folder), "--image", str(tmp_path / "broken.png"), "--question", QUESTION])
