import io
import json
import logging

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from helpers import read_rows
from PIL import Image
from transformers import HfArgumentParser

from tokenflex.data.arguments import DataArguments
from tokenflex.data.examples import BadRowError, Example
from tokenflex.data.loading import load_rows
from tokenflex.data.rows import RowChecker, Rows
from tokenflex.data.synthetic import SyntheticVQA


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
    assert_are_synthetic(read_rows(write_parquet(tmp_path / "a.parquet", synthetic_rows(5))), 5)


def test_image_feature_rows_are_what_was_written(tmp_path):
    dataset = datasets.Dataset.from_list(synthetic_rows(5)).cast_column("image", datasets.Image())
    dataset.to_parquet(tmp_path / "a.parquet")
    assert_are_synthetic(read_rows(str(tmp_path / "a.parquet")), 5)
    assert_are_synthetic(Rows(dataset, RowChecker("rows", DataArguments(["rows"]))), 5)


def test_list_of_images_feature_rows_are_what_was_written(tmp_path):
    rows = [{"images": [row.pop("image")], **row} for row in synthetic_rows(5)]
    dataset = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    dataset.to_parquet(tmp_path / "a.parquet")
    assert_are_synthetic(read_rows(str(tmp_path / "a.parquet")), 5)


def test_rewritten_file_is_read_anew(tmp_path):
    path = tmp_path / "a.parquet"
    assert_are_synthetic(read_rows(write_parquet(path, synthetic_rows(3, seed=1))), 3, seed=1)
    assert_are_synthetic(read_rows(write_parquet(path, synthetic_rows(4, seed=2))), 4, seed=2)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_json_paths_start_at_the_files_folder(tmp_path, jsonl_rows, suffix):
    rows = read_rows(write_jsonl(tmp_path / f"a{suffix}", jsonl_rows))
    assert [example.images[0].size for example in (rows[i] for i in range(len(rows)))] == [(64, 64)] * 4


def test_image_folder_moves_where_paths_start(tmp_path, jsonl_rows):
    (tmp_path / "elsewhere").mkdir()
    path = write_jsonl(tmp_path / "elsewhere" / "a.jsonl", jsonl_rows)
    assert len(read_rows(path, image_folder=str(tmp_path))) == 4
    with pytest.raises(BadRowError, match="a.jsonl, row 0"):
        read_rows(path)


def test_csv_rows(tmp_path, jsonl_rows):
    lines = ["image,question,answer", *(f'{r["image"]},"{r["question"]}",{r["answer"]}' for r in jsonl_rows)]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    assert len(read_rows(str(tmp_path / "a.csv"))) == 4


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
    loaded = read_rows(write_parquet(tmp_path / "a.parquet", rows))
    assert [len(example.images) for example in (loaded[i] for i in range(3))] == [1, 1, 1]


BAD_PARQUET = {
    "cannot be decoded": {"image": {"bytes": b"\x89PNG broken", "path": None}},
    "cannot be decoded.": {"image": {"bytes": b"", "path": None}},
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
        read_rows(path)
    assert "some.parquet, row 2: " in str(caught.value) and reason.rstrip(".") in str(caught.value)


@pytest.mark.parametrize(
    "change, reason",
    [({"answer": ""}, "answer is ''"), ({"image": "images/none.png"}, "none.png"), ({"question": None}, "question")],
)
def test_bad_jsonl_row_is_named(tmp_path, jsonl_rows, change, reason):
    jsonl_rows[3].update(change)
    with pytest.raises(BadRowError) as caught:
        read_rows(write_jsonl(tmp_path / "some.jsonl", jsonl_rows))
    assert "some.jsonl, row 3: " in str(caught.value) and reason in str(caught.value)


BAD_JSONL = {
    "the image cannot be decoded \\(FileNotFoundError": {"image": "images/none.png"},
    "the image cannot be decoded \\(UnidentifiedImageError": {"image": "images/empty.png"},
    "the image cannot be decoded \\(DecompressionBombError": {"image": "images/bomb.png"},
    "the image is the address 'https": {"image": "https://example.org/a.png"},
    "its text places 1 images, but it has 0": {"image": None, "question": "<image> which?"},
    "its text places 2 images, but it has 1": {"question": "<image> or <image>?"},
    "its messages have the roles \\['robot', 'assistant'\\]": {
        "messages": [{"role": "robot", "content": "a"}, {"role": "assistant", "content": "b"}]
    },
    "an assistant's message is empty": {
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " "}]
    },
    "its answer is ''": {"answer": ""},
}


