"""Rows that are known to be usable, or are checked when they are read, and mixtures of them."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import datasets
import numpy as np
from transformers.utils import logging

from .arguments import DataArguments, check_weights
from .cells import BadRowError
from .encoding import LongRowError, encode_row
from .examples import TEXT_COLUMNS, Example, to_example, unused_columns
from .synthetic import SyntheticVQA


logger = logging.get_logger(__name__)


@dataclass
class RowChecker:
    """
    Decides if a row can be used, by encoding it as training will, and names columns that are not used, each once.

    Args:
        source (`str`): The data set's name in errors.
        args ([`DataArguments`]): The policies for bad and long rows, and the longest row.
        image_folder (`str` or `Path`, *optional*): Where relative image paths start.
        processor ([`TokenFlexProcessor`], *optional*): The model's processor. Without it rows are only read.
        num_vision_tokens (`int`, *optional*): The largest count, at which rows are measured. Defaults to the
            processor's.

    Raises:
        ValueError: If there is a `max_length`, but no processor to measure with.
    """

    source: str
    args: DataArguments
    image_folder: str | Path | None = None
    processor: object | None = None
    num_vision_tokens: int | None = None

    def __post_init__(self):
        if self.args.max_length is not None and self.processor is None:
            raise ValueError(f"`max_length`={self.args.max_length} needs a `processor`, which counts a row's tokens.")
        self._named = set()

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
            row = read()
            example = self._example(row)
        except (BadRowError, UnicodeDecodeError) as error:
            policy = self.args.on_long_row if isinstance(error, LongRowError) else self.args.on_bad_row
            reason = f"{self.source}, row {index}: {error}."
            if policy != "skip":
                raise BadRowError(reason) from None
            logger.warning(f"Skipped {reason}")
            return None
        self._name_unused(row)
        return example

    def _example(self, row: dict | Example) -> Example:
        if self.processor is None:
            return to_example(row, self.image_folder)
        truncate = self.args.on_long_row == "truncate"
        limits = (self.num_vision_tokens, self.args.max_length, truncate)
        return encode_row(row, self.processor, self.image_folder, *limits).example

    def _name_unused(self, row: dict | Example) -> None:
        new = [name for name in unused_columns(row) if name not in self._named]
        if new:
            self._named.update(new)
            logger.warning(f"{self.source}: columns that are not used: {', '.join(map(repr, new))}.")


def keep_encoded(dataset):
    """
    The `datasets.Dataset` or `datasets.IterableDataset` with its images, however nested, left encoded, and its answers
    as they are written: 0.1 in 32 bits is not 0.10000000149011612.

    Raises:
        ValueError: If answers are the numbers of labels.
    """
    for name, feature in (dataset.features or {}).items():
        encoded = _encoded(feature)
        if encoded != feature:
            dataset = dataset.cast_column(name, encoded)
    for name in set(TEXT_COLUMNS).intersection(dataset.features or ()):
        leaf, wide = dataset.features[name], datasets.Value("float64")
        while isinstance(leaf, (datasets.List, datasets.LargeList)):
            leaf, wide = leaf.feature, datasets.List(wide)
        if isinstance(leaf, datasets.ClassLabel):
            raise ValueError(
                f"The column {name!r} holds the numbers of the labels {leaf.names}: store the labels' names, which "
                "`ClassLabel.int2str` gives."
            )
        if leaf in (datasets.Value("float16"), datasets.Value("float32")):
            widen = partial(_widen, name, np.dtype(leaf.dtype).type)
            features = datasets.Features({**dataset.features, name: wide})
            dataset = dataset.map(widen, input_columns=name, features=features)
    return dataset


def _encoded(feature):
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return replace(feature, feature=_encoded(feature.feature))
    if isinstance(feature, dict):
        return {name: _encoded(value) for name, value in feature.items()}
    return feature


def _widen(name: str, kind: type, cell) -> dict:
    def widened(value):
        if isinstance(value, list):
            return [widened(member) for member in value]
        return value if value is None else float(str(kind(value)))

    return {name: widened(cell)}


class Rows:
    """
    Rows of one source as the collator takes them. With `check_rows="first"` every row is checked now and unusable ones
    are left out; `"lazily"`, and always for images that are drawn on the spot, a row is checked when it is read, and
    the next usable one is read in place of one that is to be skipped.

    Args:
        dataset (`datasets.Dataset` or `Sequence[dict]`): The rows; images are left encoded until they are needed.
        check ([`RowChecker`]): The checker of the rows, with its arguments.

    Attributes:
        num_skipped (`int`): The rows left out while checking first.

    Raises:
        BadRowError: If a row cannot be used and its policy is `"error"`, or no row can.
    """

    def __init__(self, dataset: datasets.Dataset | Sequence[dict], check: RowChecker):
        self.dataset = keep_encoded(dataset) if isinstance(dataset, datasets.Dataset) else dataset
        self.check = check
        self.is_lazy = check.args.check_rows == "lazily" or isinstance(dataset, SyntheticVQA)
        self._usable = range(len(dataset))
        if not self.is_lazy:
            usable = [i for i in self._usable if check(i, partial(self.dataset.__getitem__, i)) is not None]
            self._usable = np.array(usable, dtype=np.int64)
        if not len(self._usable):
            raise BadRowError(f"{check.source} has no usable rows.")
        self.num_skipped = len(dataset) - len(self._usable)
        if self.num_skipped:
            logger.warning(f"Skipped {self.num_skipped} of {len(dataset)} rows of {check.source}.")

    def __len__(self) -> int:
        return len(self._usable)

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]
        if not self.is_lazy:
            return to_example(self.dataset[int(self._usable[index])], self.check.image_folder)
        for skipped in range(len(self)):
            place = (index + skipped) % len(self)
            example = self.check(place, partial(self.dataset.__getitem__, place))
            if example is not None:
                return replace(example, skipped=skipped)
        raise BadRowError(f"{self.check.source} has no usable rows.")


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
