"""Data sets from files and from the Hub, every row checked before the first step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from transformers.utils import logging

from .data import BadRowError, Example, to_example


logger = logging.get_logger(__name__)

LOADERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


@dataclass
class DataArguments:
    dataset: str = field(metadata={"help": "A parquet, JSON, JSONL or CSV file, or a Hub id."})
    dataset_split: str = field(default="train", metadata={"help": "The split of a Hub data set."})
    image_folder: str | None = field(
        default=None, metadata={"help": "Where relative image paths start. Default: the data file's folder."}
    )
    on_bad_row: str = field(
        default="error",
        metadata={
            "help": "`error` stops at a row without image or answer, naming file, row and reason; `skip` leaves such "
            "rows out and says how many.",
            "choices": ["error", "skip"],
        },
    )


def _refuse_tokens(example: Example, special_tokens: Sequence[str]) -> None:
    texts = (part.get("text", "") for dialog in example.dialogs for message in dialog for part in message["content"])
    for text in texts:
        for token in special_tokens:
            if token in text:
                raise BadRowError(f"its text contains {token!r}, which has a meaning of its own to the model")


class Rows:
    """
    Rows that are all known to be usable, as the collator takes them.

    Args:
        dataset (`datasets.Dataset`): The rows; images are left encoded until they are needed.
        source (`str`): What to call it in errors.
        image_folder (`str`, *optional*): Where relative image paths start.
        on_bad_row (`str`, *optional*, defaults to `"error"`): `"error"` or `"skip"`.
        special_tokens (`Sequence[str]`, *optional*): What texts must not contain, since it would end or place things.

    Raises:
        BadRowError: If a row cannot be used and `on_bad_row` is `"error"`, or no row can.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        source: str,
        image_folder: str | None = None,
        on_bad_row: str = "error",
        special_tokens: Sequence[str] = (),
    ):
        if on_bad_row not in ("error", "skip"):
            raise ValueError(f"`on_bad_row`={on_bad_row!r}: use 'error' or 'skip'.")
        for name, feature in dataset.features.items():
            if isinstance(feature, datasets.Image):
                dataset = dataset.cast_column(name, datasets.Image(decode=False))
            elif isinstance(getattr(feature, "feature", None), datasets.Image):
                dataset = dataset.cast_column(name, datasets.List(datasets.Image(decode=False)))
        self.image_folder = image_folder
        self.source = source
        bad = []
        for index, row in enumerate(dataset):
            try:
                _refuse_tokens(to_example(row, image_folder), special_tokens)
            except BadRowError as error:
                if on_bad_row == "error":
                    raise BadRowError(f"{source}, row {index}: {error}.") from None
                bad.append(index)
                logger.warning(f"Skipped {source}, row {index}: {error}.")
        if bad:
            logger.warning(f"Skipped {len(bad)} of {len(dataset)} rows of {source}.")
            unusable = set(bad)
            dataset = dataset.select([index for index in range(len(dataset)) if index not in unusable])
        if not len(dataset):
            raise BadRowError(f"{source} has no usable rows.")
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        return to_example(self.dataset[index], self.image_folder)


def load_rows(
    dataset: str,
    dataset_split: str = "train",
    image_folder: str | None = None,
    on_bad_row: str = "error",
    special_tokens: Sequence[str] = (),
) -> Rows:
    """
    Loads and checks a data set.

    Args:
        dataset (`str`): A parquet, JSON, JSONL or CSV file, or the id of a data set on the Hub.
        dataset_split (`str`, *optional*, defaults to `"train"`): The split of a Hub data set.
        image_folder (`str`, *optional*): Where relative image paths start. Defaults to the file's folder.
        on_bad_row (`str`, *optional*, defaults to `"error"`):
            `"error"` stops at the first row that cannot be used; `"skip"` leaves such rows out and says how many.
        special_tokens (`Sequence[str]`, *optional*):
            The tokenizer's special tokens, which questions and answers must not contain.

    Returns:
        [`Rows`]

    Raises:
        ValueError: If a file is missing or of an unknown kind.
        BadRowError: If a row cannot be used; the message names file, row and reason.
    """
    path = Path(dataset)
    if path.is_dir():
        raise ValueError(f"`dataset`={dataset!r} is a folder: name the file in it.")
    if path.is_file() or path.suffix in LOADERS:
        if not path.is_file():
            raise ValueError(f"`dataset`={dataset!r}: there is no such file.")
        if path.suffix not in LOADERS:
            raise ValueError(f"`dataset`={dataset!r}: use a file ending in {', '.join(LOADERS)} or a Hub id.")
        try:
            loaded = datasets.load_dataset(LOADERS[path.suffix], data_files=str(path), split="train")
        except Exception as error:  # each file format's reader raises its own
            raise ValueError(f"`dataset`={dataset!r} cannot be read: {error.__cause__ or error!r}") from error
        return Rows(loaded, path.name, image_folder or str(path.parent), on_bad_row, special_tokens)
    return Rows(datasets.load_dataset(dataset, split=dataset_split), dataset, image_folder, on_bad_row, special_tokens)
