"""The option that a reply to a multiple-choice question chooses."""

import re
import string
import unicodedata
from collections.abc import Iterator, Sequence

from .answers import normalize


_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
_LEAD = re.compile(
    r"\b(?:answer|(?:option|choice)(?=\s+is\b)|(?:choose|select|pick)(?=\s))(?:\s+is\b)?[\s:*]*"
    r"|答案(?:应该)?(?:是|为|选)?[\s:*]*|(?<!不)选(?:择)?(?!项)[\s:*]*",
    re.IGNORECASE,
)
_NAMED = r"(?:(?:[Oo]ption|[Cc]hoice|选项)\s*)?"
_ALONE = re.compile(rf"\W*{_NAMED}([A-Za-z])\W*")
# "A lion" begins with no option's letter, nor does "I think".
_LETTER = r"(?![AI]\s+(?!(?:and|or|because|since|as|is)\b)[^\W\d_])[A-Z](?![A-Za-z0-9])"
_LISTED = re.compile(rf"{_NAMED}\W*{_LETTER}(?:\s*(?:,|/|&|、|\band\b|\bor\b|或|和|还是)\W*{_LETTER})*")
_MARKED = re.compile(
    r"(?<!\w)\(([A-Za-z])\)|^\W*([A-Za-z])[.):、](?![A-Za-z0-9])"
    r"|(?:\b[Oo]ption\s|\b[Cc]hoice\s|选项)\s*([A-Z])(?![A-Za-z0-9])",
    re.MULTILINE,
)


def find_choice(reply: str, options: Sequence[str] | None = None) -> int | None:
    """
    The option that a reply to a multiple-choice question chooses. A reply states its choice by

    - a line that is nothing but a letter: "B", "b", "(B)", "**B.**", "Option B";
    - the same in `\\boxed{}`, or after "answer", "answer is", "option is", "choose", "答案是" or "选"; behind these
      words one or several capital letters to begin with are enough: "The answer is B because ...", "answer: A or B";
    - an option's text, compared as [`exact_match`] does, in one of these places, or behind its letter: "B red".

    Only if it states none, a letter in parentheses, after "option", or at the beginning of a line and followed by ".",
    ")" or ":" counts: "B. a dog", "it is (B)". Reasoning up to `</think>` is not read. Full-width letters and signs
    are those they stand for (NFKC); letters of other scripts that look like Latin ones are not. A reply that points to
    no option, or to several, chooses none. Negations are not understood.

    Args:
        reply (`str`): Answer of the model.
        options (`Sequence[str]`, *optional*):
            The options' texts, from A on. Letters beyond them point to nothing. Without them any letter is an option.

    Returns:
        `int`: Index of the option, 0 for A, or `None`.

    Example:

    ```python
    >>> from tokenflex.evaluation.choices import find_choice

    >>> find_choice("The answer is (B).")
    1
    >>> find_choice("A dog.", options=["a cat", "a dog"])
    1
    >>> find_choice("A or B") is None
    True
    ```
    """
    letters = option_letters(options)
    if not isinstance(reply, str):
        raise ValueError(f"`reply`={reply!r}: a string, such as {str(reply)!r}.")
    reply = unicodedata.normalize("NFKC", reply.rpartition("</think>")[2].partition("<think>")[0])
    texts = [normalize(unicodedata.normalize("NFKC", option)) for option in options or []]
    found = set()
    for statement, is_led in _statements(reply):
        text = normalize(statement)
        found.update(
            letter
            for letter, option in zip(letters, texts)
            if text and (text == option or _joins(text, letter, option))
        )
        if alone := _ALONE.fullmatch(statement):
            found.add(alone[1].upper())
        if is_led and (listed := _LISTED.match(statement)):
            found.update(re.findall(r"(?<![A-Za-z])[A-Z](?![A-Za-z0-9])", listed[0]))
    found &= set(letters)
    found = found or {letter.upper() for marks in _MARKED.findall(reply) for letter in marks if letter} & set(letters)
    return letters.index(found.pop()) if len(found) == 1 else None


def option_letters(options: Sequence[str] | None) -> str:
    """
    The letters of options, from A on.

    Args:
        options (`Sequence[str]`, *optional*): The options' texts; if they are not known, it is all letters.

    Raises:
        ValueError: If they are no list of 1 to 26 strings.
    """
    if options is None:
        return string.ascii_uppercase
    if isinstance(options, str) or not 1 <= len(options) <= 26 or not all(isinstance(text, str) for text in options):
        raise ValueError(f"`options`={options!r}: a list of 1 to 26 strings, or `None` if they are not known.")
    return string.ascii_uppercase[: len(options)]


def _statements(reply: str) -> Iterator[tuple[str, bool]]:
    """The places that may state a choice, and for each if words that announce one stand before it."""
    for line in (reply, *reply.splitlines()):
        yield line, False
    for boxed in _BOXED.findall(reply):
        yield boxed, False
        yield re.sub(r"\\[A-Za-z]+|[{}]", " ", boxed), False
    for led in _LEAD.split(reply)[1:]:
        yield led, True
        yield led.partition("\n")[0], True


def _joins(text: str, letter: str, option: str) -> bool:
    """Tells if a text is an option's letter and text with no other word between."""
    return bool(option) and re.fullmatch(rf"\W*{letter.lower()}\W+{re.escape(option)}", text) is not None
