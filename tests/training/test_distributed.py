import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import tokenflex.training
from tokenflex.towers.tiny import VISION_TOKEN_CHOICES, VISION_TOKEN_WEIGHTS
from tokenflex.training import draw_num_vision_tokens


CONFIGS = Path(tokenflex.training.__file__).parent / "accelerate"
WORKER = Path(__file__).with_name("distributed_worker.py")
SCENARIOS = [
    "schemes",
    "workers",
    "accumulation",
    "resume",
    "freeze",
    "adapters",
    "resolutions",
    "features",
    "evaluate",
    "command",
]
SAME_DATA = ["batch", "sample", "nested", "sample-whole", "sample-split", "batch-whole", "batch-split"]
SAME_DATA += ["uninterrupted", "tower-frozen", "alignment", "checkpointing", "clip", "evaluated", "pairs"]


def run(folder, *launcher):
    command = [sys.executable, *map(str, launcher), str(WORKER), str(folder), *SCENARIOS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-10_000:]
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def strategy(request):
    return request.param


@pytest.fixture(scope="module")
def together(strategy, tmp_path_factory):
    """Two processes, as the shipped config starts them, without the bf16 that would blur what is compared."""
    options = ["--num_processes", 2, "--mixed_precision", "no", "--main_process_port", 0]
    config = CONFIGS / f"{strategy}.yaml"
    folder = tmp_path_factory.mktemp(strategy)
    return run(folder, "-m", "accelerate.commands.launch", "--config_file", config, *options)


def read(folder, name, rank=0):
    return json.loads((folder / f"{name}.{rank}.json").read_text())


def losses(folder, name):
    return [log["loss"] for log in read(folder, name)["log"] if "loss" in log]


def assert_close_weights(first, second, atol):
    torch.testing.assert_close(load_file(first), load_file(second), rtol=0, atol=atol)


def assert_same_training(first, second):
    """Both are pairs of a folder and a run in it."""
    assert losses(*first) == pytest.approx(losses(*second), abs=1e-4)
    files = [folder / f"{name}.safetensors" for folder, name in (first, second)]
    assert_close_weights(*files, atol=1e-4)


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda config: config.stem)
def test_shipped_config_says_nothing_that_accelerate_does_not_know(config):
    loaded = load_config_from_file(str(config))
    args = launch_command_parser().parse_args(["--config_file", str(config), "--num_processes", "2", "train.py"])
    options = [*loaded.fsdp_config, *loaded.deepspeed_config]
    assert set(options) <= vars(args).keys()
    args, *_ = _validate_launch_command(args)
    assert {**loaded.fsdp_config, **loaded.deepspeed_config} == {name: getattr(args, name) for name in options}


def test_processes_run_as_the_config_says(strategy, together):
    assert read(together, "batch")["distributed_type"] == {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}[strategy]


def test_some_micro_batches_hold_no_image_on_one_process_and_some_on_none(together):
    counts = zip(read(together, "batch", 0)["counts"], read(together, "batch", 1)["counts"])
    without_image = [sum(drawn is None for drawn in pair) for pair in counts]
    assert {0, 1, 2} == set(without_image)


@pytest.mark.parametrize("name", SAME_DATA)
def test_two_processes_train_as_one(alone, together, name):
    assert_same_training((alone, name), (together, name))


def test_a_frozen_teacher_teaches_processes_as_one_or_is_refused_where_weights_are_shared_out(
    strategy, alone, together
):
    if strategy == "fsdp2":
        assert "under FSDP" in (together / "from-base.error").read_text()
    else:
        assert_same_training((alone, "from-base"), (together, "from-base"))


def test_all_pairs_in_one_step_train_as_one_or_are_refused_where_weights_are_shared_out(strategy, alone, together):
    if strategy == "fsdp2":
        assert "`scheme`='nested' with `vision_token_choices`=" in (together / "pairs-nested.error").read_text()
    else:
        assert_same_training((alone, "pairs-nested"), (together, "pairs-nested"))


def test_processes_keep_features_in_one_folder_or_are_refused_where_weights_are_shared_out(strategy, alone, together):
    if strategy == "fsdp2":
        assert "`cache_features`=" in (together / "features.error").read_text()
        return
    names = [{path.name for path in (folder / "features").rglob("*.safetensors")} for folder in (alone, together)]
    assert names[0] == names[1] != set()
    for name in ("features-new", "features-kept"):
        assert_same_training((alone, "tower-frozen"), (together, name))


@pytest.mark.parametrize("scheme", ["sample", "batch"])
def test_training_does_not_depend_on_how_a_step_is_split(alone, together, scheme):
    for folder in (alone, together):
        assert_same_training((alone, f"{scheme}-whole"), (folder, f"{scheme}-split"))


@pytest.mark.parametrize("name", ["batch", "workers-1", "workers-2", "uninterrupted"])
def test_counts_are_a_function_of_seed_and_step_alone(alone, together, name):
    place = (list(VISION_TOKEN_CHOICES), list(VISION_TOKEN_WEIGHTS), 5)
    for folder, ranks in ((alone, 1), (together, 2)):
        assert len(losses(folder, name)) >= 4
        for rank in range(ranks):
            for step, counts in enumerate(read(folder, name, rank)["counts"]):
                assert set(counts or []) <= {draw_num_vision_tokens(*place, step)}


def test_samples_are_drawn_for_as_in_one_process(alone, together):
    shares = [read(together, "sample", rank)["counts"] for rank in range(2)]
    whole = read(alone, "sample")["counts"]
    assert [(first or []) + (second or []) for first, second in zip(*shares)] == [counts or [] for counts in whole]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_resumed_training_equals_uninterrupted(together, step):
    for rank in range(2):
        whole, resumed = read(together, "uninterrupted", rank), read(together, f"resumed-{step}", rank)
        assert resumed["counts"] == whole["counts"][step:]
    assert losses(together, f"resumed-{step}") == losses(together, "uninterrupted")
    files = [together / f"{name}.safetensors" for name in ("uninterrupted", f"resumed-{step}")]
    assert_close_weights(*files, atol=0)


def test_no_half_checkpoint_is_left(together):
    left = {path.name for path in (together / "uninterrupted").iterdir()}
    assert left == {f"checkpoint-{step}" for step in range(1, 5)}


def test_scores_are_those_of_one_process(alone, together):
    scores = [
        [{key: log[key] for key in log if key.endswith("accuracy")} for log in read(folder, "evaluated")["log"]]
        for folder in (alone, together)
    ]
    assert scores[0] == scores[1]
    assert 0 < [score["eval_16_accuracy"] for score in scores[0] if score][-1] < 1


def test_command_writes_a_whole_model(alone, together):
    folders = [alone / "command" / "final", together / "command" / "final", together / "start"]
    one, both, start = (AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in folders)
    torch.testing.assert_close(both, one, rtol=0, atol=1e-4)
    assert not torch.equal(both["lm_head.weight"], start["lm_head.weight"])
    assert torch.equal(both["lm_head.weight"], both["model.language_model.embed_tokens.weight"])
    assert not list((together / "command").glob("*.incomplete"))
