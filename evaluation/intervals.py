"""Uncertainty of scores: bootstrap intervals and paired tests, alike whatever the questions' order."""

import functools
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """
    Args:
        mean (`float`): The mean of the scores.
        low (`float`): Lower end of its confidence interval.
        high (`float`): Upper end.
    """

    mean: float
    low: float
    high: float


class PairedTest(NamedTuple):
    """
    Args:
        difference (`float`): The first mean less the second.
        low (`float`): Lower end of the difference's 95 % interval.
        high (`float`): Upper end.
        p_value (`float`): Probability of a difference at least as large, of either sign, if there were none.
    """

    difference: float
    low: float
    high: float
    p_value: float


def bootstrap_interval(
    scores: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    groups: Sequence | None = None,
) -> Interval:
    """
    The mean of scores with its percentile bootstrap interval (Efron and Tibshirani, An Introduction to the Bootstrap,
    1993, section 13.3). One score, or one group, shows no spread: its interval is a point.

    Args:
        scores (`Sequence[float]`): One per question.
        confidence (`float`, *optional*, defaults to 0.95): Share of such intervals that hold the true mean.
        resamples (`int`, *optional*, defaults to 2000): Number of draws.
        seed (`int`, *optional*, defaults to 0): Seed of the draws.
        groups (`Sequence`, *optional*):
            Group of each question, such as its image. Whole groups are drawn then, for questions on one image
            go right or wrong together (cluster bootstrap).

    Returns:
        `Interval`: The mean, the lower and the upper end.

    Example:

    ```python
    >>> from tokenflex.evaluation.intervals import bootstrap_interval

    >>> bootstrap_interval([0, 1, 1, 1] * 25)
    Interval(mean=0.75, low=0.66, high=0.84)
    ```
    """
    return mean_over_families(scores, np.zeros(np.size(scores)), confidence, resamples, seed, groups)


