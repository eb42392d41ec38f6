"""Cells of tables: which are missing, and the text that the others hold."""

import math
import reprlib
from decimal import Decimal

import numpy as np


COLUMNS_HELP = (
    "a row needs `question`/`answer`, `questions`/`answers`, `messages` (roles and content) or LLaVA's "
    "`conversations`, and `image` or `images` unless it is text alone"
)


class BadRowError(ValueError):
    """A data row that cannot be used; the message says why, and once read from a file, which row of which file."""


def is_missing(value) -> bool:
    """True for `None`, and for NaN and the infinities, which tables put where a value is missing."""
    return value is None or isinstance(value, (float, np.floating, Decimal)) and not math.isfinite(value)


def as_text(name: str, value) -> str:
    """
    The text of a cell, in which no letter is changed. A number in binary has no text of its own: it is written in its
    shortest form, 3.0 as `3`.

    Args:
        name (`str`): The cell's meaning, for errors.
        value (`str`, `int`, `float` or `Decimal`): The cell.

    Raises:
        BadRowError: If it is missing, blank, or something else.

    Example:

    ```python
    >>> from tokenflex.data.cells import as_text

    >>> [as_text("answer", value) for value in ("007", " x", 3.0, 0.5)]
    ['007', ' x', '3', '0.5']
    ```
    """
    if is_missing(value) and value is not None:
        raise BadRowError(f"its {name} is {value}, which stands for a missing value; {COLUMNS_HELP}")
    if isinstance(value, (int, float, np.integer, np.floating, Decimal)) and not isinstance(value, bool):
        text = str(value)
        return text if isinstance(value, Decimal) else text.removesuffix(".0")
    if not isinstance(value, str) or not value.strip():
        raise BadRowError(f"its {name} is {reprlib.repr(value)}, not a text; {COLUMNS_HELP}")
    return value
