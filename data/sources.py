"""A data set's rows by its name: a file, a folder, a Hub id, `synthetic:N` or `synthetic:N@SEED`."""

import re
from collections.abc import Sequence
from pathlib import Path

import datasets

from .json_rows import JsonRows
from .synthetic import SyntheticVQA


LOADERS = {".parquet": "parquet", ".csv": "csv"}
SUFFIXES = (*LOADERS, ".json", ".jsonl")
SYNTHETIC = "synthetic:"
HUB_ID = r"\w[\w.-]*(/\w[\w.-]*)?"


def open_rows(
    name: str, split: str = "train", streaming: bool = False, seed: int = 0
) -> tuple[datasets.Dataset | datasets.IterableDataset | Sequence[dict], Path | None]:
    """
    Args:
        name (`str`):
            A parquet, JSON, JSONL or CSV file, a folder in the Hub's layout or written by `save_to_disk`, the id of a
            data set on the Hub, or `synthetic:N` for N images that the project draws itself, `synthetic:N@SEED` for
            those of a seed of their own.
        split (`str`, *optional*, defaults to `"train"`): The split of a Hub data set or a folder.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read what `datasets` loads one row after the other. JSON and saved data sets are read row by row
            in any case.
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
        if path.suffix not in LOADERS:
            return JsonRows(path), path.parent
        return _load(name, streaming, LOADERS[path.suffix], data_files=name, split="train"), path.parent
    if path.is_file():
        raise ValueError(f"`dataset`={name!r}: use a file ending in {', '.join(SUFFIXES)}, a folder or a Hub id.")
    if not re.fullmatch(HUB_ID, name):
        raise ValueError(f"`dataset`={name!r}: there is no such file or folder, and it is not a Hub id.")
    return _load(name, streaming, name, split=split), None


def _open_folder(name: str, split: str, streaming: bool):
    if not any(Path(name, written).is_file() for written in ("state.json", "dataset_dict.json")):
        return _load(name, streaming, name, split=split)
    loaded = datasets.load_from_disk(name)
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(f"`dataset_split`={split!r}: {name} has the splits {', '.join(loaded)}.")
        loaded = loaded[split]
    return loaded


def _load(name: str, streaming: bool, *args, **kwargs):
    try:
        return datasets.load_dataset(*args, **kwargs, streaming=streaming)
    except Exception as error:  # each file format's reader raises its own
        where = "" if Path(name).exists() else " from the Hub, and there is no such file or folder"
        raise ValueError(f"`dataset`={name!r} cannot be read{where}: {error.__cause__ or error!r}") from error
