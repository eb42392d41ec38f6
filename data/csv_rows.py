"""CSV and TSV read row by row, as text: no cell is taken for a number, a truth value or a missing one."""

import csv
from array import array
from collections.abc import Iterator
from pathlib import Path

from .cells import BadRowError
from .json_rows import BOM


DELIMITERS = {".csv": ",", ".tsv": "\t"}


class CsvRows:
    """
    The rows of a CSV or TSV file as a sequence of `dict`, of texts as they stand in the file; an empty cell is `None`.

    Only the rows' places are kept in memory, and no file is left open, so that processes can share it.

    Args:
        path (`str` or `Path`): The file, which begins with the columns' names. Quotes are as in RFC 4180.

    Raises:
        ValueError: If the file holds no rows, or two columns of one name.
        BadRowError: On reading a row, if it has more or fewer cells than there are columns, or a stray quote.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from tokenflex.data.csv_rows import CsvRows

    >>> path = Path(tempfile.mkdtemp()) / "rows.csv"
    >>> _ = path.write_text("question,answer\\nwhich room?,007\\nany?,NA\\n")
    >>> [row["answer"] for row in CsvRows(path)]
    ['007', 'NA']
    ```
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._delimiter = DELIMITERS[self.path.suffix]
        self._offsets = array("q")
        with open(self.path, "rb") as file:
            file.seek(len(BOM) if file.read(len(BOM)) == BOM else 0)
            try:
                self.columns = next(self._records(file, "utf-8"), [])
                offset = file.tell()
                # The bytes of commas, quotes and line breaks are no part of any other letter.
                for record in self._records(file, "latin-1", strict=False):
                    if record:
                        self._offsets.append(offset)
                    offset = file.tell()
            except (csv.Error, UnicodeDecodeError) as error:
                raise ValueError(f"{self.path} cannot be read as CSV ({error}).") from None
        repeated = sorted({name for name in self.columns if self.columns.count(name) > 1})
        if repeated:
            raise ValueError(f"{self.path} has several columns named {', '.join(map(repr, repeated))}: rename them.")
        if not len(self):
            raise ValueError(f"{self.path} is empty: it holds no rows.")

    def _records(self, file, encoding: str, strict: bool = True) -> Iterator[list[str]]:
        lines = (line.decode(encoding) for line in iter(file.readline, b""))
        return csv.reader(lines, delimiter=self._delimiter, strict=strict)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> dict[str, str | None]:
        with open(self.path, "rb") as file:
            file.seek(self._offsets[range(len(self))[index]])
            try:
                cells = next(self._records(file, "utf-8"))
            except csv.Error as error:
                raise BadRowError(f"it is not valid CSV ({error})") from None
        if len(cells) != len(self.columns):
            raise BadRowError(
                f"it has {len(cells)} cells, but the file has {len(self.columns)} columns: put a cell that holds a "
                f"{self._delimiter!r} in double quotes"
            )
        return {name: cell or None for name, cell in zip(self.columns, cells)}
