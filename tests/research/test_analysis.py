import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenflex.evaluation.intervals import Interval, mean_over_seeds
from tokenflex.research.analysis import analyze, verdict
from tokenflex.research.arms import DISTILL_EQUAL, FIXED, PAPER, share_of_steps


FAMILIES, IMAGES = ["a", "a", "b"], [0, 1, 1]
FLOPS = {"fixed-4": 1.0, "fixed-16": 2.0, "fixed-36": 3.0, "draw-235": 2.0, "distill-flops": 5.0}


def run(arm, seed, rights, steps=10, num_images=5, compared_at=10):
    return {
        "arm": arm, "num_images": num_images, "compared_at": compared_at, "steps": steps, "seed": seed,
        "right": {str(count): right for count, right in rights.items()}, "families": FAMILIES, "images": IMAGES,
        "cpu_seconds": 60.0 * (1 + seed),
    }  # fmt: skip


def all_right(value=1):
    return {count: [value] * 3 for count in (4, 16, 36)}


@pytest.fixture
def runs():
    fixed = [run(arm.name, seed, {4: [1, 0, 1], 16: [0, 0, 1], 36: [0, 0, 0]}) for arm in FIXED for seed in (1, 0)]
    drawn = [run(PAPER.name, 0, all_right()), run(PAPER.name, 1, {4: [1, 0, 1], 16: [1, 1, 1], 36: [1, 1, 0]})]
    nested = [run(DISTILL_EQUAL.name, seed, all_right(), steps=4) for seed in (0, 1)]
    return fixed + drawn + nested


def test_means_are_over_families_and_seeds(runs):
    table = analyze(runs, FLOPS, {"limited": (5, 10)}, {"steps": [("10 steps", 5, 10)]})
    row = table["regimes"]["limited"]["fixed-4"]
    assert row["accuracy"]["4"]["mean"] == 0.75  # (1/2 + 1) / 2
    assert row["accuracy"]["16"]["seeds"] == [0.5, 0.5] and row["accuracy"]["16"]["spread"] == 0
    drawn = table["regimes"]["limited"]["draw-235"]
    assert drawn["accuracy"]["4"]["seeds"] == [1, 0.75]
    assert drawn["accuracy"]["4"]["spread"] == pytest.approx(0.25 / 2**0.5)
    assert drawn["cpu_minutes"] == 1.5
    assert table["curves"]["steps"]["10 steps"] == table["regimes"]["limited"]


def test_differences_are_of_one_seed_and_one_question(runs):
    table = analyze(runs, FLOPS, {"limited": (5, 10)}, {})["regimes"]["limited"]
    assert table["draw-235"]["gain"]["4"]["mean"] == pytest.approx(0.125)
    assert table["draw-235"]["gain"]["16"]["mean"] == 0.5
    assert table["draw-235"]["gain"]["36"]["mean"] == 0.75
    assert set(table["fixed-4"]["away"]) == {"16", "36"} and "gain" not in table["fixed-4"]
    assert table["fixed-36"]["away"]["4"]["mean"] == pytest.approx(-0.125)


def test_cost_is_relative_to_the_papers_draw(runs):
    table = analyze(runs, FLOPS, {"limited": (5, 10)}, {})["regimes"]["limited"]
    assert table["draw-235"]["flops"] == 1 and table["fixed-36"]["flops"] == 1.5
    assert table["distill-flops"]["flops"] == 1 and table["distill-flops"]["steps"] == 4


def test_a_seed_that_only_one_has_is_left_out(runs):
    runs.append(run(PAPER.name, 2, all_right(0)))
    table = analyze(runs, FLOPS, {"limited": (5, 10)}, {})["regimes"]["limited"]
    assert table["draw-235"]["gain"]["16"]["mean"] == 0.5
    assert table["draw-235"]["accuracy"]["16"]["mean"] == pytest.approx(2 / 3)


