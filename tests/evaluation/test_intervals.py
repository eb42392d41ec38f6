import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tokenflex.evaluation.intervals import (
    bootstrap_interval,
    mean_over_families,
    mean_over_seeds,
    paired_test,
    t_quantile,
)


shares = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])
scores = st.lists(shares, min_size=1, max_size=30)
pairs = st.lists(st.tuples(shares, shares), min_size=2, max_size=8)


def labeled(kinds):
    return st.lists(st.tuples(shares, st.sampled_from("xyz"), st.integers(0, kinds - 1)), min_size=1, max_size=30)


# Intervals


@settings(deadline=None)
@given(scores)
def test_interval_holds_the_mean_and_stays_within_the_scores(values):
    mean, low, high = bootstrap_interval(values, resamples=300)
    assert mean == pytest.approx(np.mean(values))
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    wider = bootstrap_interval(values, confidence=0.99, resamples=300)
    assert wider.low <= low and high <= wider.high


@pytest.mark.parametrize("size", [20, 300])
@pytest.mark.parametrize("draw", ["random", "integers"])
def test_interval_is_scipys(size, draw):
    rng = np.random.default_rng(1)
    values = rng.random(size) if draw == "random" else rng.integers(0, 2, size)
    found = bootstrap_interval(values, confidence=0.9, resamples=20000)
    expected = stats.bootstrap(
        (values,), np.mean, confidence_level=0.9, n_resamples=20000, method="percentile", rng=rng
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx(expected, abs=0.05 * (expected.high - expected.low))


def test_interval_of_two_scores_by_hand():
    # The mean of two draws of 0 and 1 is 0, 1/2 or 1 with probabilities 1/4, 1/2 and 1/4.
    assert bootstrap_interval([0, 1], confidence=0.95) == (0.5, 0, 1)
    assert bootstrap_interval([0, 1], confidence=0.4) == (0.5, 0.5, 0.5)


def test_clusters_equal_plain_scores_where_each_stands_alone():
    values = np.random.default_rng(0).random(50)
    assert bootstrap_interval(values, groups=np.arange(50)) == bootstrap_interval(values)


def test_copies_of_a_question_tell_nothing_new():
    values = np.random.default_rng(0).integers(0, 2, 60)
    copied = bootstrap_interval(np.repeat(values, 5), groups=np.repeat(np.arange(60), 5))
    assert copied == pytest.approx(bootstrap_interval(values))


def test_groups_of_unequal_size_by_hand():
    # Drawn twice, "a" gives 1 and "b" 0; one of each gives 1/4, twice as often.
    mean, low, high = bootstrap_interval([1, 0, 0, 0], groups=["a", "b", "b", "b"])
    assert (mean, low, high) == (0.25, 0, 1)
    assert bootstrap_interval([1, 0, 0, 0], confidence=0.4, groups=["a", "b", "b", "b"]) == (0.25, 0.25, 0.25)


def coverage(clustered, groups_known):
    rng, inside, repeats = np.random.default_rng(0), 0, 300
    for _ in range(repeats):
        ease = rng.uniform(0.2, 1, (40, 1)) if clustered else 0.6
        values = (rng.random((40, 5)) < ease).ravel()
        groups = np.repeat(np.arange(40), 5) if groups_known else None
        _, low, high = bootstrap_interval(values, groups=groups, resamples=500)
        inside += low <= 0.6 <= high
    return inside / repeats


def test_interval_covers_the_truth_as_often_as_it_says():
    assert 0.91 <= coverage(clustered=False, groups_known=False) <= 0.98
    assert 0.91 <= coverage(clustered=True, groups_known=True) <= 0.98
    assert coverage(clustered=True, groups_known=False) < 0.91


# Families


@settings(deadline=None)
@given(scores)
def test_one_family_is_the_plain_mean(values):
    assert mean_over_families(values, ["x"] * len(values), resamples=50) == bootstrap_interval(values, resamples=50)


@settings(deadline=None)
@given(labeled(4))
def test_mean_over_families_is_that_of_their_means(rows):
    values, families, groups = map(np.array, zip(*rows))
    expected = np.mean([values[families == family].mean() for family in set(families)])
    for given_groups in (None, groups):
        mean, low, high = mean_over_families(values, families, resamples=50, groups=given_groups)
        assert mean == pytest.approx(expected)
        assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


def test_families_are_drawn_each_by_itself():
    # A small and a large family: the standard error is that of the mean of two independent means.
    rng = np.random.default_rng(0)
    small, large = rng.integers(0, 2, 50), rng.integers(0, 2, 800)
    families = ["small"] * 50 + ["large"] * 800
    _, low, high = mean_over_families(np.concatenate([small, large]), families, resamples=20000)
    error = np.sqrt(small.var() / 50 + large.var() / 800) / 2
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_families_on_the_same_images_are_drawn_together():
    values = np.random.default_rng(0).integers(0, 2, 200)
    twice = mean_over_families(np.tile(values, 2), np.repeat(["x", "y"], 200), groups=np.tile(np.arange(200), 2))
    assert twice == pytest.approx(bootstrap_interval(values))


def test_a_family_missing_from_a_draw_is_left_out_of_it():
    mean, low, high = mean_over_families([0, 1], ["x", "y"], groups=[0, 1])
    assert (mean, low, high) == (0.5, 0, 1)


# Paired tests


def drawn_runs(seed, runs=3, images=40, spread=0.0):
    """Scores of several runs on the same questions, three about each image, of two families."""
    rng = np.random.default_rng(seed)
    chances = rng.uniform(0.3, 0.9, images * 3) + rng.normal(0, spread, (runs, 1))
    scores = (rng.uniform(size=(runs, images * 3)) < chances).astype(float)
    return scores, rng.choice(["a", "b"], images * 3), np.repeat(np.arange(images), 3)


def test_mean_over_seeds_is_the_mean_of_the_runs_means():
    scores, families, images = drawn_runs(0)
    expected = np.mean([mean_over_families(run, families, resamples=1).mean for run in scores])
    assert mean_over_seeds(scores, families, images).mean == pytest.approx(expected)


def test_one_run_has_the_interval_of_its_images():
    scores, families, images = drawn_runs(1, runs=1)
    ours = mean_over_seeds(scores, families, images, resamples=20000)
    theirs = mean_over_families(scores[0], families, resamples=20000, groups=images)
    assert ours == pytest.approx(theirs, abs=0.01)


def test_equal_runs_say_no_more_than_one():
    scores, families, images = drawn_runs(2, runs=1)
    one, three = (mean_over_seeds(np.repeat(scores, n, axis=0), families, images) for n in (1, 3))
    assert three == pytest.approx(one)


def test_runs_that_differ_widen_the_interval():
    # Each run is right on all questions or on none, so that images tell nothing and runs everything.
    scores = np.repeat([[0.0], [1.0], [1.0]], 12, axis=1)
    ours = mean_over_seeds(scores, ["a", "b"] * 6, np.repeat(np.arange(4), 3))
    low, high = stats.t.interval(0.95, 2, 2 / 3, stats.sem([0, 1, 1]))
    assert ours == pytest.approx((2 / 3, low, high))


@pytest.mark.parametrize("probability", [0.5, 0.9, 0.975, 0.9995])
@pytest.mark.parametrize("degrees_of_freedom", [1, 2, 4, 30, 1000])
def test_t_quantile_is_scipys(probability, degrees_of_freedom):
    expected = stats.t.ppf(probability, degrees_of_freedom)
    assert t_quantile(probability, degrees_of_freedom) == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.1])
