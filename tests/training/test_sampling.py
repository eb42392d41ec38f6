import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflex.training import draw_num_vision_tokens


CHOICES, WEIGHTS = [64, 144, 256], [2, 3, 5]
CHI_SQUARE_2_DEGREES_P_0_001 = 13.816
positions = st.tuples(st.integers(0, 2**40), st.integers(0, 10**7), st.integers(0, 512))
weight_lists = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


def draws(seed, steps=10_000, weights=WEIGHTS, micro_step=0):
    return [draw_num_vision_tokens(CHOICES, weights, seed, step, micro_step) for step in range(steps)]


def chi_square(drawn, weights=WEIGHTS):
    counted = Counter(drawn)
    expected = {choice: len(drawn) * weight / sum(weights) for choice, weight in zip(CHOICES, weights)}
    return sum((counted[choice] - expected[choice]) ** 2 / expected[choice] for choice in CHOICES)


@given(st.lists(positions, min_size=2, max_size=20), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_draw_depends_on_its_arguments_alone(asked, order):
    first = {position: draw_num_vision_tokens(CHOICES, WEIGHTS, *position) for position in asked}
    torch.manual_seed(order.randrange(2**31))
    np.random.seed(order.randrange(2**31))
    random.seed(order.randrange(2**31))
    order.shuffle(asked)
    assert {position: draw_num_vision_tokens(CHOICES, WEIGHTS, *position) for position in asked} == first


def test_draw_leaves_global_random_states_alone():
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    draws(seed=0, steps=50)
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize("seed", [0, 1, 42, 12345])
def test_frequencies_follow_the_weights(seed):
    assert chi_square(draws(seed)) < CHI_SQUARE_2_DEGREES_P_0_001


def test_frequencies_over_micro_steps_follow_the_weights():
    drawn = [draw_num_vision_tokens(CHOICES, WEIGHTS, 0, 7, micro_step) for micro_step in range(10_000)]
    assert chi_square(drawn) < CHI_SQUARE_2_DEGREES_P_0_001


def test_consecutive_steps_are_independent():
    drawn = draws(seed=3)
    for previous in CHOICES:
        followers = [after for before, after in zip(drawn, drawn[1:]) if before == previous]
        assert chi_square(followers) < CHI_SQUARE_2_DEGREES_P_0_001


def test_seeds_and_micro_steps_draw_different_sequences():
    sequences = [tuple(draws(seed, 100, micro_step=micro_step)) for seed in range(5) for micro_step in range(3)]
    assert len(set(sequences)) == len(sequences)


@pytest.mark.parametrize("scale", [0.1, 4, 1e6, 1e-6])
def test_weights_need_not_be_normalized(scale):
    assert draws(5, 2000, [scale * weight for weight in WEIGHTS]) == draws(5, 2000)


@given(positions, weight_lists, st.data())
@settings(deadline=None)
def test_zero_weight_is_never_drawn(position, weights, data):
    forbidden = data.draw(st.sets(st.integers(0, len(weights)), min_size=1, max_size=len(weights)))
    weights = [*weights, 1.0]
    weights = [0 if i in forbidden else weight for i, weight in enumerate(weights)]
    assert draw_num_vision_tokens(range(len(weights)), weights, *position) not in forbidden


@pytest.mark.parametrize(
    "choices, weights",
    [
        ([4, 16], [1.0]),
        ([4], [1.0, 2.0]),
        ([], []),
        ([4, 16], [0, 0]),
        ([4, 16], [-1, 2]),
        ([4, 16], [float("nan"), 1]),
        ([4, 16], [float("inf"), 1]),
    ],
)
def test_bad_weights_are_refused(choices, weights):
    with pytest.raises(ValueError, match="vision_token_weights"):
        draw_num_vision_tokens(choices, weights, 0, 0)
