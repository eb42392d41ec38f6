import logging

import pytest
from helpers import answers_of, text_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflex.data.arguments import DataArguments
from tokenflex.data.examples import BadRowError
from tokenflex.data.rows import MixedRows, RowChecker, Rows


def checked(rows, source="rows", special_tokens=(), measure=None, **options):
    return Rows(rows, RowChecker(source, DataArguments([source], **options), None, special_tokens, measure))


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


def test_special_tokens_are_refused_whenever_rows_are_checked():
    rows = text_rows("a", "b <eos>")
    with pytest.raises(BadRowError, match="row 1: its text contains '<eos>'"):
        checked(rows, special_tokens=["<eos>"])
    with pytest.raises(BadRowError, match="row 1: its text contains '<eos>'"):
        checked(rows, special_tokens=["<eos>"], check_rows="lazily")[1]


def measure(example):
    """A text "12 5" needs 12 tokens, of which 5 cannot be cut."""
    needed, uncuttable = answers_of([example])[0].split()
    return int(needed), int(uncuttable)


LONG = text_rows("5 1", "12 5", "9 9", "12 11", "10 10")


@pytest.mark.parametrize("check_rows", ["first", "lazily"])
@pytest.mark.parametrize(
    "policy, kept",
    [
        ({"on_long_row": "skip"}, ["5 1", "9 9", "10 10"]),
        ({"on_long_row": "skip", "on_bad_row": "skip"}, ["5 1", "9 9", "10 10"]),
        ({"on_long_row": "truncate", "on_bad_row": "skip"}, ["5 1", "12 5", "9 9", "10 10"]),
    ],
)
def test_long_rows_are_left_out_or_kept_to_be_cut(policy, kept, check_rows):
    rows = checked(LONG, max_length=10, measure=measure, check_rows=check_rows, **policy)
    read = [rows[i] for i in range(len(rows))]
    assert answers_of(example for example in read if not example.skipped) == kept
    assert rows.num_skipped + sum(example.skipped > 0 for example in read) == len(LONG) - len(kept)


@pytest.mark.parametrize("check_rows", ["first", "lazily"])
@pytest.mark.parametrize(
    "policy, reason",
    [
        ({}, "row 1: it needs 12 tokens, but `max_length` is 10: raise `max_length` to 12"),
        ({"on_bad_row": "skip"}, "row 1: it needs 12 tokens"),
        ({"on_long_row": "truncate"}, "row 3: it needs 11 tokens up to its last image.*never cuts an image"),
    ],
)
def test_long_row_is_named(policy, reason, check_rows):
    with pytest.raises(BadRowError, match=reason):
        list(checked(LONG, max_length=10, measure=measure, check_rows=check_rows, **policy))


def test_max_length_has_to_be_measurable():
    with pytest.raises(ValueError, match="`max_length`=10 needs `measure`"):
        checked(LONG, max_length=10)
    with pytest.raises(ValueError, match="`max_length`=0"):
        checked(LONG, max_length=0, measure=measure)


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
