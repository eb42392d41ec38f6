"""From what every run got right to means, spreads, differences and verdicts."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from ..evaluation.intervals import Interval, mean_over_families, mean_over_seeds
from ..towers.tiny import VISION_TOKEN_CHOICES
from .arms import ARMS, FIXED, FLEXIBLE, PAPER, share_of_steps


LEVEL = 0.01  # one point


def analyze(
    runs: Sequence[Mapping],
    flops: Mapping[str, float],
    regimes: Mapping[str, tuple],
    curves: Mapping[str, Sequence[tuple]],
) -> dict:
    """
    Args:
        runs (`Sequence[Mapping]`): Results from [`train_and_test`].
        flops (`Mapping[str, float]`): FLOPs of a step of each arm.
        regimes (`Mapping[str, tuple]`): Title to (images, steps).
        curves (`Mapping[str, Sequence[tuple]]`): Title to points, each (label, images, steps).

    Returns:
        `dict`: `regimes` and `curves`. For each title and point, arm by arm: `accuracy` at each count (the mean over
        families and seeds, its 95 % interval, each seed's, their standard deviation), `gain`, the difference from the
        fixed model at its own count, and `away`, a fixed model's difference from the paper's draw at other counts,
        each with its interval and [`verdict`]. `instead`, for each title with fixed models of a share of the steps:
        the `steps` of each of these, the `flops` of all, their `accuracy` at their own counts and every flexible arm's
        `gain` over it.
    """
    cells = defaultdict(dict)
    for run in sorted(runs, key=lambda run: run["seed"]):
        cells[run["num_images"], run["compared_at"]].setdefault(run["arm"], []).append(run)
    return {
        "regimes": {title: _cell(cells[place], flops) for title, place in regimes.items()},
        "instead": {
            title: _instead(cells[num_images, steps], shared, steps, flops)
            for title, (num_images, steps) in regimes.items()
            if (shared := cells[num_images, share_of_steps(steps)])
        },
        "curves": {
            title: {label: _cell(cells[num_images, steps], flops) for label, num_images, steps in points}
            for title, points in curves.items()
        },
    }


def _cell(cell: Mapping[str, list], flops: Mapping[str, float]) -> dict:
    """All arms that were trained on as many images for as many steps."""
    table = {}
    for name, arm in ARMS.items():
        if name not in cell:
            continue
        runs = cell[name]
        row = {
            "steps": runs[0]["steps"],
            "flops": flops[name] * runs[0]["steps"] / (flops[PAPER.name] * runs[0]["compared_at"]),
            "cpu_minutes": statistics.mean(run["cpu_seconds"] for run in runs) / 60,
            "accuracy": {str(count): _accuracy(runs, str(count)) for count in arm.counts},
        }
        if arm in FIXED:
            others = [str(count) for count in VISION_TOKEN_CHOICES if count not in arm.choices]
            row["away"] = _differences(runs, dict.fromkeys(others, cell[PAPER.name]))
        else:
            own = [fixed for fixed in FIXED if fixed.choices[0] in arm.counts]
            row["gain"] = _differences(runs, {str(fixed.choices[0]): cell[fixed.name] for fixed in own})
        table[name] = row
    return table


def _instead(cell: Mapping[str, list], shared: Mapping[str, list], steps: int, flops: Mapping[str, float]) -> dict:
    """Each flexible arm beside one fixed model for each count, all of which share its steps."""
    own = {str(fixed.choices[0]): shared[fixed.name] for fixed in FIXED}
    share = share_of_steps(steps)
    return {
        "steps": share,
        "flops": sum(flops[fixed.name] for fixed in FIXED) * share / (flops[PAPER.name] * steps),
        "accuracy": {count: _accuracy(runs, count) for count, runs in own.items()},
        "gain": {arm.name: _differences(cell[arm.name], own) for arm in FLEXIBLE if arm.name in cell},
    }


def _accuracy(runs: Sequence[Mapping], count: str) -> dict:
    scores = [run["right"][count] for run in runs]
    families, images = runs[0]["families"], runs[0]["images"]
    means = [mean_over_families(score, families, resamples=1).mean for score in scores]
    spread = statistics.stdev(means) if len(means) > 1 else None
    return {**mean_over_seeds(scores, families, images)._asdict(), "seeds": means, "spread": spread}


def _differences(runs: Sequence[Mapping], others: Mapping[str, Sequence[Mapping]]) -> dict:
    """
    From other runs at each count, over the seeds that both have; one seed's runs share their base, their images and
    their order. The intervals hold together in at least 95 % of cases, by Bonferroni: each of k is one of 1 - 5 % / k.
    """
    differences = {}
    for count, theirs in others.items():
        scores = {run["seed"]: run["right"][count] for run in theirs}
        pairs = [(run["right"][count], scores[run["seed"]]) for run in runs if run["seed"] in scores]
        gains = [[a - b for a, b in zip(*pair)] for pair in pairs]
        interval = mean_over_seeds(gains, runs[0]["families"], runs[0]["images"], confidence=1 - 0.05 / len(others))
        differences[count] = {**interval._asdict(), "verdict": verdict(interval)}
    return differences


def verdict(interval: Interval) -> str:
    """
    What a difference's interval says, by the rule that docs/experiments.md laid down on 2026-11-27, before the runs
    that it is for: `"ahead"` where the interval is above 0, `"behind"` where it is below. Where it contains 0,
    `"level"` if it lies within one point of it, ends included, else `"undecided"`.

    Args:
        interval (`Interval`): The difference and the ends of its interval, as shares of 1.

    Example:

    ```python
    >>> from tokenflex.evaluation.intervals import Interval
    >>> from tokenflex.research.analysis import verdict

    >>> verdict(Interval(0.004, -0.002, 0.010)), verdict(Interval(0.004, -0.003, 0.011))
    ('level', 'undecided')
    ```
    """
    if interval.low > 0:
        return "ahead"
    if interval.high < 0:
        return "behind"
    return "level" if interval.low >= -LEVEL and interval.high <= LEVEL else "undecided"