def test_runs_of_other_images_and_steps_are_kept_apart(runs):
    others = [run(arm.name, 0, all_right(), num_images=None) for arm in (*FIXED, PAPER)]
    regimes = {"limited": (5, 10), "rich": (None, 10)}
    table = analyze(runs + others, FLOPS, regimes, {})["regimes"]
    assert table["rich"]["fixed-36"]["accuracy"]["36"]["mean"] == 1
    assert table["rich"]["fixed-36"]["accuracy"]["36"]["spread"] is None
    assert table["limited"]["fixed-36"]["accuracy"]["36"]["mean"] == 0


def test_one_flexible_model_stands_beside_three_that_share_its_steps(runs):
    assert analyze(runs, FLOPS, {"limited": (5, 10)}, {})["instead"] == {}
    rights = {"fixed-4": {**all_right(), 4: [0, 0, 1]}, "fixed-16": all_right(0), "fixed-36": all_right()}
    runs += [
        run(name, seed, right, steps=3, compared_at=share_of_steps(10))
        for name, right in rights.items()
        for seed in (0, 1)
    ]
    instead = analyze(runs, FLOPS, {"limited": (5, 10)}, {})["instead"]["limited"]
    assert instead["steps"] == 3 and instead["flops"] == (1 + 2 + 3) * 3 / (2 * 10)
    assert {count: row["mean"] for count, row in instead["accuracy"].items()} == {"4": 0.5, "16": 0, "36": 1}
    assert list(instead["gain"]) == [PAPER.name, DISTILL_EQUAL.name]
    assert {count: row["mean"] for count, row in instead["gain"][PAPER.name].items()} == {
        "4": pytest.approx(0.375), "16": pytest.approx(1), "36": pytest.approx(-0.25)
    }  # fmt: skip


def test_the_intervals_of_a_row_share_five_percent(runs):
    table = analyze(runs, FLOPS, {"limited": (5, 10)}, {})["regimes"]["limited"]
    of_three = mean_over_seeds([[1, 1, 1], [1, 1, 0]], FAMILIES, IMAGES, confidence=1 - 0.05 / 3)
    assert table["draw-235"]["gain"]["36"] == {**of_three._asdict(), "verdict": verdict(of_three)}
    of_two = mean_over_seeds([[0, -1, 0], [0, 0, 0]], FAMILIES, IMAGES, confidence=1 - 0.05 / 2)
    assert table["fixed-36"]["away"]["4"] == {**of_two._asdict(), "verdict": verdict(of_two)}


points = st.integers(-300, 300).map(lambda hundredths: hundredths / 10_000)


@given(points, points)
def test_verdict(one, other):
    low, high = sorted((one, other))
    said = verdict(Interval((low + high) / 2, low, high))
    assert (said == "ahead") == (low > 0)
    assert (said == "behind") == (high < 0)
    assert (said == "level") == (low <= 0 <= high and max(-low, high) <= 0.01)
    mirrored = verdict(Interval(-(low + high) / 2, -high, -low))
    assert mirrored == {"ahead": "behind", "behind": "ahead"}.get(said, said)


@given(st.lists(points, min_size=4, max_size=4).map(sorted))
def test_a_narrower_interval_takes_no_decision_back(ends):
    wide, narrow = (verdict(Interval(0, low, high)) for low, high in (ends[::3], ends[1:3]))
    assert wide in (narrow, "undecided") or (wide == "level" and narrow in ("ahead", "behind"))


@pytest.mark.parametrize(
    "low, high, said",
    [
        *[(0.0, 0.0, "level"), (0.0, 0.01, "level"), (-0.01, 0.01, "level"), (-0.01, 0.0, "level")],
        *[(1e-9, 0.002, "ahead"), (1e-9, 0.3, "ahead"), (0.0, 0.0101, "undecided"), (-0.0101, 0.0, "undecided")],
        *[(-0.002, -1e-9, "behind"), (-0.3, -1e-9, "behind"), (-0.3, 0.3, "undecided")],
    ],
)
def test_verdict_at_its_edges(low, high, said):
    assert verdict(Interval((low + high) / 2, low, high)) == said
