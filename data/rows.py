"""Rows that are known to be usable, or are checked when they are read, and mixtures of them."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import accumulate
from pathlib import Path

import datasets
import numpy as np
from transformers.utils import logging

from .examples import BadRowError, Example, to_example


logger = logging.get_logger(__name__)

BAD_ROW_POLICIES = ("error", "skip")
LONG_ROW_POLICIES = ("error", "skip", "truncate")
CHECK_TIMES = ("first", "lazily")


class LongRowError(BadRowError):
    """A data row that is longer than `max_length`."""


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}`={value!r}: use {' or '.join(map(repr, choices))}.")


@dataclass
class RowChecker:
    """
    Decides whether a row can be used.

    Args:
        source (`str`): What to call the data set in errors.
        image_folder (`str`, *optional*): Where relative image paths start.
        on_bad_row (`str`, *optional*, defaults to `"error"`): `"error"` or `"skip"`.
        special_tokens (`Sequence[str]`, *optional*): What texts must not contain, since it would end or place things.
        max_length (`int`, *optional*): The longest row, in tokens. By default rows may be of any length.
        on_long_row (`str`, *optional*, defaults to `"error"`):
            `"error"`, `"skip"`, or `"truncate"` to keep a longer row for the collator to cut.
        measure (`Callable`, *optional*):
            Takes an example and returns (tokens it needs at the largest vision-token count, tokens of it that cannot be
            cut). Needed with `max_length`.

    Raises:
        ValueError: If a policy is unknown, or `max_length` is not positive or cannot be measured.
    """

    source: str
    image_folder: str | Path | None = None
    on_bad_row: str = "error"
    special_tokens: Sequence[str] = ()
    max_length: int | None = None
    on_long_row: str = "error"
    measure: Callable[[Example], tuple[int, int]] | None = None

    def __post_init__(self):
        check_choice("on_bad_row", self.on_bad_row, BAD_ROW_POLICIES)
        check_choice("on_long_row", self.on_long_row, LONG_ROW_POLICIES)
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"`max_length`={self.max_length}: a row has at least one token.")
        if self.max_length is not None and self.measure is None:
            raise ValueError(f"`max_length`={self.max_length} needs `measure`, which counts the tokens of a row.")

    def __call__(self, index: int, read: Callable[[], dict | Example]) -> Example | None:
        """
        Args:
            index (`int`): The row's number in its source.
            read (`Callable`): Returns the row.

        Returns:
            [`Example`] or `None`: `None` for a row that is to be skipped, which is logged.

        Raises:
            BadRowError: If the row cannot be used and its policy is `"error"`.
        """
        try:
            example = to_example(read(), self.image_folder)
            self._refuse_tokens(example)
            self._refuse_length(example)
            return example
        except (BadRowError, UnicodeDecodeError) as error:
            policy = self.on_long_row if isinstance(error, LongRowError) else self.on_bad_row
            reason = f"{self.source}, row {index}: {error}."
            if policy != "skip":
                raise BadRowError(reason) from None
            logger.warning(f"Skipped {reason}")
            return None

    def _refuse_tokens(self, example: Example) -> None:
        parts = (part for dialog in example.dialogs for message in dialog for part in message["content"])
        for part in parts:
            for token in self.special_tokens:
                if token in part.get("text", ""):
                    raise BadRowError(f"its text contains {token!r}, which has a meaning of its own to the model")

    def _refuse_length(self, example: Example) -> None:
        if self.max_length is None:
            return
        needed, uncuttable = self.measure(example)
        if self.on_long_row == "truncate" and uncuttable > self.max_length:
            raise BadRowError(
                f"it needs {uncuttable} tokens up to its last image and its first answer token, but `max_length` is "
                f"{self.max_length}: truncation never cuts an image, so raise `max_length` to {uncuttable} or use fewer "
                "vision tokens"
            )
        if self.on_long_row != "truncate" and needed > self.max_length:
            raise LongRowError(
                f"it needs {needed} tokens, but `max_length` is {self.max_length}: raise `max_length` to {needed}, use "
                "fewer vision tokens, or choose `on_long_row` 'skip' or 'truncate'"
            )


def keep_encoded(dataset):
    """The `datasets.Dataset` or `datasets.IterableDataset` with its images, however nested, left encoded."""
    for name, feature in (dataset.features or {}).items():
        encoded = _encoded(feature)
        if encoded != feature:
            dataset = dataset.cast_column(name, encoded)
    return dataset


def _encoded(feature):
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return replace(feature, feature=_encoded(feature.feature))
    if isinstance(feature, dict):
        return {name: _encoded(value) for name, value in feature.items()}
    return feature


class Rows:
    """
    Rows of one source as the collator takes them.

    Args:
        dataset (`datasets.Dataset` or `Sequence[dict]`): The rows; images are left encoded until they are needed.
        source (`str`): What to call it in errors.
        image_folder (`str`, *optional*): Where relative image paths start.
        on_bad_row (`str`, *optional*, defaults to `"error"`): `"error"` or `"skip"`.
        special_tokens (`Sequence[str]`, *optional*): What texts must not contain, since it would end or place things.
        max_length (`int`, *optional*): The longest row, in tokens. By default rows may be of any length.
        on_long_row (`str`, *optional*, defaults to `"error"`): `"error"`, `"skip"` or `"truncate"`.
        measure (`Callable`, *optional*): Counts a row's tokens as [`RowChecker`] says. Needed with `max_length`.
        check_rows (`str`, *optional*, defaults to `"first"`):
            `"first"` checks every row now and leaves unusable ones out; `"lazily"` checks a row when it is read, and
            reads the next usable one in place of one that is to be skipped.

    Attributes:
        num_skipped (`int`): The rows left out while checking first.

    Raises:
        BadRowError: If a row cannot be used and its policy is `"error"`, or no row can.
    """

    def __init__(
        self,
        dataset: datasets.Dataset | Sequence[dict],
        source: str,
        image_folder: str | Path | None = None,
        on_bad_row: str = "error",
        special_tokens: Sequence[str] = (),
        max_length: int | None = None,
        on_long_row: str = "error",
        measure: Callable[[Example], tuple[int, int]] | None = None,
        check_rows: str = "first",
    ):
        check_choice("check_rows", check_rows, CHECK_TIMES)
        check = RowChecker(source, image_folder, on_bad_row, special_tokens, max_length, on_long_row, measure)
        self.dataset = keep_encoded(dataset) if isinstance(dataset, datasets.Dataset) else dataset
        self.source = source
        self.image_folder = image_folder
        self._check = check if check_rows == "lazily" else None
        self._usable = range(len(dataset))
        if check_rows == "first":
            usable = [i for i in self._usable if check(i, partial(self.dataset.__getitem__, i)) is not None]
            self._usable = np.array(usable, dtype=np.int64)
        if not len(self._usable):
            raise BadRowError(f"{source} has no usable rows.")
        self.num_skipped = len(dataset) - len(self._usable)
        if self.num_skipped:
            logger.warning(f"Skipped {self.num_skipped} of {len(dataset)} rows of {source}.")

    def __len__(self) -> int:
        return len(self._usable)

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]
        if self._check is None:
            return to_example(self.dataset[int(self._usable[index])], self.image_folder)
        for skipped in range(len(self)):
            place = (index + skipped) % len(self)
            example = self._check(place, partial(self.dataset.__getitem__, place))
            if example is not None:
                return replace(example, skipped=skipped)
        raise BadRowError(f"{self.source} has no usable rows.")


def check_weights(weights: Sequence[float], num_parts: int) -> list[Fraction]:
    """
    Normalises one weight per data set.

    Raises:
        ValueError: If their number is wrong or one is not a positive number.
    """
    if len(weights) != num_parts:
        raise ValueError(f"`dataset_weights` has {len(weights)} weights for {num_parts} data sets: give one for each.")
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"`dataset_weights` holds {weight}: weights are above 0; leave out what is not wanted.")
    exact = [Fraction(str(float(weight))) for weight in weights]
    return [weight / sum(exact) for weight in exact]


class MixedRows:
    """
    Several data sets as one. Without weights they stand behind each other. With weights each data set's share of the
    rows is its weight to within one row, and every row of every set is there at least once: the sets that are small
    for their weight repeat.

    Args:
        parts (`Sequence[Rows]`): The data sets.
        weights (`Sequence[float]`, *optional*): One weight per data set, on any scale.

    Attributes:
        num_skipped (`int`): The rows left out of all parts while checking them first.

    Example:

    ```python
    >>> from tokenflex.data.rows import MixedRows

    >>> list(MixedRows(["abcd", "xyz"], weights=[1, 2]))
    ['a', 'b', 'c', 'd', 'x', 'y', 'z', 'x', 'y', 'z', 'x', 'y']
    ```
    """

    def __init__(self, parts: Sequence, weights: Sequence[float] | None = None):
        self.parts = list(parts)
        sizes = [len(part) for part in self.parts]
        if weights is not None:
            shares = check_weights(weights, len(sizes))
            total = max(math.ceil(size / share) for size, share in zip(sizes, shares))
            sizes = [math.floor(total * share) for share in shares]
            # What rounding down left over goes where most was lost.
            by_loss = sorted(range(len(sizes)), key=lambda part: sizes[part] - total * shares[part])
            for part in by_loss[: total - sum(sizes)]:
                sizes[part] += 1
        self._ends = list(accumulate(sizes))

    @property
    def num_skipped(self) -> int:
        return sum(part.num_skipped for part in self.parts)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int):
        index = range(len(self))[index]
        part = bisect_right(self._ends, index)
        row = index - (self._ends[part - 1] if part else 0)
        return self.parts[part][row % len(self.parts[part])]
