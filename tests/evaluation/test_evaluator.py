import io
import json
from dataclasses import asdict

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers import give_chooser
from PIL import Image

from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.data.synthetic import SyntheticVQA
from tokenflex.evaluation import evaluate, predict, save_report, score
from tokenflex.evaluation.evaluator import main
from tokenflex.evaluation.report import COSTS
from tokenflex.towers.tiny import tiny_model_and_processor


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(both, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    save_checkpoint(folder / "checkpoint", *both)
    rows = [
        {**row, "image": {"bytes": png(row["image"]), "path": None}}
        for row in SyntheticVQA(6, seed=3, questions_per_image=2)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "test.parquet")
    rows[1]["answers"] = []
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "bad.parquet")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def evaluate_file(folder, output_dir, *options, dataset="test.parquet"):
    main([
        "--model_name_or_path", str(folder / "checkpoint"), "--dataset", str(folder / dataset),
        "--output_dir", str(output_dir), "--max_new_tokens", "3", *map(str, options),
    ])  # fmt: skip


def test_command_writes_what_the_functions_return(folder, both, tmp_path, capsys):
    evaluate_file(folder, tmp_path / "out", "--num_vision_tokens", 4, 36)
    printed = capsys.readouterr().out.strip().split("\n")
    summary = json.loads(printed[-1])
    rows = SyntheticVQA(6, seed=3, questions_per_image=2)
    predictions = predict(*both, rows, [4, 36], max_new_tokens=3, show_progress=False)
    scores = score(predictions, [4, 36])
    assert summary["output_dir"] == str(tmp_path / "out")
    assert summary["accuracy"] == {str(count): scores["overall"][count] for count in (4, 36)}

    written = json.loads((tmp_path / "out" / "results.json").read_text())
    for key, value in scores.items():
        assert written[key] == json.loads(json.dumps(value)), key
    assert all(written[name].keys() == {"4", "36"} for name in COSTS)
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().strip().split("\n")
    assert [json.loads(line) for line in lines] == [json.loads(json.dumps(asdict(p))) for p in predictions]
    assert (tmp_path / "out" / "results.md").read_text().strip() in "\n".join(printed)
    Image.open(tmp_path / "out" / "results.png").load()
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_counts_default_to_the_configs(folder, both, tmp_path, capsys):
    evaluate_file(folder, tmp_path / "out")
    summary = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    assert list(summary["accuracy"]) == [str(count) for count in both[0].config.vision_token_choices]


def test_bad_row_stops_or_is_skipped(folder, tmp_path):
    with pytest.raises(ValueError, match="bad.parquet, row 1"):
        evaluate_file(folder, tmp_path / "out", dataset="bad.parquet")
    evaluate_file(folder, tmp_path / "out", "--on_bad_row", "skip", "--num_vision_tokens", 4, dataset="bad.parquet")
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().strip().split("\n")
    assert {json.loads(line)["index"] for line in lines} == set(range(5))


@pytest.mark.parametrize("count", [5, 0, 100])
def test_impossible_count_is_refused_and_nothing_written(folder, tmp_path, count):
    with pytest.raises(ValueError, match=f"num_vision_tokens.*{count}"):
        evaluate_file(folder, tmp_path / "out", "--num_vision_tokens", count)
    assert not (tmp_path / "out").exists()


def test_no_time_is_measured_unless_asked(narrow, tmp_path):
    report, predictions = evaluate(
        *narrow, SyntheticVQA(2, 0), [4], max_new_tokens=2, latency_batch_size=0, show_progress=False
    )
    assert not set(COSTS) & set(report)
    save_report(tmp_path / "out", report, predictions, "no times")
    assert "first token" not in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.parametrize("shape", ["pil", "bytes", "datasets", "images", "path"])
def test_every_row_shape_that_is_answered_is_also_timed(narrow, tmp_path, shape):
    image = SyntheticVQA(1, 0)[0]["image"]
    image.save(tmp_path / "one.png")
    given = {
        "pil": {"image": image},
        "bytes": {"image": png(image)},
        "datasets": {"image": {"bytes": png(image), "path": None}},
        "images": {"images": [image]},
        "path": {"image": str(tmp_path / "one.png")},
    }[shape]
    row = {**given, "question": "which color?", "answer": "red"}
    report, _ = evaluate(*narrow, [row], [4], max_new_tokens=2, latency_batch_size=2, show_progress=False)
    assert report["milliseconds_to_first_token"][4] > 0


def test_answers_need_no_ascii(tmp_path):
    row = {"image": Image.new("RGB", (8, 8)), "question": "welche Farbe? 色", "answer": "grün 緑"}
    model, processor = tiny_model_and_processor(width=32)
    report, predictions = evaluate(
        model, processor, [row], [4], max_new_tokens=2, latency_batch_size=0, show_progress=False
    )
    save_report(tmp_path, report, predictions, "título")
    line = json.loads((tmp_path / "predictions.jsonl").read_text(encoding="utf-8"))
    assert (line["question"], line["answer"]) == (row["question"], row["answer"])


def test_a_chosen_count_is_reported_by_the_tokens_it_reads(tmp_path):
    model, processor = tiny_model_and_processor(width=32)
    give_chooser(model, [4, 16, 36], torch.zeros(3, 32), bias=[-1.0, 1.0, 1.0])
    rows = [SyntheticVQA(1, 0, questions_per_image=2)[0], {"question": "two?", "answer": "2"}]
    report, predictions = evaluate(model, processor, rows, max_new_tokens=2, batch_size=2, show_progress=False)
    assert list(report["overall"]) == [4, 16, 36, "auto"]
    assert [p.chosen for p in predictions] == [16, 16, None]
    assert all(p.predictions["auto"] == p.predictions[16] for p in predictions)
    together = evaluate(model, processor, rows, max_new_tokens=2, show_progress=False)
    assert [p.chosen for p in together[1]] == [16, 16, None]
    assert report["vision_tokens"] == together[0]["vision_tokens"] == {4: 4, 16: 16, 36: 36, "auto": 16}
    save_report(tmp_path, report, predictions, "with auto")
    assert "| auto (16.0 read) |" in (tmp_path / "results.md").read_text()
    assert model.training


def test_a_grid_is_refused_before_anything_is_answered(narrow, tmp_path):
    with pytest.raises(ValueError, match=r"`counts\[1\]`=\(2, 5\): .*give that"):
        evaluate(*narrow, SyntheticVQA(2, 3), [4, (2, 5)], partial_file=tmp_path / "partial.jsonl")
    assert not any(tmp_path.iterdir())
