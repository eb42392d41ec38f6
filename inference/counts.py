"""Vision-token counts as command lines, requests and JSON files write them."""

import re
import reprlib

from ..configuration_tokenflex import NAMED_COUNTS


def parse_num_vision_tokens(text: str | int | list | tuple | None):
    """
    Reads a vision-token count as a command line, a request or a JSON file writes it.

    Args:
        text (`str`, `int`, `list` or `tuple`, *optional*):
            `"64"`, `"8x12"` (rows x columns), `"low"`, `"high"`, `"auto"`, several of them with commas between, or
            what is no text: a number, or a list with one entry per image.

    Returns:
        `int`, `tuple[int, int]`, `str`, a list of these or `None`: A count, a grid, a name, or one of them per image.

    Raises:
        ValueError: If it is none of these.

    Example:

    ```python
    >>> from tokenflex.inference.counts import parse_num_vision_tokens

    >>> [parse_num_vision_tokens(text) for text in ("64", "8x12", "low", "64,8x12", [64, "8x12"])]
    [64, (8, 12), 'low', [64, (8, 12)], [64, (8, 12)]]
    ```
    """
    if isinstance(text, str) and "," in text:
        text = [part.strip() for part in text.split(",")]
    if isinstance(text, list):
        parsed = [None if isinstance(part, list) else parse_num_vision_tokens(part) for part in text]
        if not any(isinstance(part, (str, list)) or part is None for part in parsed):
            return parsed
    elif isinstance(text, str):
        if text in NAMED_COUNTS:
            return text
        if match := re.fullmatch(r"\s*(\d+)(?:\s*x\s*(\d+))?\s*", text):
            return (int(match[1]), int(match[2])) if match[2] else int(match[1])
    elif text is None or (isinstance(text, (int, tuple)) and not isinstance(text, bool)):
        return text
    raise ValueError(
        f"`num_vision_tokens`={reprlib.repr(text)}: give a count such as 64, a grid such as 8x12, a list with one of "
        f"these per image, or one of {', '.join(NAMED_COUNTS)}."
    )
