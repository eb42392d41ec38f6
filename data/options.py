"""The options of multiple-choice questions: read, put behind the question, and found for an answer."""

import ast
import re
import string
from collections.abc import Sequence

from .cells import BadRowError, as_text, is_missing


INSTRUCTION = "Answer with the option's letter from the given choices directly."
_LETTER = re.compile(r"\(?([A-Z])\)?[.:)]?", re.IGNORECASE)


def read_options(value) -> list[str]:
    """
    The texts of a question's options.

    Args:
        value (`Sequence` or `str`, *optional*): A list, or a text that holds one, as in MMMU. Without any the question
            is not multiple-choice.

    Raises:
        BadRowError: If it is something else, or there are more options than letters.

    Example:

    ```python
    >>> from tokenflex.data.options import read_options

    >>> read_options("['red', '1.50']"), read_options([1, 2]), read_options(None)
    (['red', '1.50'], ['1', '2'], [])
    ```
    """
    listed = _listed(value) if isinstance(value, str) else value
    if is_missing(listed):
        return []
    if not isinstance(listed, (list, tuple)):
        raise BadRowError(f"its options are {value!r}: a list of texts, or a text that holds one, is expected")
    if len(listed) > len(string.ascii_uppercase):
        raise BadRowError(f"it has {len(listed)} options: there are letters for {len(string.ascii_uppercase)}")
    return [as_text("option", option) for option in listed]


def _listed(text: str) -> list[str] | str | None:
    """The members of a Python or JSON list, those that are no strings as they are written."""
    if not text.strip():
        return None
    try:
        body = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return text
    if not isinstance(body, ast.List):
        return text
    return [
        member.value
        if isinstance(member, ast.Constant) and isinstance(member.value, str)
        else ast.get_source_segment(text.strip(), member)
        for member in body.elts
    ]


def ask_with_options(question: str, options: Sequence[str]) -> str:
    """
    The question as the common harnesses ask it: a line for each option, with its letter, and the wish for a letter.

    Args:
        question (`str`): The question.
        options (`Sequence[str]`): The options' texts.

    Example:

    ```python
    >>> from tokenflex.data.options import ask_with_options

    >>> print(ask_with_options("Which color?", ["red", "blue"]))
    Which color?
    A. red
    B. blue
    Answer with the option's letter from the given choices directly.
    ```
    """
    lines = [f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options)]
    return "\n".join([question, *lines, INSTRUCTION])


def find_letter(answer, options: Sequence) -> str:
    """
    The letter of the option that an answer means.

    Args:
        answer (`str` or `int`): The option's text or letter, or its index, counted from 0. What may be an option's
            text is no index, unless it is a number among texts.
        options (`Sequence`): The options.

    Raises:
        BadRowError: If it means none of the options, or several.

    Example:

    ```python
    >>> from tokenflex.data.options import find_letter

    >>> [find_letter(answer, ["red", "blue"]) for answer in ("blue", "B", "(b)", 1, "1")]
    ['B', 'B', 'B', 'B', 'B']
    >>> find_letter("1", ["0", "2", "1"])
    'C'
    ```
    """
    texts, text = read_options(options), as_text("answer", answer).strip()
    of_letter = dict(zip(string.ascii_uppercase, texts))
    meant = {letter for letter, option in of_letter.items() if option.strip() == text}
    meant = meant or {letter for letter, option in of_letter.items() if option.strip().casefold() == text.casefold()}
    if (letter := _LETTER.fullmatch(text)) and letter[1].upper() in of_letter:
        meant.add(letter[1].upper())
    is_number_among_texts = not isinstance(answer, str) and any(isinstance(option, str) for option in options)
    if not meant or is_number_among_texts:
        meant.update(letter for index, letter in enumerate(of_letter) if str(index) == text)
    if not meant:
        raise BadRowError(
            f"its answer {answer!r} is none of the options {texts}, nor a letter from A to {max(of_letter)}, nor "
            f"an index from 0 to {len(texts) - 1}"
        )
    if len(meant) > 1:
        raise BadRowError(
            f"its answer {answer!r} may mean the options {' and '.join(sorted(meant))} of {texts}: give a letter, and "
            "options that are no letters themselves"
        )
    return meant.pop()