@pytest.mark.parametrize("check_rows", ["first", "lazily"])
def test_each_bad_row_is_named_or_skipped_and_counted(tmp_path, jsonl_rows, check_rows):
    (tmp_path / "images" / "empty.png").touch()
    Image.new("1", (20_000, 20_000)).save(tmp_path / "images" / "bomb.png")
    for reason, change in BAD_JSONL.items():
        path = write_jsonl(tmp_path / "one.jsonl", [jsonl_rows[0], {**jsonl_rows[1], **change}])
        with pytest.raises(BadRowError, match=f"one.jsonl, row 1: {reason}"):
            read_rows(path, check_rows=check_rows)[1]
    bad = [{**jsonl_rows[1], **change} for change in BAD_JSONL.values()]
    rows = read_rows(
        write_jsonl(tmp_path / "all.jsonl", [*bad, *jsonl_rows]), on_bad_row="skip", check_rows=check_rows
    )
    assert rows.num_skipped + rows[0].skipped == len(bad)


def test_skipping_leaves_bad_rows_out_and_says_how_many(tmp_path, caplog):
    rows = synthetic_rows(6)
    rows[0]["answers"] = ["", ""]
    rows[4]["image"]["bytes"] = b""
    path = write_parquet(tmp_path / "a.parquet", rows)
    with caplog.at_level(logging.WARNING):
        loaded = read_rows(path, on_bad_row="skip")
    kept = [loaded[i].images[0].tobytes() for i in range(len(loaded))]
    assert kept == [SyntheticVQA(6, 0)[i]["image"].tobytes() for i in (1, 2, 3, 5)]
    assert loaded.num_skipped == 2 and f"Skipped 2 of 6 rows of {path}" in caplog.text
    assert "row 0" in caplog.text and "row 4" in caplog.text


def test_nothing_is_said_when_all_rows_are_good(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        read_rows(write_parquet(tmp_path / "a.parquet", synthetic_rows(2)), on_bad_row="skip")
    assert "Skipped" not in caplog.text


@pytest.mark.parametrize("check_rows", ["first", "lazily"])
def test_no_usable_row_is_an_error_even_when_skipping(tmp_path, check_rows):
    rows = [{**row, "image": "none.png"} for row in synthetic_rows(2)]
    with pytest.raises(BadRowError, match="a.jsonl has no usable rows"):
        read_rows(write_jsonl(tmp_path / "a.jsonl", rows), on_bad_row="skip", check_rows=check_rows)[0]


@pytest.mark.parametrize("name", ["on_bad_row", "on_long_row", "check_rows"])
def test_misspelled_choice_is_refused(name):
    with pytest.raises(ValueError, match=f"`{name}`='ignore': use 'error' or|`{name}`='ignore': use 'first' or"):
        read_rows("synthetic:1", **{name: "ignore"})


@pytest.mark.parametrize("name", ["none.parquet", "none.jsonl", "folder/none.json", "folder"])
def test_missing_file_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}.*no such file"):
        read_rows(str(tmp_path / name))


def test_what_is_neither_here_nor_on_the_hub_is_named():
    with pytest.raises(
        ValueError, match="`dataset`='data/none' cannot be read from the Hub, and there is no such file"
    ):
        read_rows("data/none")


@pytest.mark.parametrize(
    "name", ["synthetic:abc", "synthetic:", "synthetic:0", "synthetic:-3", "synthetic:1.5", "synthetic:3@"]
)
def test_wrong_number_of_synthetic_images_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}.*synthetic:1000"):
        read_rows(name)


@pytest.mark.parametrize("seed", [0, 5])
def test_synthetic_rows_are_those_of_the_seed(seed):
    rows, expected = read_rows("synthetic:7", seed=seed), SyntheticVQA(7, seed)
    assert read_rows(f"synthetic:7@{seed}", seed=3)[6].images[0].tobytes() == expected[6]["image"].tobytes()
    assert len(rows) == 7
    for i in range(7):
        assert rows[i].images[0].tobytes() == expected[i]["image"].tobytes()
        assert rows[i].families == expected[i]["families"]


def test_saved_data_sets_are_read(tmp_path):
    dataset = datasets.Dataset.from_list(synthetic_rows(5)).cast_column("image", datasets.Image())
    dataset.save_to_disk(tmp_path / "alone")
    datasets.DatasetDict({"train": dataset, "test": dataset.select(range(2))}).save_to_disk(tmp_path / "splits")
    assert_are_synthetic(read_rows(str(tmp_path / "alone")), 5)
    assert_are_synthetic(read_rows(str(tmp_path / "splits")), 5)
    assert_are_synthetic(read_rows(str(tmp_path / "splits"), dataset_split="test"), 2)
    with pytest.raises(ValueError, match="`dataset_split`='dev'.*train, test"):
        read_rows(str(tmp_path / "splits"), dataset_split="dev")


def test_folders_in_the_hubs_layout_are_read(tmp_path):
    (tmp_path / "data").mkdir()
    for split, count in (("train", 5), ("test", 2)):
        write_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet", synthetic_rows(count))
    assert_are_synthetic(read_rows(str(tmp_path)), 5)
    assert_are_synthetic(read_rows(str(tmp_path), dataset_split="test"), 2)
    with pytest.raises(ValueError, match="cannot be read.*dev"):
        read_rows(str(tmp_path), dataset_split="dev")


