"""JSON and JSON Lines read row by row, so that columns may mix types and a broken line costs that line alone."""

import json
from array import array
from bisect import bisect_right
from pathlib import Path

import numpy as np

from .cells import BadRowError


BOM = b"\xef\xbb\xbf"


def _parse(content: bytes):
    return json.loads(content.decode(), parse_float=str)


def _what_is_wrong(error: Exception, place: str) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 at byte {error.start}"
    if isinstance(error, json.JSONDecodeError):
        return f"is not valid JSON at {place.format(error)} ({error.msg})"
    return f"cannot be parsed ({error})"


class JsonRows:
    """
    The objects of a JSON or JSON Lines file as a sequence of `dict`.

    Of JSON Lines only the lines' places are kept in memory, and no file is left open, so that processes can share it.
    A JSON array is held whole. A number with a point or an exponent is left as it is written, as text.

    Args:
        path (`str` or `Path`): The file. A `.json` that begins with `[` is an array, all else has one object per line.

    Raises:
        ValueError: If the file is empty, or is an array with an error in it.
        BadRowError: On reading a row, if its line is not a JSON object in UTF-8.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from tokenflex.data.json_rows import JsonRows

    >>> path = Path(tempfile.mkdtemp()) / "rows.jsonl"
    >>> _ = path.write_text('{"id": 1}\\n{"id": "b"}\\n')
    >>> list(JsonRows(path))
    [{'id': 1}, {'id': 'b'}]
    ```
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with open(self.path, "rb") as file:
            begin = len(BOM) if file.read(len(BOM)) == BOM else 0
            file.seek(begin)
            first = next((line for line in file if not line.isspace()), b"")
            self._array, self._offsets, self._blanks = None, np.empty(0, np.int64), []
            file.seek(begin)
            if self.path.suffix == ".json" and first.lstrip().startswith(b"["):
                self._array = self._read_array(file.read())
            else:
                self._find_lines(file, begin)
        if not len(self):
            raise ValueError(f"{self.path} is empty: it holds no rows.")

    def _read_array(self, content: bytes) -> list:
        try:
            return _parse(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{self.path} {_what_is_wrong(error, 'line {0.lineno}, column {0.colno}')}: correct it, or save it as "
                "JSON Lines, one object per line, of which a broken row can be skipped."
            ) from None

    def _find_lines(self, file, offset: int) -> None:
        offsets = array("q")
        for line in file:
            if line.isspace():
                self._blanks.append(len(offsets))
            else:
                offsets.append(offset)
            offset += len(line)
        self._offsets = np.array(offsets, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._offsets) if self._array is None else len(self._array)

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]
        if self._array is not None:
            return self._object(self._array[index], "it")
        with open(self.path, "rb") as file:
            file.seek(self._offsets[index])
            line = file.readline()
        name = f"line {1 + index + bisect_right(self._blanks, index)}"
        try:
            value = _parse(line)
        except (ValueError, RecursionError) as error:
            raise BadRowError(
                f"{name} {_what_is_wrong(error, 'column {0.colno}')}: each line has to be an object"
            ) from None
        return self._object(value, name)

    @staticmethod
    def _object(value, name: str) -> dict:
        if not isinstance(value, dict):
            raise BadRowError(f"{name} is a JSON {type(value).__name__}, not an object with named columns")
        return value
