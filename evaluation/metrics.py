"""Scores of answers, one question at a time, from 0 to 1."""

import difflib
import math
import re
import unicodedata
from collections.abc import Callable, Sequence

from .answers import normalize
from .choices import find_choice, option_letters


def exact_match(prediction: str, answers: Sequence[str] | str) -> float:
    """
    Checks that a prediction is one of the answers but for case, surrounding space, a final period (also "。", "．",
    "।" or "۔") and how Unicode puts its letters together (canonical equivalence). Signs that only look alike, such as
    full-width digits or Cyrillic letters, are others.

    Args:
        prediction (`str`): Answer of the model.
        answers (`str` or `Sequence[str]`): One answer, or several of which any is right.

    Returns:
        `float`: 1 or 0.

    Example:

    ```python
    >>> from tokenflex.evaluation.metrics import exact_match

    >>> exact_match(" Red.", "red")
    1.0
    >>> exact_match("crimson", ["red", "crimson"])
    1.0
    ```
    """
    prediction, answers = _composed(prediction, answers)
    return float(normalize(prediction) in map(normalize, answers))


def _composed(prediction: str, answers: Sequence[str] | str) -> tuple[str, list[str]]:
    """Prediction and answers as lists of texts whose letters are put together in one way (NFC)."""
    if not isinstance(prediction, str):
        raise ValueError(f"`prediction`={prediction!r}: a string, such as {str(prediction)!r}.")
    listed = [answers] if isinstance(answers, str) else answers
    if not isinstance(listed, Sequence) or not listed or not all(isinstance(answer, str) for answer in listed):
        raise ValueError(f"`answers`={answers!r}: a string or a list of at least one string, such as ['yes'].")
    return unicodedata.normalize("NFC", prediction), [unicodedata.normalize("NFC", answer) for answer in listed]


_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = {"a", "an", "the"}
_DIGITS = {
    word: str(digit)
    for digit, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
# Without those that are another word when the apostrophe is missing, such as "we'll".
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't
not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED.split()}


