import io
import json
import logging

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from tokenflex.training.data import BadRowError, Example
from tokenflex.training.datasets import Rows, load_rows
from tokenflex.training.synthetic import SyntheticVQA


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def synthetic_rows(count, seed=0):
    rows = SyntheticVQA(count, seed, questions_per_image=2)
    return [{**rows[i], "image": {"bytes": png(rows[i]["image"]), "path": None}} for i in range(count)]


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def jsonl_rows(tmp_path):
    (tmp_path / "images").mkdir()
    rows = []
    for i, row in enumerate(synthetic_rows(4)):
        (tmp_path / "images" / f"{i}.png").write_bytes(row["image"]["bytes"])
        rows.append({"image": f"images/{i}.png", "question": row["questions"][0], "answer": row["answers"][0]})
    return rows


def assert_are_synthetic(rows, count, seed=0):
    expected = SyntheticVQA(count, seed, questions_per_image=2)
    assert len(rows) == count
    for i in range(count):
        assert isinstance(rows[i], Example)
        assert rows[i].images[0].tobytes() == expected[i]["image"].tobytes()
        assert rows[i].families == expected[i]["families"]
        answers = [dialog[1]["content"][0]["text"] for dialog in rows[i].dialogs]
        assert answers == expected[i]["answers"]


def test_parquet_rows_are_what_was_written(tmp_path):
    assert_are_synthetic(load_rows(write_parquet(tmp_path / "a.parquet", synthetic_rows(5))), 5)


def test_image_feature_rows_are_what_was_written(tmp_path):
    dataset = datasets.Dataset.from_list(synthetic_rows(5)).cast_column("image", datasets.Image())
    dataset.to_parquet(tmp_path / "a.parquet")
    assert_are_synthetic(load_rows(str(tmp_path / "a.parquet")), 5)
    assert_are_synthetic(Rows(dataset, "rows"), 5)


def test_list_of_images_feature_rows_are_what_was_written(tmp_path):
    rows = [{"images": [row.pop("image")], **row} for row in synthetic_rows(5)]
    dataset = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    dataset.to_parquet(tmp_path / "a.parquet")
    assert_are_synthetic(load_rows(str(tmp_path / "a.parquet")), 5)


def test_rewritten_file_is_read_anew(tmp_path):
    path = tmp_path / "a.parquet"
    assert_are_synthetic(load_rows(write_parquet(path, synthetic_rows(3, seed=1))), 3, seed=1)
    assert_are_synthetic(load_rows(write_parquet(path, synthetic_rows(4, seed=2))), 4, seed=2)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_json_paths_start_at_the_files_folder(tmp_path, jsonl_rows, suffix):
    rows = load_rows(write_jsonl(tmp_path / f"a{suffix}", jsonl_rows))
    assert [example.images[0].size for example in (rows[i] for i in range(len(rows)))] == [(64, 64)] * 4


def test_image_folder_moves_where_paths_start(tmp_path, jsonl_rows):
    (tmp_path / "elsewhere").mkdir()
    path = write_jsonl(tmp_path / "elsewhere" / "a.jsonl", jsonl_rows)
    assert len(load_rows(path, image_folder=str(tmp_path))) == 4
    with pytest.raises(BadRowError, match="a.jsonl, row 0"):
        load_rows(path)


def test_csv_rows(tmp_path, jsonl_rows):
    lines = ["image,question,answer", *(f'{r["image"]},"{r["question"]}",{r["answer"]}' for r in jsonl_rows)]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    assert len(load_rows(str(tmp_path / "a.csv"))) == 4


def test_messages_with_parts_from_parquet(tmp_path):
    rows = [
        {
            "images": [row["image"]],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["questions"][0]}]},
                {"role": "assistant", "content": [{"type": "text", "text": row["answers"][0]}]},
            ],
        }
        for row in synthetic_rows(3)
    ]
    loaded = load_rows(write_parquet(tmp_path / "a.parquet", rows))
    assert [len(example.images) for example in (loaded[i] for i in range(3))] == [1, 1, 1]


