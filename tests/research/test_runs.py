import dataclasses

import pytest
import torch

from tokenflex.research import runs as runs_module
from tokenflex.research.arms import ARMS, DOWNSAMPLED, FIXED, GELU, NESTED, PAPER
from tokenflex.research.runs import (
    BASE_SEED,
    CLAIM_TEST_SEED,
    TEST_SEED,
    TOWER_SEED,
    TRAIN_SEED,
    Run,
    Size,
    base_file,
    train_and_test,
    train_base,
)
from tokenflex.training import trainer as trainer_module
from tokenflex.training.sampling import draw_num_vision_tokens


SIZE = Size(width=32, tower_steps=2, base_steps=2, steps=4, num_images=3, batch_size=2, questions=2, test_images=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    train_base(PAPER, 0, SIZE, folder)
    train_base(GELU, 0, SIZE, folder)
    return folder


def without_time(result):
    return {name: value for name, value in result.items() if name != "cpu_seconds"}


def test_bases_of_a_seed_share_the_tower(folder):
    ours, theirs = (torch.load(base_file(folder, arm, 0), weights_only=True) for arm in (PAPER, GELU))
    tower = [name for name in ours if "vision_tower" in name]
    assert tower and all(torch.equal(ours[name], theirs[name]) for name in tower)
    connector = {name.removeprefix("model.multi_modal_projector.connector.") for name in theirs if "connector" in name}
    assert connector == {"up.weight", "up.bias", "down.weight", "down.bias"}


@pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS)
def test_every_arm_is_tested_at_its_counts_on_the_same_questions(arm, folder):
    result = train_and_test(Run(arm, 0, 2, SIZE.num_images), 2, SIZE, folder)
    assert set(result["right"]) == {str(count) for count in arm.counts}
    assert {len(right) for right in result["right"].values()} == {len(result["families"])} == {len(result["images"])}
    assert set(result["images"]) == set(range(SIZE.test_images))
    assert all(set(right) <= {0, 1} for right in result["right"].values())
    assert (result["arm"], result["steps"], result["num_images"], result["seed"]) == (arm.name, 2, 3, 0)
    assert result["losses"][-1] > 0


def test_a_run_is_a_function_of_its_seed(folder):
    run = Run(PAPER, 0, 4, SIZE.num_images)
    torch.manual_seed(7)
    first = train_and_test(run, 4, SIZE, folder)
    torch.manual_seed(8)
    assert without_time(train_and_test(run, 4, SIZE, folder)) == without_time(first)


def trained(monkeypatch, run, steps, folder):
    """The run's Trainer, after training."""
    seen = []
    train = trainer_module.TokenFlexTrainer.train
    monkeypatch.setattr(trainer_module.TokenFlexTrainer, "train", lambda self: (seen.append(self), train(self))[1])
    train_and_test(run, steps, SIZE, folder)
    return seen[0]


def test_the_tower_waits_unless_it_has_to_get_used_to_small_images(monkeypatch, folder):
    for arm, waits in ((PAPER, True), (FIXED[0], True), (DOWNSAMPLED[0], False)):
        model = trained(monkeypatch, Run(arm, 0, 2, 3), 2, folder).model
        assert any(weight.requires_grad for weight in model.model.vision_tower.parameters()) != waits
        assert all(weight.requires_grad for weight in model.model.multi_modal_projector.parameters())


def test_images_to_test_on_are_those_of_the_test_seed(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(runs_module, "predict", lambda *args, **options: asked.append(args[2]) or [])
    for size in (SIZE, dataclasses.replace(SIZE, test_seed=CLAIM_TEST_SEED)):
        train_and_test(Run(PAPER, 0, 1, SIZE.num_images), 1, size, folder)
    assert [rows.seed for rows in asked] == [TEST_SEED, CLAIM_TEST_SEED]


def test_scheme_counts_and_data_reach_the_trainer(monkeypatch, folder):
    trainer = trained(monkeypatch, Run(NESTED, 0, 3), 2, folder)
    assert trainer.data_collator.scheme == "nested" and trainer.state.global_step == 2
    assert len(trainer.train_dataset) == 2 * SIZE.batch_size  # fresh images, each seen once
    trainer = trained(monkeypatch, Run(PAPER, 0, 3, 3), 3, folder)
    assert len(trainer.train_dataset) == 3 and trainer.state.global_step == 3
    drawn = [draw_num_vision_tokens([4, 16, 36], [0.2, 0.3, 0.5], 0, step) for step in range(3)]
    assert trainer.state.log_history[-2]["num_vision_tokens"] == drawn[-1]


def test_no_seed_is_used_twice():
    ranges = [{start + seed for seed in range(1000)} for start in (TOWER_SEED, BASE_SEED, TRAIN_SEED)]
    ranges.append({TEST_SEED, CLAIM_TEST_SEED})
    assert len(set.union(*ranges)) == sum(map(len, ranges)) == 3 * 1000 + 2
    assert len({dataclasses.replace(Run(PAPER, 0, 4, 3), **other).name for other in (
        {}, {"seed": 1}, {"steps": 5}, {"num_images": None}, {"arm": NESTED}
    )}) == 5  # fmt: skip
