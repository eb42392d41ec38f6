import decimal
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenflex.data.cells import BadRowError, as_text, is_missing


@given(st.text().filter(str.strip))
def test_texts_stay_as_they_are(text):
    assert as_text("answer", text) == text


@given(st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_are_written_so_that_they_can_be_read_back(number):
    text = as_text("answer", number)
    assert float(text) == float(number) and not text.endswith(".0")


@pytest.mark.parametrize(
    "value, text",
    [
        (3.0, "3"),
        (np.float32(0.1), "0.1"),
        (np.float16(0.1), "0.1"),
        (np.int64(7), "7"),
        (decimal.Decimal("1.50"), "1.50"),
        (decimal.Decimal("3.0"), "3.0"),
    ],
)
def test_numbers_of_tables(value, text):
    assert as_text("answer", value) == text


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, np.float32("nan"), decimal.Decimal("NaN")])
def test_what_is_missing_is_no_text(value):
    assert is_missing(value)
    with pytest.raises(BadRowError, match="its answer is (None|nan|-?inf|NaN)"):
        as_text("answer", value)


@pytest.mark.parametrize("value", [True, np.bool_(True), "", " \n", [], {}, b"x"])
def test_what_is_neither_text_nor_number_is_refused(value):
    assert not is_missing(value)
    with pytest.raises(BadRowError, match="its answer is .*, not a text"):
        as_text("answer", value)
