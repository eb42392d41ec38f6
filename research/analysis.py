"""From what every run got right to means, spreads, differences and verdicts."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from ..evaluation.intervals import Interval, mean_over_families, mean_over_seeds
from ..towers.tiny import VISION_TOKEN_CHOICES
from .arms import ARMS, FIXED, PAPER


AWAY = -0.05  # expected of a fixed model away from its count, against the flexible one


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
        with verdicts: on being better, and on being at least five points worse.
    """
    cells = defaultdict(dict)
    for run in sorted(runs, key=lambda run: run["seed"]):
        cells[run["num_images"], run["compared_at"]].setdefault(run["arm"], []).append(run)
    return {
        "regimes": {title: _cell(cells[place], flops) for title, place in regimes.items()},
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
            row["away"] = {count: _difference(runs, cell[PAPER.name], count, AWAY) for count in others}
        else:
            own = {str(fixed.choices[0]): fixed.name for fixed in FIXED if fixed.choices[0] in arm.counts}
            row["gain"] = {count: _difference(runs, cell[fixed], count) for count, fixed in own.items()}
        table[name] = row
    return table


def _accuracy(runs: Sequence[Mapping], count: str) -> dict:
    scores = [run["right"][count] for run in runs]
    families, images = runs[0]["families"], runs[0]["images"]
    means = [mean_over_families(score, families, resamples=1).mean for score in scores]
    spread = statistics.stdev(means) if len(means) > 1 else None
    return {**mean_over_seeds(scores, families, images)._asdict(), "seeds": means, "spread": spread}


def _difference(first: Sequence[Mapping], second: Sequence[Mapping], count: str, claim: float = 0.0) -> dict:
    """
    Over the seeds that both have; one seed's runs share their base, their images and their order. The verdict is on
    the claim that the difference is above `claim`, or below it where that is negative.
    """
    theirs = {run["seed"]: run["right"][count] for run in second}
    pairs = [(run["right"][count], theirs[run["seed"]]) for run in first if run["seed"] in theirs]
    scores = [[a - b for a, b in zip(*pair)] for pair in pairs]
    interval = mean_over_seeds(scores, first[0]["families"], first[0]["images"])
    return {**interval._asdict(), "verdict": verdict(interval, claim)}


def verdict(interval: Interval, claim: float = 0.0) -> str:
    """Verdict of a difference's interval on the claim that it is above `claim`, or below a negative one."""
    low, high = (
        (claim - interval.high, claim - interval.low) if claim < 0 else (interval.low - claim, interval.high - claim)
    )
    return "holds" if low > 0 else "does not hold" if high < 0 else "undecided"
