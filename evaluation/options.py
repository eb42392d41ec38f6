"""The score of a reply to a question with options, whatever metric scores the other questions."""

import string
from collections.abc import Sequence

from .answers import normalize
from .choices import find_choice


def rate_option(prediction: str, answers: Sequence[str] | str, options: Sequence[str]) -> float:
    """
    Checks that a reply chooses a right option, by its letter or its text: "B", "(B)", "B. red" or "red". A reply that
    chooses none, or several, is wrong.

    Args:
        prediction (`str`): Answer of the model.
        answers (`str` or `Sequence[str]`): The right option's letter, or several of which any is right.
        options (`Sequence[str]`): The options' texts, from A on.

    Returns:
        `float`: 1 or 0.

    Example:

    ```python
    >>> from tokenflex.evaluation.options import rate_option

    >>> [rate_option(reply, "B", ["blue", "red"]) for reply in ("B", "(b)", "B. red", "Red.", "blue", "dark red")]
    [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    ```
    """
    right = [answers] if isinstance(answers, str) else list(answers)
    chosen = find_choice(prediction, options)
    if chosen is not None:
        return float(string.ascii_uppercase[chosen] in right)
    # Options of the same text cannot be told apart by it.
    texts = {normalize(options[string.ascii_uppercase.index(letter)]) for letter in right}
    return float(len(normalize(prediction)) > 1 and normalize(prediction) in texts)
