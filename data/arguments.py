"""Which rows to read and how: options of the commands, passed on as they are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction


BAD_ROW_POLICIES = ("error", "skip")
LONG_ROW_POLICIES = ("error", "skip", "truncate")
CHECK_TIMES = ("first", "lazily")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}`={value!r}: use {' or '.join(map(repr, choices))}.")


def check_weights(weights: Sequence[float], num_parts: int) -> list[Fraction]:
    """
    Normalizes one weight per data set.

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


@dataclass
class SourceArguments:
    """Which rows to read, for commands that read them once."""

    dataset: list[str] = field(
        metadata={
            "help": "One or several data sets: parquet, JSON, JSONL, CSV or TSV files, folders in the Hub's layout or "
            "written by `save_to_disk`, Hub ids, or `synthetic:N` for N images that the project draws itself."
        }
    )
    dataset_split: str = field(default="train", metadata={"help": "The split of Hub data sets and folders."})
    image_folder: str | None = field(
        default=None, metadata={"help": "Where relative image paths start. Default: each data file's folder."}
    )
    on_bad_row: str = field(
        default="error",
        metadata={
            "help": "`error` stops at a row that cannot be used, naming file, row and reason; `skip` leaves such rows "
            "out and says how many.",
            "choices": list(BAD_ROW_POLICIES),
        },
    )

    def __post_init__(self):
        if isinstance(self.dataset, str) or not self.dataset:
            raise ValueError(f"`dataset`={self.dataset!r}: give a list of at least one data set.")
        _check_choice("on_bad_row", self.on_bad_row, BAD_ROW_POLICIES)


@dataclass
class DataArguments(SourceArguments):
    """Which rows to train on, and how."""

    dataset_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Each data set's share of the rows, on any scale; small sets repeat. Default: every row once."
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "The longest row, in tokens at the largest vision-token count. Default: no limit."},
    )
    on_long_row: str = field(
        default="error",
        metadata={
            "help": "What is done with a row of more than `max_length` tokens: `error` stops, `skip` leaves it out, "
            "`truncate` cuts its end, but never an image.",
            "choices": list(LONG_ROW_POLICIES),
        },
    )
    check_rows: str = field(
        default="first",
        metadata={
            "help": "`first` checks every row, with its images, before the first step; `lazily` checks a row when it "
            "is read, as is always done with streamed and synthetic rows.",
            "choices": list(CHECK_TIMES),
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Whether to read rows one after the other, for data too large to load."},
    )
    shuffle_buffer: int = field(
        default=1000,
        metadata={"help": "From how many rows a streamed row is drawn; 0 keeps their order."},
    )

    def __post_init__(self):
        super().__post_init__()
        _check_choice("on_long_row", self.on_long_row, LONG_ROW_POLICIES)
        _check_choice("check_rows", self.check_rows, CHECK_TIMES)
        if self.dataset_weights is not None:
            check_weights(self.dataset_weights, len(self.dataset))
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"`max_length`={self.max_length}: a row has at least one token.")
        if self.shuffle_buffer < 0:
            raise ValueError(
                f"`shuffle_buffer`={self.shuffle_buffer}: use a number of rows, or 0 to keep their order."
            )