def _normalize_vqa(answer: str) -> str:
    text = answer = " ".join(answer.lower().split())
    for mark in _PUNCTUATION:
        goes = f"{mark} " in answer or f" {mark}" in answer or re.search(r"\d,\d", answer)
        text = text.replace(mark, "" if goes else " ")
    words = [_DIGITS.get(word, word) for word in re.sub(r"\.(?!\d)", "", text).split()]
    return " ".join(_CONTRACTIONS.get(word.replace("'", ""), word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """
    The accuracy of VQA v2: a third for each person who gave that answer, at most 1, averaged over all ways to leave
    one person out. Both sides are first put in lower case, without articles, periods that are no decimal point and
    punctuation, number words as digits, contractions with their apostrophe, as the official script does it
    (https://github.com/GT-Vision-Lab/VQA): a mark that touches a space somewhere, or in an answer with a comma between
    digits, is dropped, any other becomes a space, and "none" is 0. Unlike there, and as on
    https://visualqa.org/evaluation.html, answers on which everyone agrees are put in that form too.

    Args:
        prediction (`str`): Answer of the model.
        answers (`Sequence[str]`):
            Answer of each person, repeated ones included: ten in VQA v2, at least two. Of fewer than four, even
            the answer of all reaches no more than a third for each person left.

    Returns:
        `float`: From 0 to 1.

    Example:

    ```python
    >>> from tokenflex.evaluation.metrics import vqa_accuracy

    >>> vqa_accuracy("Two", ["2"] * 3 + ["3"] * 7)
    0.9
    ```
    """
    prediction, answers = _composed(prediction, answers)
    if len(answers) < 2:
        raise ValueError(
            f"`answers`={answers!r}: VQA accuracy leaves one person's answer out, so at least two; "
            "`exact_match` takes one."
        )
    same = [_normalize_vqa(answer) for answer in answers].count(_normalize_vqa(prediction))
    others = len(answers) - same
    # In thirds, so that the sum is exact.
    return (same * min(same - 1, 3) + others * min(same, 3)) / (3 * len(answers))


def anls(prediction: str, answers: Sequence[str] | str) -> float:
    """
    Normalized Levenshtein similarity to the nearest answer, 0 if below one half (arXiv 1905.13648; DocVQA, arXiv
    2007.00398). Case and amount of space do not count. Its mean over questions is ANLS. A similarity of exactly
    one half counts, as in DocVQA's official script (https://rrc.cvc.uab.es/?ch=17) and unlike in the paper.

    Args:
        prediction (`str`): Answer of the model.
        answers (`str` or `Sequence[str]`): One answer, or several of which the nearest counts.

    Returns:
        `float`: 0, or from one half to 1.

    Example:

    ```python
    >>> from tokenflex.evaluation.metrics import anls

    >>> anls("Jan 2019", ["1 Jan 2019", "Jan 2018"])
    0.875
    ```
    """
    prediction, answers = _composed(prediction, answers)
    similarity = max(_similarity(_squeeze(prediction), _squeeze(answer)) for answer in answers)
    return similarity if similarity >= 0.5 else 0.0


def _squeeze(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(first: str, second: str) -> float:
    shorter, longer = sorted((first, second), key=len)
    if 2 * len(shorter) < len(longer):
        return 0.0  # below one half whatever the letters, and quick for long replies
    return 1 - edit_distance(first, second) / len(longer) if longer else 1.0


def edit_distance(first: str, second: str) -> int:
    """
    Letters to insert, delete or replace to turn one text into the other (Levenshtein).

    Args:
        first (`str`): A text.
        second (`str`): Another.

    Example:

    ```python
    >>> from tokenflex.evaluation.metrics import edit_distance

    >>> edit_distance("kitten", "sitting")
    3
    ```
    """
    above = list(range(len(second) + 1))
    for i, letter in enumerate(first, 1):
        row = [i]
        for j, other in enumerate(second, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (letter != other)))
        above = row
    return above[-1]


def relaxed_accuracy(prediction: str, answers: Sequence[str] | str) -> float:
    """
    Checks that a prediction is one of the answers, for numbers within 5 % of it (ChartQA, arXiv 2203.10244, section
    5.1). "12%" is read as 0.12. Numbers are what Python's `float` takes, full-width and other scripts' digits among
    them; "1,000", "−5" with a minus sign in place of a hyphen and "$5" are text, which must be the same but for case
    and surrounding space. So does Pix2Struct's script, which other harnesses use
    (https://github.com/google-research/pix2struct); unlike there, "0.0" is right where "0" is.

    Args:
        prediction (`str`): Answer of the model.
        answers (`str` or `Sequence[str]`): One answer, or several of which any is right.

    Returns:
        `float`: 1 or 0.

    Example:

    ```python
    >>> from tokenflex.evaluation.metrics import relaxed_accuracy

    >>> relaxed_accuracy("0.43", "42%"), relaxed_accuracy("42", "42%")
    (1.0, 0.0)
    ```
    """

    def right(answer: str) -> bool:
        number, target = _number(prediction), _number(answer)
        if number is None or target is None:
            return prediction.strip().lower() == answer.strip().lower()
        return abs(number - target) / abs(target) <= 0.05 if target else number == 0

    prediction, answers = _composed(prediction, answers)
    return float(any(map(right, answers)))


def _number(text: str) -> float | None:
    text = text.strip()
    try:
        number = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def multiple_choice(prediction: str, answers: Sequence[str] | str, options: Sequence[str] | None = None) -> float:
    """
    Checks that a reply chooses the right option, by the rules of [`find_choice`].

    Args:
        prediction (`str`): Answer of the model.
        answers (`str` or `Sequence[str]`):
            The right option's letter, or its text if `options` are given. Of several any is right.
        options (`Sequence[str]`, *optional*): The options' texts, from A on.

    Returns:
        `float`: 1 or 0.

    Example:

    ```python
    >>> from tokenflex.evaluation.metrics import multiple_choice

    >>> multiple_choice("The answer is B.", "B")
    1.0
    >>> multiple_choice("a dog", "B", options=["a cat", "a dog"])
    1.0
    ```
    """
    letters = option_letters(options)
    places = {normalize(option): place for place, option in enumerate(options or [])}
    places |= {letter.lower(): place for place, letter in enumerate(letters)}
    right = set()
    prediction, answers = _composed(prediction, answers)
    for answer in answers:
        place = places.get(answer.strip().lower(), places.get(normalize(answer)))
        if place is None:
            known = "" if options is None else f" or one of the options {list(options)}"
            raise ValueError(f"`answers`={answers!r}: a letter from A to {letters[-1]}{known}, not {answer!r}.")
        right.add(place)
    return float(find_choice(prediction, options) in right)


METRICS: dict[str, Callable[..., float]] = {
    metric.__name__: metric for metric in (exact_match, vqa_accuracy, anls, relaxed_accuracy, multiple_choice)
}


def get_metric(metric: str) -> Callable[..., float]:
    """
    A metric of `METRICS` by its name.

    Args:
        metric (`str`): Its name.

    Example:

    ```python
    >>> from tokenflex.evaluation.metrics import get_metric

    >>> get_metric("anls")("helo", "hello")
    0.8
    ```
    """
    if metric in METRICS:
        return METRICS[metric]
    nearest = difflib.get_close_matches(str(metric).lower(), METRICS, n=1, cutoff=0)[0]
    raise ValueError(f"`metric`={metric!r}: no such metric, perhaps {nearest!r}; there are {', '.join(METRICS)}.")
