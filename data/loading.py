"""Data sets from files, folders and the Hub, alone or mixed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .examples import Example
from .rows import (
    BAD_ROW_POLICIES,
    CHECK_TIMES,
    LONG_ROW_POLICIES,
    MixedRows,
    RowChecker,
    Rows,
    check_choice,
    check_weights,
)
from .sources import open_rows
from .streaming import StreamedRows
from .synthetic import SyntheticVQA


@dataclass
class SourceArguments:
    """Which rows to read, for commands that read them once."""

    dataset: list[str] = field(
        metadata={
            "help": "One or several data sets: parquet, JSON, JSONL or CSV files, folders in the Hub's layout or written "
            "by `save_to_disk`, Hub ids, or `synthetic:N` for N images that the project draws itself."
        }
    )
    dataset_split: str = field(default="train", metadata={"help": "The split of Hub data sets and folders."})
    image_folder: str | None = field(
        default=None, metadata={"help": "Where relative image paths start. Default: each data file's folder."}
    )
    on_bad_row: str = field(
        default="error",
        metadata={
            "help": "`error` stops at a row that cannot be used, naming file, row and reason; `skip` leaves such rows out "
            "and says how many.",
            "choices": list(BAD_ROW_POLICIES),
        },
    )


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
            "help": "`first` checks every row, with its images, before the first step; `lazily` checks a row when it is "
            "read, as is always done with streamed and synthetic rows.",
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


def load_rows(
    dataset: str | Sequence[str],
    dataset_split: str = "train",
    image_folder: str | None = None,
    on_bad_row: str = "error",
    special_tokens: Sequence[str] = (),
    dataset_weights: Sequence[float] | None = None,
    max_length: int | None = None,
    on_long_row: str = "error",
    check_rows: str = "first",
    streaming: bool = False,
    shuffle_buffer: int = 1000,
    seed: int = 0,
    measure: Callable[[Example], tuple[int, int]] | None = None,
    endless: bool = False,
) -> Rows | MixedRows | StreamedRows:
    """
    Loads and checks one data set or a mixture.

    Args:
        dataset (`str` or `Sequence[str]`):
            Parquet, JSON, JSONL or CSV files, folders in the Hub's layout or written by `save_to_disk`, ids of data sets
            on the Hub, or `synthetic:N` for N images that the project draws itself.
        dataset_split (`str`, *optional*, defaults to `"train"`): The split of Hub data sets and folders.
        image_folder (`str`, *optional*): Where relative image paths start. Defaults to each file's folder.
        on_bad_row (`str`, *optional*, defaults to `"error"`):
            `"error"` stops at the first row that cannot be used; `"skip"` leaves such rows out and says how many.
        special_tokens (`Sequence[str]`, *optional*):
            The tokenizer's special tokens, which questions and answers must not contain.
        dataset_weights (`Sequence[float]`, *optional*):
            Each data set's share of the rows, on any scale. By default each row is there once.
        max_length (`int`, *optional*): The longest row, in tokens. By default rows may be of any length.
        on_long_row (`str`, *optional*, defaults to `"error"`):
            `"error"` stops at a longer row, `"skip"` leaves it out, `"truncate"` keeps it for the collator to cut.
        check_rows (`str`, *optional*, defaults to `"first"`):
            `"first"` checks every row now; `"lazily"` when it is read, as is always done with streamed and synthetic
            rows.
        streaming (`bool`, *optional*, defaults to `False`): Whether to read rows one after the other.
        shuffle_buffer (`int`, *optional*, defaults to 1000):
            From how many rows a streamed row is drawn; 0 keeps their order.
        seed (`int`, *optional*, defaults to 0): The seed of synthetic images and of the order of streamed rows.
        measure (`Callable`, *optional*): Counts a row's tokens as [`RowChecker`] says. Needed with `max_length`.
        endless (`bool`, *optional*, defaults to `False`): Whether streamed rows begin anew when they end.

    Returns:
        [`Rows`], [`MixedRows`] of several data sets, or [`StreamedRows`]

    Raises:
        ValueError: If a file is missing, unreadable or of an unknown kind, or arguments do not fit each other.
        BadRowError: If a row cannot be used; the message names data set, row and reason.

    Example:

    ```python
    >>> from tokenflex.data.loading import load_rows

    >>> len(load_rows(["synthetic:3", "synthetic:1"], dataset_weights=[0.5, 0.5]))
    6
    ```
    """
    check_choice("check_rows", check_rows, CHECK_TIMES)
    names = [dataset] if isinstance(dataset, str) else list(dataset)
    if not names:
        raise ValueError("`dataset` is empty: name at least one data set.")
    if dataset_weights is not None:
        check_weights(dataset_weights, len(names))
    options = {
        "on_bad_row": on_bad_row,
        "special_tokens": special_tokens,
        "max_length": max_length,
        "on_long_row": on_long_row,
        "measure": measure,
    }
    sources = []
    for name in names:
        rows, folder = open_rows(name, dataset_split, streaming, seed)
        folder = image_folder or folder
        if streaming:
            sources.append((rows, RowChecker(name, folder, **options)))
        else:
            when = "lazily" if isinstance(rows, SyntheticVQA) else check_rows
            sources.append(Rows(rows, name, folder, check_rows=when, **options))
    if streaming:
        return StreamedRows(sources, dataset_weights, shuffle_buffer, seed, endless)
    return sources[0] if len(sources) == 1 else MixedRows(sources, dataset_weights)
