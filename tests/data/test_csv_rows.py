import csv
import pickle

import pytest
from helpers import answers_of, read_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflex.data.csv_rows import CsvRows
from tokenflex.data.examples import BadRowError


HEAD = b"question,answer\n"
CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\r\0")) | st.sampled_from(
    ["007", "1.50", "1e5", "NA", "null", "nan", "True", '"', "a,b", "a\tb", "two\nlines", "  x", "é"]
)


def write(folder, content, name="rows.csv"):
    path = folder / name
    path.write_bytes(content)
    return path


@given(
    rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6),
    tabs=st.booleans(),
    bom=st.booleans(),
    crlf=st.booleans(),
)
@settings(deadline=None, derandomize=True)
def test_every_cell_is_the_text_that_was_written(tmp_path_factory, rows, tabs, bom, crlf):
    path = tmp_path_factory.mktemp("csv") / ("rows.tsv" if tabs else "rows.csv")
    with open(path, "w", newline="", encoding="utf-8-sig" if bom else "utf-8") as file:
        options = {"delimiter": "\t" if tabs else ",", "lineterminator": "\r\n" if crlf else "\n"}
        csv.writer(file, quoting=csv.QUOTE_ALL, **options).writerows([("question", "answer"), *rows])
    read = CsvRows(path)
    expected = [{"question": question or None, "answer": answer or None} for question, answer in rows]
    assert len(read) == len(rows) and list(read) == list(pickle.loads(pickle.dumps(read))) == expected
    assert read[-1] == expected[-1]
    with pytest.raises(IndexError):
        read[len(rows)]


def test_blank_lines_are_no_rows(tmp_path):
    rows = CsvRows(write(tmp_path, b"\n".join([b"question,answer", b"", b"a?,b", b"", b"c?,d", b""])))
    assert [row["answer"] for row in rows] == ["b", "d"]


BAD_LINES = {
    "it has 3 cells, but the file has 2 columns": b"a?,b,c",
    "it has 1 cells, but the file has 2 columns": b"a?",
    "it is not valid CSV": b'"a" b,c',
    "utf-8": b"a?,caf\xe9",
    "its answer is None": b"a?,",
}


@pytest.mark.parametrize("reason", BAD_LINES)
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_line_costs_itself_alone_and_is_named(tmp_path, reason, streaming):
    path = str(write(tmp_path, HEAD + b"a?,first\n" + BAD_LINES[reason] + b"\nc?,third\n"))
    with pytest.raises(BadRowError, match=f"rows.csv, row 1: .*{reason}"):
        list(read_rows(path, streaming=streaming))
    kept = read_rows(path, on_bad_row="skip", streaming=streaming, shuffle_buffer=0)
    assert answers_of(kept) == ["first", "third"]


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "is empty"),
        (HEAD, "is empty"),
        (b"question,answer,answer\na?,b,c\n", "several columns named 'answer'"),
        (b"caf\xe9,answer\na?,b\n", "cannot be read as CSV"),
        (HEAD + b"a?," + b"x" * 200_000 + b"\n", "field larger than field limit"),
    ],
)
def test_file_without_rows_or_columns_is_named(tmp_path, content, reason):
    with pytest.raises(ValueError, match=f"rows.csv.*{reason}"):
        CsvRows(write(tmp_path, content))