def test_three_runs_cover_the_truth_as_often_as_they_say(spread):
    held = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        chances = 0.6 + rng.normal(0, spread, (3, 1)) + rng.normal(0, 0.1, 60).repeat(2)
        scores = (rng.uniform(size=(3, 120)) < chances).astype(float)
        _, low, high = mean_over_seeds(scores, ["a"] * 120, np.repeat(np.arange(60), 2), resamples=100, seed=seed)
        held += low <= 0.6 <= high
    assert held / 300 >= 0.92  # independent answers of the runs count twice, so it errs on the safe side


@pytest.mark.parametrize("scores, said", [([], "at least one run"), ([[1, 0], [1]], "all of the same")])
def test_runs_on_other_questions_are_refused(scores, said):
    with pytest.raises(ValueError, match=said):
        mean_over_seeds(scores, ["a", "a"], [0, 1])


def test_paired_test_by_hand():
    # Of the 2**5 ways to swap, the observed one and its mirror are the most extreme.
    found = paired_test([1] * 5, [0] * 5, permutations=100000)
    assert (found.difference, found.low, found.high) == (1, 1, 1)
    assert found.p_value == pytest.approx(2 / 32, abs=0.003)
    assert paired_test([1, 0], [1, 0]) == (0, 0, 0, 1)
    grouped = paired_test([1] * 6, [0] * 6, groups=[0, 0, 0, 1, 1, 1], permutations=100000)
    assert grouped.p_value == pytest.approx(2 / 4, abs=0.005)


def test_interval_of_the_difference_is_that_of_the_differences():
    rng = np.random.default_rng(0)
    first, second, images = rng.integers(0, 2, (2, 60)).tolist() + [np.repeat(np.arange(12), 5)]
    for groups in (None, images):
        assert paired_test(first, second, groups)[:3] == bootstrap_interval(np.subtract(first, second), groups=groups)


def test_p_value_is_never_zero():
    assert paired_test([1] * 100, [0] * 100, permutations=99).p_value == 0.01


@settings(max_examples=300, deadline=None)
@given(pairs)
def test_p_value_is_scipys(rows):
    first, second = map(np.array, zip(*rows))
    found = paired_test(first, second, permutations=5000).p_value
    expected = stats.permutation_test(
        (first, second),
        lambda a, b, axis: np.abs(np.sum(a - b, axis=axis)),
        permutation_type="samples",
        n_resamples=1000,  # more than 2**8, so all
        alternative="greater",
        vectorized=True,
    ).pvalue
    assert found == pytest.approx(expected, abs=0.04)


