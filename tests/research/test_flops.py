import pytest

from tokenflex.research.arms import ARMS, DISTILL, DOWNSAMPLED, EVEN, FIXED, GELU, NESTED, PAPER
from tokenflex.research.flops import step_flops
from tokenflex.research.runs import Size


SIZE = Size(width=32, tower_steps=1, base_steps=1, steps=1, num_images=2, batch_size=2, questions=2)


@pytest.fixture(scope="module")
def flops():
    return {name: step_flops(arm, SIZE) for name, arm in ARMS.items()}


def test_a_draw_costs_the_mean_of_its_counts(flops):
    fixed = [flops[arm.name] for arm in FIXED]
    assert fixed == sorted(fixed)
    for arm in (PAPER, EVEN):
        assert flops[arm.name] == pytest.approx(sum(w * f for w, f in zip(arm.weights, fixed)))


def test_all_counts_at_once_cost_less_than_one_after_the_other(flops):
    assert max(flops[arm.name] for arm in FIXED) < flops[NESTED.name] == flops[DISTILL.name]
    assert flops[NESTED.name] < sum(flops[arm.name] for arm in FIXED)


def test_the_gelu_mlp_costs_as_much_as_swiglu(flops):
    assert flops[GELU.name] == pytest.approx(flops[PAPER.name], rel=0.01)


def test_more_images_cost_more(flops):
    larger = Size(**{**SIZE.__dict__, "batch_size": 4})
    assert 1.8 < step_flops(FIXED[0], larger) / flops[FIXED[0].name] < 2.3


def test_smaller_images_train_a_smaller_tower_pass(flops):
    small = [flops[arm.name] for arm in DOWNSAMPLED]
    assert small == sorted(small) and small[0] < flops[FIXED[0].name]