def test_empty_folder_is_named(tmp_path):
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="bare' cannot be read"):
        read_rows(str(tmp_path / "bare"))


def test_images_in_the_messages_of_a_table_are_left_encoded_and_read(tmp_path):
    messages = [
        [
            {"role": "user", "content": [{"type": "image", "image": row["image"], "text": None}]},
            {"role": "assistant", "content": [{"type": "text", "text": row["answers"][0], "image": None}]},
        ]
        for row in synthetic_rows(3)
    ]
    part = {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
    message = {"role": datasets.Value("string"), "content": datasets.List(part)}
    features = datasets.Features({"messages": datasets.List(message)})
    datasets.Dataset.from_dict({"messages": messages}, features=features).to_parquet(tmp_path / "a.parquet")
    rows = read_rows(str(tmp_path / "a.parquet"))
    images = [rows[i].images[0].tobytes() for i in range(3)]
    assert images == [SyntheticVQA(3, 0)[i]["image"].tobytes() for i in range(3)]


def test_text_that_is_not_utf8_in_a_table_is_a_bad_row(tmp_path):
    answers = pyarrow.array([b"yes", b"caf\xe9", b"no"]).view(pyarrow.string())
    table = pyarrow.table({"question": ["a?", "b?", "c?"], "answer": answers})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(BadRowError, match="a.parquet, row 1: .*utf-8"):
        read_rows(str(tmp_path / "a.parquet"))
    assert len(read_rows(str(tmp_path / "a.parquet"), on_bad_row="skip")) == 2


def test_unknown_kind_of_file_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(ValueError, match="a.txt.*parquet"):
        read_rows(str(tmp_path / "a.txt"))


@pytest.mark.parametrize(
    "suffix, content",
    [
        (".parquet", b"not parquet"),
        (".parquet", b""),
        (".csv", b""),
        (".csv", b"question,answer\nwhich?,caf\xe9\n"),
        (".jsonl", b"{not json"),
        (".jsonl", b" \n"),
        (".json", b'[{"question":'),
        (".json", b""),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_unreadable_file_is_named(tmp_path, suffix, content, streaming):
    (tmp_path / f"broken{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=f"broken{suffix}"):
        list(read_rows(str(tmp_path / f"broken{suffix}"), streaming=streaming))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_is_read_from_a_file(tmp_path, mode):
    image = Image.new(mode, (5, 3))
    buffer = io.BytesIO()
    image.save(buffer, "TIFF")
    row = {"image": {"bytes": buffer.getvalue(), "path": None}, "question": "which?", "answer": "this"}
    [read] = read_rows(write_parquet(tmp_path / "a.parquet", [row]))[0].images
    assert (read.mode, read.size) == ("RGB", (5, 3))


def test_mixture_of_names_is_its_parts(tmp_path, jsonl_rows):
    jsonl_rows[1]["answer"] = ""
    names = [write_jsonl(tmp_path / "a.jsonl", jsonl_rows), write_parquet(tmp_path / "b.parquet", synthetic_rows(2))]
    plain = read_rows(*names, on_bad_row="skip")
    assert (len(plain), plain.num_skipped) == (5, 1)
    mixed = read_rows(*names, on_bad_row="skip", dataset_weights=[1, 3])
    assert len(mixed) == 12
    assert_are_synthetic([mixed[i] for i in (3, 4)], 2)
    assert_are_synthetic([mixed[i] for i in (-3, -2)], 2)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "weights, reason",
    [
        ([1], "1 weights for 2 data sets"),
        ([1, 0], "holds 0"),
        ([1, -1], "holds -1"),
        ([1, float("nan")], "holds nan"),
        ([1, float("inf")], "holds inf"),
    ],
)
def test_wrong_weights_are_refused(weights, reason, streaming):
    with pytest.raises(ValueError, match=reason):
        read_rows("synthetic:1", "synthetic:2", dataset_weights=weights, streaming=streaming)


@pytest.mark.parametrize("dataset", [[], "synthetic:1"])
def test_what_is_no_list_of_data_sets_is_refused(dataset):
    with pytest.raises(ValueError, match="`dataset`=.*: give a list of at least one data set"):
        DataArguments(dataset)


def test_arguments_are_those_of_read_rows(narrow):
    options = "--dataset synthetic:2 synthetic:1 --dataset_weights 1 1 --max_length 999 --check_rows lazily"
    (parsed,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses(options.split())
    assert len(load_rows(parsed, narrow[1])) == 4
    with pytest.raises(SystemExit):
        HfArgumentParser(DataArguments).parse_args_into_dataclasses(["--dataset", "x", "--on_long_row", "ignore"])