def mean_over_families(
    scores: Sequence[float],
    families: Sequence,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    groups: Sequence | None = None,
) -> Interval:
    """
    The mean of the families' means, each family counting the same whatever its number of questions, with its
    percentile bootstrap interval.

    Args:
        scores (`Sequence[float]`): One per question.
        families (`Sequence`): The kind of each question.
        confidence (`float`, *optional*, defaults to 0.95): As for [`bootstrap_interval`].
        resamples (`int`, *optional*, defaults to 2000): Number of draws.
        seed (`int`, *optional*, defaults to 0): Seed of the draws.
        groups (`Sequence`, *optional*):
            Group of each question, such as its image. Whole groups are drawn then, over all families; a draw
            without any question of a family leaves that family out. Without groups each family keeps its size.

    Returns:
        `Interval`: The mean, the lower and the upper end.

    Example:

    ```python
    >>> from tokenflex.evaluation.intervals import mean_over_families

    >>> mean_over_families([1, 1, 1, 0], ["color", "color", "color", "count"]).mean
    0.5
    ```
    """
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence`={confidence}: between 0 and 1, such as 0.95.")
    _check_positive(resamples=resamples)
    scores = _checked("scores", scores)
    families = _codes("families", families, len(scores))
    if groups is None:
        parts = [scores[families == family] for family in range(families.max() + 1)]
        tables = [(np.sort(part)[:, None], np.ones((len(part), 1))) for part in parts]
    else:
        tables = [_table(scores, families, _codes("groups", groups, len(scores)))]
    rng = np.random.default_rng(seed)
    mean = np.mean([(sums.sum(0) / sizes.sum(0)).mean() for sums, sizes in tables])
    means = np.mean([_resampled_means(sums, sizes, resamples, rng) for sums, sizes in tables], axis=0)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(mean), float(low), float(high))


def paired_test(
    first: Sequence[float],
    second: Sequence[float],
    groups: Sequence | None = None,
    permutations: int = 10000,
    seed: int = 0,
) -> PairedTest:
    """
    Tests whether two models, or two counts of one model, score differently on the same questions: a two-sided
    permutation test that swaps the two scores of a question at random. The observed scores count as one of the
    permutations, so that the p-value is never 0 (Phipson and Smyth, arXiv 1603.05766).

    Args:
        first (`Sequence[float]`): One score per question.
        second (`Sequence[float]`): Scores of the same questions in the same order.
        groups (`Sequence`, *optional*):
            Group of each question, such as its image. The questions of a group are swapped together then.
        permutations (`int`, *optional*, defaults to 10000): Number of swaps.
        seed (`int`, *optional*, defaults to 0): Seed of the draws.

    Returns:
        `PairedTest`: The difference, the ends of its 95 % interval as of [`bootstrap_interval`], and the p-value.

    Example:

    ```python
    >>> from tokenflex.evaluation.intervals import paired_test

    >>> test = paired_test([1, 1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0, 0])
    >>> test.difference, round(test.p_value, 2)
    (0.875, 0.02)
    ```
    """
    _check_positive(permutations=permutations)
    first, second = _checked("first", first), _checked("second", second)
    if len(first) != len(second):
        raise ValueError(f"`second` of {len(second)} scores for `first` of {len(first)}: one each per question.")
    differences = first - second
    interval = bootstrap_interval(differences, seed=seed, groups=groups)
    if groups is not None:
        differences = _table(differences, np.zeros(len(first), int), _codes("groups", groups, len(first)))[0][:, 0]
    # Swapping flips a difference's sign, so that of equal ones only the number of flips matters.
    sizes, numbers = np.unique(np.abs(differences), return_counts=True)
    # Sums in another order may differ in their last digits.
    least = abs(differences.sum()) - 1e-12 * np.abs(differences).sum()
    rng, extreme = np.random.default_rng(seed), 1
    for rows in _chunks(permutations, len(sizes)):
        flips = rng.binomial(numbers, 0.5, (rows, len(sizes)))
        extreme += np.count_nonzero(np.abs((numbers - 2 * flips) @ sizes) >= least)
    return PairedTest(*interval, float(extreme / (permutations + 1)))


def mean_over_seeds(
    scores: Sequence[Sequence[float]],
    families: Sequence,
    groups: Sequence,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """
    The mean over families of what several training runs score on the same questions, or of how two kinds of run differ
    there. The interval is for other runs and other images: Student's t over the runs' means, with the variance of the
    images, by bootstrap, added to it. Three runs say little: their spread counts 4.3 times, not twice.

    Args:
        scores (`Sequence[Sequence[float]]`): One list per run, all of the same questions in the same order.
        families (`Sequence`): The kind of each question.
        groups (`Sequence`): Group of each question, such as its image; whole groups are drawn.
        confidence (`float`, *optional*, defaults to 0.95): As for [`bootstrap_interval`].
        resamples (`int`, *optional*, defaults to 1000): Number of draws.
        seed (`int`, *optional*, defaults to 0): Seed of the draws.

    Returns:
        `Interval`: The mean, the lower and the upper end. One run has the interval of its images alone.

    Example:

    ```python
    >>> from tokenflex.evaluation.intervals import mean_over_seeds

    >>> mean_over_seeds([[1, 1, 0, 0], [1, 1, 1, 0]], families=["a", "a", "b", "b"], groups=[0, 1, 0, 1]).mean
    0.625
    ```
    """
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence`={confidence}: between 0 and 1, such as 0.95.")
    _check_positive(resamples=resamples)
    runs = [_checked(f"scores[{i}]", run) for i, run in enumerate(scores)]
    if len({len(run) for run in runs}) != 1:
        raise ValueError(f"`scores` of {[len(run) for run in runs]} questions: all of the same, at least one run.")
    families, groups = _codes("families", families, len(runs[0])), _codes("groups", groups, len(runs[0]))
    tables = [_table(run, families, groups) for run in runs]
    means = np.array([(sums.sum(0) / sizes.sum(0)).mean() for sums, sizes in tables])
    sums, sizes = np.mean([sums for sums, _ in tables], axis=0), tables[0][1]
    drawn = _resampled_means(sums, sizes, resamples, np.random.default_rng(seed))
    tail = (1 + confidence) / 2
    half_width = NormalDist().inv_cdf(tail) * drawn.std()
    if len(runs) > 1:
        half_width = np.hypot(half_width, t_quantile(tail, len(runs) - 1) * means.std(ddof=1) / len(runs) ** 0.5)
    return Interval(float(means.mean()), float(means.mean() - half_width), float(means.mean() + half_width))


