from hypothesis import given
from hypothesis import strategies as st

from tokenflex.research.arms import FIXED, share_of_steps
from tokenflex.research.reproduce import SIZES


@given(st.integers(1, 10**6))
def test_fixed_models_share_the_steps_to_within_rounding(steps):
    share = share_of_steps(steps)
    assert share >= 1
    assert abs(len(FIXED) * share - steps) <= len(FIXED) / 2 or steps < len(FIXED) / 2


def test_the_share_of_each_size():
    assert {name: share_of_steps(size.steps) for name, size in SIZES.items()} == {"cpu": 167, "gpu": 333}
