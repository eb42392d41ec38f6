"""Scores of answers."""


def exact_match(prediction: str, answer: str) -> bool:
    """
    Whether two answers are the same but for case, surrounding space and a final full stop.

    Example:

    ```python
    >>> from tokenflex.evaluation.metrics import exact_match

    >>> exact_match(" Red.", "red")
    True
    ```
    """
    return normalise(prediction) == normalise(answer)


def normalise(answer: str) -> str:
    """An answer without what [`exact_match`] ignores."""
    return answer.strip().removesuffix(".").strip().casefold()
