import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.data.synthetic import SyntheticVQA
from tokenflex.evaluation.evaluator import main
from tokenflex.evaluation.progress import predict_on_and_on, read_partial
from tokenflex.evaluation.report import COSTS
from tokenflex.evaluation.sweep import predict


ROWS = SyntheticVQA(9, 4, questions_per_image=3)
RUN = {"dataset": "drawn", "counts": [4, 36]}


class Stopping:
    """Rows that end the process, as it were, when the given one is read."""

    def __init__(self, at):
        self.at = at

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        if index == self.at:
            raise KeyboardInterrupt
        return ROWS[index]


def on_and_on(tiny, path, rows, **options):
    return predict_on_and_on(path, RUN, *tiny, rows, [4, 36], 4, 4, show_progress=False, **options)


@pytest.mark.parametrize("torn", [0, 7])
@pytest.mark.parametrize("stops", [[5], [2, 7], [0]])
def test_a_stopped_evaluation_goes_on_and_answers_nothing_twice(tiny, tmp_path, stops, torn, monkeypatch):
    path = tmp_path / "out" / "partial.jsonl"
    whole = predict(*tiny, ROWS, [4, 36], batch_size=4, max_new_tokens=4, show_progress=False)
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            on_and_on(tiny, path, Stopping(stop))
        if path.exists() and torn:
            lines = path.read_text().split("\n")
            path.write_text("\n".join(lines[:-1]) + "\n" + '[{"index": '[:torn])
    done = read_partial(path, RUN, ROWS)
    assert done == whole[: len(done)] and (stops == [0]) == (not done)
    asked = []
    generate = tiny[0].generate
    monkeypatch.setattr(
        tiny[0], "generate", lambda **kwargs: asked.append(len(kwargs["input_ids"])) or generate(**kwargs)
    )
    assert on_and_on(tiny, path, ROWS) == whole
    assert sum(asked) == 2 * (len(whole) - len(done))