@functools.cache
def t_quantile(probability: float, degrees_of_freedom: int) -> float:
    """
    Of Student's t distribution, by numerical integration: below which a value lies with a probability of one half or
    more.

    Args:
        probability (`float`): From 0.5 to less than 1.
        degrees_of_freedom (`int`): At least 1; one less than the number of runs.

    Example:

    ```python
    >>> from tokenflex.evaluation.intervals import t_quantile

    >>> round(t_quantile(0.975, degrees_of_freedom=2), 3)
    4.303
    ```
    """
    # Over the angle whose tangent the value is, so that the whole tail lies within a finite range.
    edges = np.linspace(0, np.pi / 2, 100001)
    middles = (edges[1:] + edges[:-1]) / 2
    density = (1 + np.tan(middles) ** 2 / degrees_of_freedom) ** (-(degrees_of_freedom + 1) / 2) / np.cos(middles) ** 2
    area = np.concatenate([[0], density.cumsum()])
    return float(np.tan(np.interp(2 * probability - 1, area / area[-1], edges)))


def _checked(name: str, scores: Sequence[float]) -> np.ndarray:
    array = np.asarray(scores, dtype=float)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"`{name}` of shape {array.shape}: one number per question, at least one.")
    if not np.isfinite(array).all():
        index = int(np.argmin(np.isfinite(array)))
        raise ValueError(f"`{name}`[{index}]={array[index]}: every score a finite number; 0 for a missing answer.")
    return array


def _check_positive(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"`{name}`={count}: at least 1, such as 2000.")


def _codes(name: str, labels: Sequence, length: int) -> np.ndarray:
    """Labels as numbers from 0 on, in the labels' order."""
    if len(labels) != length:
        raise ValueError(f"`{name}` of {len(labels)} for {length} scores: one each per question.")
    array = np.asarray(labels)
    if array.ndim != 1 or array.dtype == object:
        raise ValueError(f"`{name}` of {array.dtype} and shape {array.shape}: one number or string per question.")
    return np.unique(array, return_inverse=True)[1]


def _table(scores: np.ndarray, families: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the scores of each group and family, of shape (groups, families)."""
    shape = groups.max() + 1, families.max() + 1
    order = np.lexsort((scores, families, groups))
    cells = (groups * shape[1] + families)[order]
    sums = np.bincount(cells, weights=scores[order], minlength=shape[0] * shape[1])
    return sums.reshape(shape), np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape).astype(float)


def _resampled_means(sums: np.ndarray, sizes: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """The mean over families in each resample of groups, of shape (resamples,)."""
    families = sums.shape[1]
    # Of equal groups only the number of draws matters.
    kinds, numbers = np.unique(np.hstack([sums, sizes]), axis=0, return_counts=True)
    means = []
    for rows in _chunks(resamples, len(kinds)):
        drawn = rng.multinomial(len(sums), numbers / len(sums), rows) @ kinds  # (rows, 2 * families)
        with np.errstate(invalid="ignore"):
            means.append(np.nanmean(drawn[:, :families] / drawn[:, families:], axis=1))
    return np.concatenate(means)


def _chunks(total: int, width: int, limit: int = 2**22) -> Iterator[int]:
    """Parts of `total` rows of `width` numbers, each part within `limit` numbers or one row."""
    rows = max(1, limit // max(1, width))
    for start in range(0, total, rows):
        yield min(rows, total - start)