BAD_PARQUET = {
    "cannot be decoded": {"image": {"bytes": b"\x89PNG broken", "path": None}},
    "cannot be decoded.": {"image": {"bytes": b"", "path": None}},
    "no image": {"image": None},
    "answer is ''": {"answers": ["", ""]},
    "2 questions but 1 answers": {"answers": ["red"]},
    "1 questions but 2 answers": {"questions": ["only one?"]},
    "question is None": {"questions": None, "answers": ["one answer"]},
}


@pytest.mark.parametrize("reason", BAD_PARQUET)
def test_bad_parquet_row_is_named(tmp_path, reason):
    rows = synthetic_rows(4)
    rows[2].update(BAD_PARQUET[reason])
    path = write_parquet(tmp_path / "some.parquet", rows)
    with pytest.raises(BadRowError) as caught:
        load_rows(path)
    assert "some.parquet, row 2: " in str(caught.value) and reason.rstrip(".") in str(caught.value)


@pytest.mark.parametrize(
    "change, reason",
    [({"answer": ""}, "answer is ''"), ({"image": "images/none.png"}, "none.png"), ({"question": None}, "question")],
)
def test_bad_jsonl_row_is_named(tmp_path, jsonl_rows, change, reason):
    jsonl_rows[3].update(change)
    with pytest.raises(BadRowError) as caught:
        load_rows(write_jsonl(tmp_path / "some.jsonl", jsonl_rows))
    assert "some.jsonl, row 3: " in str(caught.value) and reason in str(caught.value)


def test_skipping_leaves_bad_rows_out_and_says_how_many(tmp_path, caplog):
    rows = synthetic_rows(6)
    rows[0]["image"] = None
    rows[4]["image"]["bytes"] = b""
    with caplog.at_level(logging.WARNING):
        loaded = load_rows(write_parquet(tmp_path / "a.parquet", rows), on_bad_row="skip")
    kept = [loaded[i].images[0].tobytes() for i in range(len(loaded))]
    assert kept == [SyntheticVQA(6, 0)[i]["image"].tobytes() for i in (1, 2, 3, 5)]
    assert "Skipped 2 of 6 rows of a.parquet" in caplog.text
    assert "row 0" in caplog.text and "row 4" in caplog.text


def test_nothing_is_said_when_all_rows_are_good(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        load_rows(write_parquet(tmp_path / "a.parquet", synthetic_rows(2)), on_bad_row="skip")
    assert "Skipped" not in caplog.text


def test_no_usable_row_is_an_error_even_when_skipping(tmp_path):
    rows = [{**row, "image": None} for row in synthetic_rows(2)]
    with pytest.raises(BadRowError, match="a.jsonl has no usable rows"):
        load_rows(write_jsonl(tmp_path / "a.jsonl", rows), on_bad_row="skip")


def test_misspelt_policy_is_refused(tmp_path):
    with pytest.raises(ValueError, match="on_bad_row.*ignore"):
        load_rows(write_parquet(tmp_path / "a.parquet", synthetic_rows(1)), on_bad_row="ignore")


@pytest.mark.parametrize("name", ["none.parquet", "none.jsonl", "folder/none.json"])
def test_missing_file_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}.*no such file"):
        load_rows(str(tmp_path / name))


def test_unknown_kind_of_file_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(ValueError, match="a.txt.*parquet"):
        load_rows(str(tmp_path / "a.txt"))


@pytest.mark.parametrize(
    "suffix, content", [(".parquet", b"not parquet"), (".jsonl", b"{not json"), (".parquet", b"")]
)
def test_unreadable_file_is_named(tmp_path, suffix, content):
    (tmp_path / f"broken{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=f"broken{suffix}"):
        load_rows(str(tmp_path / f"broken{suffix}"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_survives_a_file(tmp_path, mode):
    image = Image.new(mode, (5, 3))
    buffer = io.BytesIO()
    image.save(buffer, "TIFF")
    row = {"image": {"bytes": buffer.getvalue(), "path": None}, "question": "which?", "answer": "this"}
    assert load_rows(write_parquet(tmp_path / "a.parquet", [row]))[0].images[0].mode == mode
