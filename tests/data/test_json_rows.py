import json
import pickle

import pytest
from helpers import read_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tokenflex.data.examples import BadRowError
from tokenflex.data.json_rows import JsonRows


def write(folder, content, name="rows.jsonl"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


CELLS = st.one_of(st.integers(), st.text(), st.lists(st.text(), max_size=2), st.none(), st.booleans())
OBJECTS = st.lists(st.dictionaries(st.sampled_from(["id", "image", "question"]), CELLS), min_size=1, max_size=6)


@given(
    rows=OBJECTS, end=st.sampled_from(["\n", "\r\n"]), blanks=st.integers(0, 2), last=st.booleans(), bom=st.booleans()
)
@settings(deadline=None, derandomize=True)
def test_every_form_gives_the_rows_that_were_written(tmp_path_factory, rows, end, blanks, last, bom):
    folder = tmp_path_factory.mktemp("json")
    lines = (end * (1 + blanks)).join(json.dumps(row, ensure_ascii=False) for row in rows) + end * last
    mark = "\ufeff" * bom
    for name, content in (
        ("rows.jsonl", lines),
        ("rows.json", lines),
        ("array.json", " \n" + json.dumps(rows, indent=1)),
    ):
        read = JsonRows(write(folder, mark + content, name))
        assert len(read) == len(rows)
        assert [read[i] for i in range(len(rows))] == list(read) == rows
        assert read[-1] == rows[-1]
        assert list(pickle.loads(pickle.dumps(read))) == rows
        with pytest.raises(IndexError):
            read[len(rows)]


BAD_LINES = {
    "is not valid JSON at column 7": b'{"a": }',
    "is not valid JSON at column 1": b"not json",
    "is not UTF-8 at byte 7": b'{"a": "\xe9"}',
    "is a JSON list": b"[1]",
    "is a JSON int": b"1",
    "cannot be parsed": b"[" * 100_000,
}


@pytest.mark.parametrize("reason", BAD_LINES)
def test_bad_line_costs_itself_alone_and_is_named(tmp_path, reason):
    rows = JsonRows(write(tmp_path, b'\n{"a": 1}\n\n\n' + BAD_LINES[reason] + b'\n\n{"a": 2}\n'))
    assert len(rows) == 3 and (rows[0], rows[2]) == ({"a": 1}, {"a": 2})
    for index in (1, -2):
        with pytest.raises(BadRowError, match=f"^line 5 {reason}"):
            rows[index]


def test_bad_lines_are_skipped_or_stop_the_loading(tmp_path):
    good = json.dumps({"question": "which?", "answer": "this"}).encode()
    path = str(write(tmp_path, b"\n".join([good, b"{", good, b'{"question": "caf\xe9"}', good])))
    rows = read_rows(path, on_bad_row="skip")
    assert (len(rows), rows.num_skipped) == (3, 2)
    with pytest.raises(BadRowError, match=f"{path}, row 1: line 2 is not valid JSON"):
        read_rows(path)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b'[{"a": 1},\n {"a": }]', "rows.json is not valid JSON at line 2, column 8"),
        (b'[{"a": "\xe9"}]', "rows.json is not UTF-8 at byte 8"),
        (b"[" * 100_000, "rows.json cannot be parsed"),
        (b"[]", "rows.json is empty"),
        (b"", "rows.json is empty"),
        (b" \n\n", "rows.json is empty"),
        (b"\xef\xbb\xbf", "rows.json is empty"),
    ],
)
def test_broken_or_empty_file_is_named(tmp_path, content, reason):
    with pytest.raises(ValueError, match=reason):
        JsonRows(write(tmp_path, content, "rows.json"))


def test_item_of_an_array_that_is_no_object_is_a_bad_row(tmp_path):
    rows = JsonRows(write(tmp_path, '[{"a": 1}, "b"]', "rows.json"))
    assert rows[0] == {"a": 1}
    with pytest.raises(BadRowError, match="a JSON str"):
        rows[1]


def test_what_is_kept_of_a_line_is_its_place(tmp_path):
    rows = JsonRows(write(tmp_path, "".join(json.dumps({"text": "x" * 1000}) + "\n" for _ in range(1000))))
    assert len(pickle.dumps(rows)) < 1000 * 8 + 1000


def test_workers_read_what_one_process_reads(tmp_path):
    rows = JsonRows(write(tmp_path, "".join(f'{{"id": {i}}}\n' for i in range(40))))
    rows[3]
    loader = DataLoader(rows, batch_size=4, num_workers=2, collate_fn=list)
    assert [row["id"] for batch in loader for row in batch] == list(range(40))


def test_columns_of_mixed_types_load(tmp_path):
    rows = [
        {"id": 7, "image": None, "conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]},
        {"id": "x", "conversations": [{"from": "human", "value": "c?"}, {"from": "gpt", "value": "d", "note": [1]}]},
        {"id": None, "image": [], "question": "e?", "answer": 5},
    ]
    loaded = read_rows(str(write(tmp_path, json.dumps(rows), "llava.json")))
    assert [loaded[i].dialogs[0][1]["content"][0]["text"] for i in range(3)] == ["b", "d", "5"]
