import csv
import decimal
import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from helpers import answers_of, read_rows
from PIL import Image

from tokenflex.data.examples import BadRowError


TEXTS = [
    "007",
    "1.50",
    "1e5",
    "NA",
    "null",
    "None",
    "nan",
    "True",
    "3",
    "9" * 40,
    "2020-01-01",
    "  x",
    "if a:\n    b\n",
]
NUMBERS = ["1.50", "1e5", "1E+2", "-0.0", "3.0", "9" * 40, "3"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_table(path, answers, first="image"):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerows([(first, "question", "answer"), *(("0.png", "which?", answer) for answer in answers)])


def write_lines(path, answers):
    """JSON Lines whose answers are JSON as it is given."""
    start = json.dumps({"file_name": "0.png", "question": "which?"}).removesuffix("}")
    path.write_text("".join(f'{start}, "answer": {answer}}}\n' for answer in answers))


def folder_of(tmp_path, name):
    folder = tmp_path / "folder" / name
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "0.png")
    return folder


PLACES = ["rows.csv", "rows.tsv", "train.csv", "train.tsv", "metadata.csv", "train/metadata.csv"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_cells_of_tables_are_texts(tmp_path, place, streaming):
    folder = folder_of(tmp_path, "train" if "/" in place else "")
    path = folder / place.rpartition("/")[2]
    write_table(path, TEXTS, "file_name" if "metadata" in place else "image")
    name = path if place.startswith("rows") else tmp_path / "folder"
    rows = list(read_rows(str(name), streaming=streaming, shuffle_buffer=0))
    assert answers_of(rows) == TEXTS
    assert all(row.images[0].size == (8, 8) for row in rows) or place.startswith("train.")


@pytest.mark.parametrize("place", ["rows.jsonl", "rows.json", "train.jsonl", "metadata.jsonl"])
def test_numbers_and_texts_of_json_are_written_as_in_the_file(tmp_path, place):
    path = folder_of(tmp_path, "") / place
    write_lines(path, [*NUMBERS, *map(json.dumps, TEXTS)])
    rows = list(read_rows(str(path if place.startswith("rows") else tmp_path / "folder")))
    assert answers_of(rows) == [*NUMBERS, *TEXTS]
    assert [len(row.images) for row in rows] == [int("metadata" in place)] * len(rows)


@pytest.mark.parametrize(
    "answer, shown", [("NaN", "nan"), ("Infinity", "inf"), ("-Infinity", "-inf"), ("null", "None")]
)
def test_missing_number_of_json_is_a_missing_answer(tmp_path, answer, shown):
    write_lines(tmp_path / "rows.jsonl", ['"a"', answer])
    with pytest.raises(BadRowError, match=f"rows.jsonl, row 1: its answer is {shown}"):
        read_rows(str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "answers, expected",
    [
        (pyarrow.array(TEXTS), TEXTS),
        (pyarrow.array(TEXTS).dictionary_encode(), TEXTS),
        (pyarrow.array([3, None, 12345678901234567]), ["3", "12345678901234567"]),
        (pyarrow.array([3.0, None, 0.5, float("nan"), float("inf"), 0.1]), ["3", "0.5", "0.1"]),
        (pyarrow.array([3.0, None, 0.1, float("nan"), float("inf")], pyarrow.float32()), ["3", "0.1"]),
        (pyarrow.array([[0.1, 0.1], [0.3]], pyarrow.list_(pyarrow.float32())), ["0.1", "0.3"]),
        (pyarrow.array([decimal.Decimal("1.50"), None]), ["1.50"]),
    ],
)
def test_answers_of_parquet(tmp_path, answers, expected, streaming):
    table = pyarrow.table({"question": ["which?"] * len(answers), "answer": answers})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    rows = read_rows(str(tmp_path / "a.parquet"), on_bad_row="skip", streaming=streaming, shuffle_buffer=0)
    assert answers_of(rows) == expected


def test_numbers_of_labels_are_no_answers(tmp_path):
    features = {"question": datasets.Value("string"), "answer": datasets.ClassLabel(names=["no", "yes"])}
    rows = datasets.Dataset.from_dict({"question": ["dark?"], "answer": [1]}, features=datasets.Features(features))
    rows.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="'answer' holds the numbers of the labels \\['no', 'yes'\\]"):
        read_rows(str(tmp_path / "saved"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("answers, is_read", [(["007", "1"], False), (["1.50"], False), (["red", "12"], True)])
def test_tables_whose_cells_datasets_has_guessed_are_refused(tmp_path, answers, is_read, streaming):
    """Of compressed files, as of those on the Hub."""
    (tmp_path / "folder").mkdir()
    with gzip.open(tmp_path / "folder" / "train.csv.gz", "wt") as file:
        file.write("question,answer\n" + "".join(f"which?,{answer}\n" for answer in answers))
    if is_read:
        assert answers_of(read_rows(str(tmp_path / "folder"), streaming=streaming, shuffle_buffer=0)) == answers
        return
    with pytest.raises(ValueError, match="column 'answer' is text that `datasets` has taken for"):
        read_rows(str(tmp_path / "folder"), streaming=streaming)


def test_splits_of_folders_of_tables(tmp_path):
    folder = folder_of(tmp_path, "")
    for split, answers in (("train-0", ["1"]), ("train-1", ["2", "3"]), ("test", ["4"])):
        write_table(folder / f"{split}.csv", answers)
    assert answers_of(read_rows(str(folder))) == ["1", "2", "3"]
    assert answers_of(read_rows(str(folder), dataset_split="test")) == ["4"]
    with pytest.raises(ValueError, match="`dataset_split`='dev'.*train, test"):
        read_rows(str(folder), dataset_split="dev")


def test_image_folder_with_several_images_in_a_row(tmp_path):
    folder = folder_of(tmp_path, "")
    row = {"file_names": ["0.png", "0.png"], "question": "<image> or <image>?", "answer": "both"}
    (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    assert [image.size for image in read_rows(str(folder))[0].images] == [(8, 8)] * 2
