import copy
import json
from pathlib import Path

import pytest
from helpers import IMAGES, read_rows
from transformers import AutoModelForImageTextToText, AutoProcessor

import tokenflex.evaluation.progress
from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.cli import main
from tokenflex.data.synthetic import SyntheticVQA
from tokenflex.evaluation.label import PARTIAL, ImageQuestions, label
from tokenflex.evaluation.sweep import predict
from tokenflex.training.collator import TokenFlexDataCollator


QUESTIONS = ["which color?", "how many dots?", "what is it?"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photos/more").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.PNG", "more/c.png", "more/d.png")):
        IMAGES[i].save(tmp_path / "photos" / name)
    (tmp_path / "photos/notes.txt").write_text("no image")
    (tmp_path / "questions.txt").write_text("\n".join(QUESTIONS) + "\n\n")
    return tmp_path


@pytest.fixture
def ending(tiny):
    """Random weights hardly ever end an answer by themselves."""
    return let_end(*copy.deepcopy(tiny))


def let_end(model, processor):
    model.generation_config.forced_eos_token_id = model.generation_config.eos_token_id
    return model, processor


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def run(folder, checkpoint, *options):
    main(
        ["label", "--model_name_or_path", str(checkpoint), "--images", str(folder / "photos"), "--questions",
         str(folder / "questions.txt"), "--output_dir", str(folder / "labeled"), "--max_new_tokens", "6", *options]
    )  # fmt: skip


def test_the_command_writes_a_data_set_of_the_models_answers(both, folder, capsys):
    model, processor = let_end(*both)
    save_checkpoint(folder / "checkpoint", model, processor)
    run(folder, folder / "checkpoint", "--questions_per_image", "2", "--num_vision_tokens", "16")
    rows = lines_of(folder / "labeled/rows.jsonl")
    assert f"answers to {len(rows)} of 4 images' questions" in capsys.readouterr().out
    asked = ImageQuestions(folder / "photos", QUESTIONS, 2)
    assert [row["questions"] for row in asked] == [QUESTIONS[:2], [QUESTIONS[2], QUESTIONS[0]], QUESTIONS[1:]] + [
        QUESTIONS[:2]
    ]
    expected = {}
    for prediction in predict(model, processor, list(asked), [16], max_new_tokens=6, show_progress=False):
        if (answer := prediction.predictions[16]) and not prediction.cut:
            expected.setdefault(asked[prediction.index]["image"], {})[prediction.question] = answer
    assert {row["images"][0]: dict(zip(row["questions"], row["answers"])) for row in rows} == expected
    assert not (folder / "labeled" / PARTIAL).exists()


def test_files_that_cannot_be_read_are_left_out(folder):
    (folder / "photos/more/broken.png").write_bytes((folder / "photos/a.png").read_bytes()[:60])
    files = ImageQuestions(folder / "photos", QUESTIONS).files
    assert [file.name for file in files] == ["a.png", "b.PNG", "c.png", "d.png"]


def test_rows_can_be_trained_on_and_keep_their_questions(ending, tmp_path):
    model, processor = ending
    data = SyntheticVQA(3, seed=5)
    path = label(model, processor, data, tmp_path, max_new_tokens=8, show_progress=False)
    rows = read_rows(str(path), processor=processor)
    assert len(rows) == 3
    for row, original in zip(rows, data):
        assert row.images[0].tobytes() == original["image"].convert("RGB").tobytes()
        assert {dialog[0]["content"][-1]["text"] for dialog in row.dialogs} <= set(original["questions"])
    batch = TokenFlexDataCollator(processor, [4, 16], [1, 1])([rows[0], rows[1]])
    assert model(**batch).loss.isfinite()


def test_only_the_last_answer_of_a_conversation_is_the_models(ending, tmp_path):
    model, processor = ending
    turns = ["which color?", "red", "and the other?", "blue"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    row = {"image": IMAGES[0], "messages": messages}
    path = label(model, processor, [row], tmp_path, max_new_tokens=8, show_progress=False)
    [labeled] = lines_of(path)
    texts = [message["content"][-1]["text"] for message in labeled["messages"]]
    assert texts[:3] == turns[:3]
    [expected] = predict(model, processor, [row], [36], max_new_tokens=8, show_progress=False)
    assert texts[3] == expected.predictions[36]


def test_a_stopped_run_goes_on(ending, tmp_path, monkeypatch):
    model, processor = ending
    data, options = SyntheticVQA(6, seed=5), {"batch_size": 4, "max_new_tokens": 8, "show_progress": False}
    whole = label(model, processor, data, tmp_path / "whole", **options).read_text()
    answer, batches = tokenflex.evaluation.progress.answer_questions, []

    def stop_at_the_third(*args):
        batches.append(args)
        if len(batches) == 3:
            raise KeyboardInterrupt
        answer(*args)

    monkeypatch.setattr(tokenflex.evaluation.progress, "answer_questions", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        label(model, processor, data, tmp_path / "stopped", **options)
    assert (tmp_path / "stopped" / PARTIAL).exists() and not (tmp_path / "stopped/rows.jsonl").exists()
    with pytest.raises(ValueError, match="answers of another evaluation, which differs in .*rows"):
        label(model, processor, SyntheticVQA(2, seed=5), tmp_path / "stopped", **options)
    assert label(model, processor, data, tmp_path / "stopped", **options).read_text() == whole


def test_answers_that_do_not_end_are_left_out(tiny, tmp_path):
    model, processor = tiny
    with pytest.raises(ValueError, match="None of the . answers ended within `max_new_tokens`=3: allow longer"):
        label(model, processor, SyntheticVQA(1, seed=5, questions_per_image=2), tmp_path, max_new_tokens=3)
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "nowhere"], "`images`='nowhere': there are no image files"),
        (["--questions", "nowhere.txt"], "`questions`='nowhere.txt': there is no such file"),
        (["--questions_per_image", "4"], "`questions_per_image`=4: the file of questions holds 3"),
    ],
)
def test_what_is_missing_is_named(tiny, folder, options, message):
    save_checkpoint(folder / "checkpoint", *tiny)
    with pytest.raises(SystemExit, match=message):
        run(folder, folder / "checkpoint", *options)
    assert not (folder / "labeled").exists()


def test_an_adopted_model_is_labeled_and_tuned_by_the_recipe(pristine_adopted, folder):
    save_checkpoint(folder / "checkpoint", *let_end(*copy.deepcopy(pristine_adopted)))
    run(folder, folder / "checkpoint", "--max_new_tokens", "8")
    main(
        ["train", "--config", "adopt/tune.yaml", "--model_name_or_path", str(folder / "checkpoint"), "--dataset",
         str(folder / "labeled/rows.jsonl"), "--output_dir", str(folder / "tuned"), "--bf16", "false",
         "--gradient_checkpointing", "false", "--max_steps", "2", "--save_strategy", "no", "--report_to", "none",
         "--dataloader_num_workers", "0"]
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_pretrained(folder / "tuned/final")
    processor = AutoProcessor.from_pretrained(folder / "tuned/final")
    start = AutoModelForImageTextToText.from_pretrained(folder / "checkpoint").state_dict()
    moved = {name.split(".")[1] for name, weight in model.state_dict().items() if not weight.equal(start[name])}
    assert moved == {"language_model", "multi_modal_projector"}
    inputs = processor(images=IMAGES[0], text=processor.image_token + "which color?", return_tensors="pt")
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 36
