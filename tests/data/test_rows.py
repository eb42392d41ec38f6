import logging
import re

import pytest
from helpers import answers_of, text_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflex.data.arguments import DataArguments
from tokenflex.data.encoding import encode_row, measure_row
from tokenflex.data.examples import BadRowError
from tokenflex.data.rows import MixedRows, RowChecker, Rows
from tokenflex.data.streaming import StreamedRows


def checked(rows, source="rows", processor=None, **options):
    return Rows(rows, RowChecker(source, DataArguments([source], **options), None, processor))


@given(st.lists(st.booleans(), min_size=1, max_size=12).filter(any))
@settings(deadline=None, derandomize=True)
def test_lazy_rows_pass_on_to_the_next_usable_row(usable):
    rows = text_rows(*(str(i) if good else "" for i, good in enumerate(usable)))
    lazy = checked(rows, on_bad_row="skip", check_rows="lazily")
    first = checked(rows, on_bad_row="skip")
    assert len(lazy) == len(rows) and lazy.num_skipped == 0
    assert first.num_skipped == usable.count(False)
    assert answers_of(first[i] for i in range(len(first))) == [str(i) for i, good in enumerate(usable) if good]
    for i in range(len(rows)):
        expected = next(place for place in [*range(i, len(rows)), *range(i)] if usable[place])
        assert answers_of([lazy[i]]) == [str(expected)]
        assert lazy[i].skipped == (expected - i) % len(rows)


def test_lazy_rows_name_a_bad_row_when_it_is_read(caplog):
    rows = checked(text_rows("a", "", "c"), "some rows", check_rows="lazily")
    assert answers_of([rows[0], rows[2], rows[-1]]) == ["a", "c", "c"]
    with pytest.raises(BadRowError, match="some rows, row 1: its answer is ''"):
        rows[1]
    skipping = checked(text_rows("a", "", "c"), "some rows", on_bad_row="skip", check_rows="lazily")
    with caplog.at_level(logging.WARNING):
        skipping[1]
    assert "Skipped some rows, row 1: its answer is ''" in caplog.text


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>"])
def test_special_tokens_are_refused_whenever_rows_are_checked(narrow, token):
    rows, reason = text_rows("a", f"b {token}"), re.escape(f"row 1: its text contains {token!r}")
    with pytest.raises(BadRowError, match=reason):
        checked(rows, processor=narrow[1])
    with pytest.raises(BadRowError, match=reason):
        checked(rows, processor=narrow[1], check_rows="lazily")[1]


LONG = [
    {"question": "which?", "answer": "short"},
    {"question": "which?", "answer": "long " * 30},
    {"question": "which " * 30, "answer": "late"},
]


@pytest.fixture(scope="module")
def limit(narrow):
    """A little more than the first of the long rows needs."""
    return measure_row(encode_row(LONG[0], narrow[1]), narrow[1])[0] + 3


@pytest.mark.parametrize("check_rows", ["first", "lazily"])
@pytest.mark.parametrize(
    "policy, kept",
    [
        ({"on_long_row": "skip"}, [0]),
        ({"on_long_row": "skip", "on_bad_row": "skip"}, [0]),
        ({"on_long_row": "truncate", "on_bad_row": "skip"}, [0, 1]),
    ],
)
def test_long_rows_are_left_out_or_kept_to_be_cut(narrow, limit, policy, kept, check_rows):
    rows = checked(LONG, processor=narrow[1], max_length=limit, check_rows=check_rows, **policy)
    read = [rows[i] for i in range(len(rows))]
    assert answers_of(example for example in read if not example.skipped) == [LONG[i]["answer"] for i in kept]
    assert rows.num_skipped + sum(example.skipped > 0 for example in read) == len(LONG) - len(kept)


@pytest.mark.parametrize("check_rows", ["first", "lazily"])
@pytest.mark.parametrize(
    "policy, reason",
    [
        ({}, "row 1: it needs [0-9]+ tokens, but `max_length` is LIMIT: raise `max_length` to"),
        ({"on_bad_row": "skip"}, "row 1: it needs [0-9]+ tokens"),
        ({"on_long_row": "truncate"}, "row 2: it needs [0-9]+ tokens up to its last image.*never cuts an image"),
    ],
)
def test_long_row_is_named(narrow, limit, policy, reason, check_rows):
    with pytest.raises(BadRowError, match=reason.replace("LIMIT", str(limit))):
        list(checked(LONG, processor=narrow[1], max_length=limit, check_rows=check_rows, **policy))


def test_max_length_has_to_be_measurable(narrow):
    with pytest.raises(ValueError, match="`max_length`=10 needs a `processor`"):
        checked(LONG, max_length=10)
    with pytest.raises(ValueError, match="`max_length`=0"):
        checked(LONG, processor=narrow[1], max_length=0)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("check_rows", ["first", "lazily"])
def test_columns_that_are_not_used_are_named_once(check_rows, streaming, caplog):
    rows = [{**row, "id": i, "level": None} for i, row in enumerate(text_rows("a", "b", "c"))]
    rows[2] |= {"level": 3, "choices": None, "family": "x"}
    check = RowChecker("some rows", DataArguments(["x"], check_rows=check_rows))
    with caplog.at_level(logging.WARNING):
        read = StreamedRows([(rows, check)], DataArguments(["x"])) if streaming else Rows(rows, check)
        for _ in range(2):
            list(read)
    named = [record.getMessage() for record in caplog.records if "not used" in record.getMessage()]
    assert sorted(re.findall("'(.*?)'", " ".join(named))) == ["id", "level"]
    assert all(message.startswith("some rows: columns that are not used: '") for message in named)


SIZES = st.lists(st.tuples(st.integers(1, 30), st.floats(0.01, 100)), min_size=1, max_size=5)


@given(SIZES)
@settings(deadline=None, derandomize=True)
def test_mixture_keeps_shares_and_rows(sizes_and_weights):
    sizes, weights = zip(*sizes_and_weights)
    parts = [[(part, row) for row in range(size)] for part, size in enumerate(sizes)]
    plain = MixedRows(parts)
    assert [plain[i] for i in range(len(plain))] == [row for part in parts for row in part]
    mixed = MixedRows(parts, weights)
    rows = [mixed[i] for i in range(len(mixed))]
    for place, (part, weight) in enumerate(zip(parts, weights)):
        own = [row for row in rows if row[0] == place]
        assert own == [part[i % len(part)] for i in range(len(own))]
        assert len(own) >= len(part)
        assert abs(len(own) - len(rows) * weight / sum(weights)) < 1 + 1e-9
    longest = max(size / (weight / sum(weights)) for size, weight in zip(sizes, weights))
    assert len(rows) <= longest + 1, "an epoch is no longer than it has to be"
    scaled = MixedRows(parts, [weight * 4 for weight in weights])
    assert [scaled[i] for i in range(len(scaled))] == rows


def test_weights_that_divide_evenly_repeat_nothing():
    assert [len(MixedRows([range(7), range(3)], weights)) for weights in ([0.7, 0.3], [70, 30])] == [10, 10]