def test_answers_of_another_evaluation_are_refused(tiny, tmp_path):
    on_and_on(tiny, tmp_path / "partial.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"differs in dataset \(drawn, not other\): name another"):
        read_partial(tmp_path / "partial.jsonl", {**RUN, "dataset": "other"}, ROWS)


def test_the_command_goes_on_and_leaves_nothing_behind(tiny, tmp_path, capsys, monkeypatch):
    save_checkpoint(tmp_path / "checkpoint", *tiny)
    arguments = [
        "--model_name_or_path",
        str(tmp_path / "checkpoint"),
        "--dataset",
        "synthetic:6@2",
        "--batch_size",
        "8",
    ]

    def results(folder):
        main([*arguments, "--output_dir", str(tmp_path / folder)])
        report = json.loads((tmp_path / folder / "results.json").read_text())
        for name in COSTS:
            report.pop(name)
        return report, (tmp_path / folder / "predictions.jsonl").read_bytes()

    expected = results("whole")
    with monkeypatch.context() as patch:
        patch.setattr(
            sys.modules["tokenflex.evaluation.evaluator"],
            "score",
            lambda *args: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            results("stopped")
    assert (tmp_path / "stopped" / "predictions.partial.jsonl").is_file()
    with pytest.raises(ValueError, match="differs in counts"):
        main([*arguments, "--output_dir", str(tmp_path / "stopped"), "--num_vision_tokens", "4"])
    assert results("stopped") == expected
    assert len(list((tmp_path / "stopped").iterdir())) == 4


@pytest.fixture
def stopped(narrow, tmp_path, monkeypatch):
    """A command, and a folder in which it was stopped behind its last answer."""
    save_checkpoint(tmp_path / "checkpoint", *narrow)
    write_rows(tmp_path / "rows.jsonl")

    def command(*options):
        main([
            "--model_name_or_path", str(tmp_path / "checkpoint"), "--dataset", str(tmp_path / "rows.jsonl"),
            "--num_vision_tokens", "4", "--output_dir", str(tmp_path / "out"), "--latency_batch_size", "0",
            "--max_new_tokens", "2", *options,
        ])  # fmt: skip

    with monkeypatch.context() as patch:
        module = sys.modules["tokenflex.evaluation.evaluator"]
        patch.setattr(module, "score", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            command()
    return command, tmp_path


def write_rows(file, question="which color?", shade=0):
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(file.with_name("image.png"))
    rows = [{"image": "image.png", "question": text, "answer": "red"} for text in ("dark?", question)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_weights(folder, model, processor):
    with torch.no_grad():
        model = copy.deepcopy(model)
        model.lm_head.weight[0, 0] += 1
    save_checkpoint(folder / "checkpoint", model, processor)


def change_config(folder, model, processor):
    model = copy.deepcopy(model)
    model.config.text_config.rope_parameters["rope_theta"] = 5000.0
    save_checkpoint(folder / "checkpoint", model, processor)


def change_image_processor(folder, model, processor):
    processor = copy.deepcopy(processor)
    processor.image_processor.image_mean = [0.1, 0.1, 0.1]
    save_checkpoint(folder / "checkpoint", model, processor)


def change_template(folder, model, processor):
    processor = copy.deepcopy(processor)
    processor.chat_template = processor.chat_template.replace("user", "USER") + " "
    save_checkpoint(folder / "checkpoint", model, processor)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (change_weights, "weights"),
        (change_config, "config"),
        (change_image_processor, "processor"),
        (change_template, "processor"),
    ],
)
def test_another_checkpoint_of_the_same_name_is_refused(stopped, narrow, change, name):
    command, folder = stopped
    change(folder, *narrow)
    with pytest.raises(ValueError, match=rf"another evaluation, which differs in {name} \("):
        command()


@pytest.mark.parametrize("change", [{"question": "what color?"}, {"shade": 1}])
def test_other_rows_of_the_same_name_are_refused(stopped, change):
    command, folder = stopped
    write_rows(folder / "rows.jsonl", **change)
    with pytest.raises(ValueError, match=f"row {0 if 'shade' in change else 1} .*another"):
        command()


@pytest.mark.parametrize(
    "options", [("--max_new_tokens", "3"), ("--metric", "anls"), ("--num_vision_tokens", "4", "16")]
)
def test_other_arguments_are_refused(stopped, options):
    command, folder = stopped
    name = "counts" if "4" in options else options[0].strip("-")
    with pytest.raises(ValueError, match=rf"differs in {name} \("):
        command(*options)


def test_the_same_checkpoint_goes_on_wherever_it_lies(stopped):
    command, folder = stopped
    (folder / "checkpoint").rename(folder / "moved")
    command("--model_name_or_path", str(folder / "moved"), "--batch_size", "1")
    assert (folder / "out" / "results.json").is_file()


def test_two_processes_give_the_report_of_one(tiny, tmp_path, capsys):
    save_checkpoint(tmp_path / "checkpoint", *tiny)
    arguments = [
        "--model_name_or_path",
        str(tmp_path / "checkpoint"),
        "--dataset",
        "synthetic:7@2",
        "--batch_size",
        "8",
    ]
    main([*arguments, "--output_dir", str(tmp_path / "one")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_endpoint", "localhost:0"]
    launch += ["--rdzv_backend", "c10d", "-m", "tokenflex", "eval", *arguments, "--output_dir", str(tmp_path / "two")]
    finished = subprocess.run(launch, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout.strip().split("\n")[-1])["output_dir"] == str(tmp_path / "two")
    reports = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert [report.pop("machine")["processes"] for report in reports] == [1, 2]
    assert all(report.pop(name).keys() == {"4", "16", "36"} for report in reports for name in COSTS)
    assert reports[0] == reports[1]
    answers = [(tmp_path / name / "predictions.jsonl").read_bytes() for name in ("one", "two")]
    assert answers[0] == answers[1]
    assert len(list((tmp_path / "two").iterdir())) == 4
