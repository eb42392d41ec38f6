"""A data set's rows by its name: a file, a folder, a Hub id, `synthetic:N` or `synthetic:N@SEED`."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets

from .csv_rows import CsvRows
from .json_rows import JsonRows
from .rows import TEXT_COLUMNS, MixedRows
from .synthetic import SyntheticVQA


READERS = {".csv": CsvRows, ".tsv": CsvRows, ".json": JsonRows, ".jsonl": JsonRows}
SUFFIXES = (".parquet", *READERS)
METADATA = ("metadata.csv", "metadata.jsonl")
GUESSING = ("csv", "json", "imagefolder")  # builders of `datasets` that take text for what it may mean
SYNTHETIC = "synthetic:"
HUB_ID = r"\w[\w.-]*(/\w[\w.-]*)?"


def open_rows(
    name: str, split: str = "train", streaming: bool = False, seed: int = 0
) -> tuple[datasets.Dataset | datasets.IterableDataset | Sequence[dict], Path | None]:
    """
    Args:
        name (`str`):
            A parquet, JSON, JSONL, CSV or TSV file, a folder in the Hub's layout or written by `save_to_disk`, the id
            of a data set on the Hub, or `synthetic:N` for N images that the project draws itself, `synthetic:N@SEED`
            for those of a seed of their own.
        split (`str`, *optional*, defaults to `"train"`): The split of a Hub data set or a folder.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read what `datasets` loads one row after the other. JSON, CSV and saved data sets are read row
            by row in any case.
        seed (`int`, *optional*, defaults to 0): The seed of synthetic images whose name gives none.

    Returns:
        `tuple`: The rows, and the folder where their image paths start, if they have one.

    Raises:
        ValueError: If there is no such data set, or it is unreadable or of an unknown kind.

    Example:

    ```python
    >>> from tokenflex.data.sources import open_rows

    >>> rows, image_folder = open_rows("synthetic:3")
    >>> len(rows)
    3
    ```
    """
    path = Path(name)
    if name.startswith(SYNTHETIC):
        given = re.fullmatch(SYNTHETIC + r"0*([1-9]\d*)(?:@(\d+))?", name, re.ASCII)
        if given is None:
            raise ValueError(
                f"`dataset`={name!r}: give a number of images, as in 'synthetic:1000', and a seed if you like, as in "
                "'synthetic:1000@7'."
            )
        return SyntheticVQA(int(given[1]), seed if given[2] is None else int(given[2])), None
    if path.is_dir():
        return _open_folder(name, split, streaming), path
    if path.suffix in SUFFIXES:
        if not path.is_file():
            raise ValueError(f"`dataset`={name!r}: there is no such file.")
        if path.suffix in READERS:
            return READERS[path.suffix](path), path.parent
        return _load(name, streaming, "parquet", data_files=name, split="train"), path.parent
    if path.is_file():
        raise ValueError(f"`dataset`={name!r}: use a file ending in {', '.join(SUFFIXES)}, a folder or a Hub id.")
    if not re.fullmatch(HUB_ID, name):
        raise ValueError(f"`dataset`={name!r}: there is no such file or folder, and it is not a Hub id.")
    return _load(name, streaming, name, split=split), None


def _open_folder(name: str, split: str, streaming: bool):
    if not any(Path(name, written).is_file() for written in ("state.json", "dataset_dict.json")):
        return _open_text_files(name, split) or _load(name, streaming, name, split=split)
    loaded = datasets.load_from_disk(name)
    if isinstance(loaded, datasets.DatasetDict):
        _check_split(name, split, loaded)
        loaded = loaded[split]
    return loaded


def _check_split(name: str, split: str, splits) -> None:
    if split not in splits:
        raise ValueError(f"`dataset_split`={split!r}: {name} has the splits {', '.join(map(str, splits))}.")


def _open_text_files(name: str, split: str) -> MixedRows | None:
    """The rows of a folder's CSV and JSON files, if it has such: `datasets` would guess what their cells mean."""
    files = _named(name, datasets.load_dataset_builder, name).config.data_files
    files = {part: [Path(file) for file in paths] for part, paths in files.items()}
    metadata = {part: [path for path in paths if path.name in METADATA] for part, paths in files.items()}
    if any(metadata.values()):
        _check_split(name, split, files)
        return MixedRows([ImageFolderRows(path) for path in metadata[split]]) if metadata[split] else None
    if not all(path.suffix in READERS for paths in files.values() for path in paths):
        return None
    _check_split(name, split, files)
    return MixedRows([READERS[path.suffix](path) for path in files[split]])


class ImageFolderRows:
    """
    The rows of an image folder's `metadata.csv` or `metadata.jsonl`, whose `file_name` or `file_names` beside that
    file become `image` or `images`.

    Args:
        path (`str` or `Path`): The file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.rows = READERS[self.path.suffix](path)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = dict(self.rows[index])
        if isinstance(row.get("file_name"), str):
            row["image"] = str(self.path.parent / row.pop("file_name"))
        if isinstance(row.get("file_names"), list):
            row["images"] = [str(self.path.parent / str(file)) for file in row.pop("file_names")]
        return row


def _load(name: str, streaming: bool, *args, **kwargs):
    loaded = _named(name, datasets.load_dataset, *args, **kwargs, streaming=streaming)
    if loaded.info.builder_name in GUESSING:
        _refuse_guesses(name, loaded)
    return loaded


def _refuse_guesses(name: str, loaded: datasets.Dataset | datasets.IterableDataset) -> None:
    features = loaded.features or datasets.Dataset.from_list(list(loaded.take(1000))).features
    for column in set(TEXT_COLUMNS).intersection(features):
        guess = str(features[column])
        exact = "int" in guess and loaded.info.builder_name == "json"
        if "string" not in guess and not exact:
            raise ValueError(
                f"`dataset`={name!r}: its column {column!r} is text that `datasets` has taken for {guess}, so that "
                "007, 1.50 or NA are lost: download and unpack its files and name their folder."
            )


def _named(name: str, load: Callable, *args, **kwargs):
    try:
        return load(*args, **kwargs)
    except Exception as error:  # each file format's reader raises its own
        where = "" if Path(name).exists() else " from the Hub, and there is no such file or folder"
        raise ValueError(f"`dataset`={name!r} cannot be read{where}: {error.__cause__ or error!r}") from error