@settings(deadline=None)
@given(pairs)
def test_swapping_the_models_mirrors_the_test(rows):
    first, second = zip(*rows)
    found, mirrored = paired_test(first, second, permutations=200), paired_test(second, first, permutations=200)
    assert found.p_value == mirrored.p_value
    assert found.difference == pytest.approx(-mirrored.difference)
    assert found.difference == pytest.approx(np.mean(first) - np.mean(second))
    assert found[1:3] == bootstrap_interval(np.subtract(first, second))[1:]


def test_false_alarms_are_as_rare_as_the_p_value_says():
    rng = np.random.default_rng(0)
    alarms = {None: 0, "groups": 0}
    for _ in range(300):
        ease = rng.random((2, 30, 1)) < 0.5  # shared by an image's scores, not by the models
        first, second = (rng.random((2, 30, 8)) < 0.2 + 0.6 * ease).reshape(2, -1)
        for groups in alarms:
            images = np.repeat(np.arange(30), 8) if groups else None
            alarms[groups] += paired_test(first, second, images, permutations=499).p_value <= 0.05
    assert 0.02 <= alarms["groups"] / 300 <= 0.08 and alarms[None] / 300 > 0.2


# All


FUNCTIONS = {
    "interval": lambda values, families, groups, **options: bootstrap_interval(values, groups=groups, **options),
    "families": lambda values, families, groups, **options: mean_over_families(
        values, families, groups=groups, **options
    ),
    "paired": lambda values, families, groups, **options: paired_test(values, values[::-1] * 0, groups, **options),
}


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_seed_decides_and_the_order_does_not(name, grouped):
    rng = np.random.default_rng(5)
    values, families, groups = rng.random(200), rng.integers(0, 3, 200), rng.integers(0, 40, 200)
    order = rng.permutation(200)

    def run(rows, seed):
        state = np.random.get_state()[1].copy()
        result = FUNCTIONS[name](values[rows], families[rows], groups[rows] if grouped else None, seed=seed)
        assert (np.random.get_state()[1] == state).all()
        return result

    assert run(slice(None), 0) == run(slice(None), 0) == run(order, 0)
    assert run(slice(None), 0)[1:] != run(slice(None), 1)[1:]


def test_many_questions_are_drawn_in_parts_that_fit_memory(monkeypatch):
    values = np.random.default_rng(0).random(300)
    module = bootstrap_interval.__globals__
    parts = module["_chunks"]
    whole = bootstrap_interval(values), paired_test(values, 1 - values)
    monkeypatch.setitem(module, "_chunks", lambda total, width: parts(total, width, limit=1000))
    assert bootstrap_interval(values) == pytest.approx(whole[0])
    assert paired_test(values, 1 - values) == pytest.approx(whole[1])


def test_labels_may_be_text_or_numbers():
    values = [0, 1, 1, 0, 1]
    assert bootstrap_interval(values, groups=[7, 7, 9, 9, 9]) == bootstrap_interval(values, groups=list("aabbb"))


@pytest.mark.parametrize("bad", [[], [[1, 0]], 1])
def test_scores_of_another_shape_are_refused(bad):
    with pytest.raises(ValueError, match="`scores` of shape .*at least one"):
        bootstrap_interval(bad)
    with pytest.raises(ValueError, match="`scores` of shape"):
        mean_over_families(bad, [])
    with pytest.raises(ValueError, match="`second` of shape"):
        paired_test([1], bad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_refused(bad):
    with pytest.raises(ValueError, match=r"`scores`\[1\]=(nan|inf)"):
        bootstrap_interval([0, bad, 1, bad])
    with pytest.raises(ValueError, match=r"`first`\[1\]=(nan|inf)"):
        paired_test([0, bad], [0, 1])


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="`groups` of 1 for 2 scores"):
        bootstrap_interval([0, 1], groups=[0])
    with pytest.raises(ValueError, match="`families` of 3 for 2 scores"):
        mean_over_families([0, 1], ["x", "y", "z"])
    with pytest.raises(ValueError, match="`second` of 1 scores for `first` of 2"):
        paired_test([0, 1], [1])
    with pytest.raises(ValueError, match="`groups` of 3 for 2 scores"):
        paired_test([0, 1], [1, 1], groups=[0, 1, 2])


def test_other_bad_arguments_are_refused():
    for confidence in (0, 1, 95):
        with pytest.raises(ValueError, match=f"`confidence`={confidence}.*0.95"):
            bootstrap_interval([0, 1], confidence=confidence)
    with pytest.raises(ValueError, match="`resamples`=0"):
        bootstrap_interval([0, 1], resamples=0)
    with pytest.raises(ValueError, match="`permutations`=-1"):
        paired_test([0, 1], [1, 1], permutations=-1)
    with pytest.raises(ValueError, match="`groups`.*one number or string"):
        bootstrap_interval([0, 1], groups=[None, "a"])
