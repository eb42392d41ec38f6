"""`tokenflex train` as a command: stages, recipes, going on where it was stopped."""

import hashlib
import json
import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.checkpoints.provenance import add_stage, read_provenance, untrained_tokens
from tokenflex.towers.tiny import tiny_model_and_processor
from tokenflex.training.arguments import RECIPES
from tokenflex.training.lora import merge_adapters
from tokenflex.training.resume import find_checkpoint
from tokenflex.training.train import freeze_parts, main


SHIPPED = sorted(path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.yaml"))
PART_OF_HEAD = {"lm_head.weight": "language_model"}
TRAINED = {
    "full/stage1.yaml": {"multi_modal_projector"},
    "full/stage2.yaml": {"vision_tower", "multi_modal_projector"},
    "full/stage3.yaml": {"vision_tower", "multi_modal_projector", "language_model"},
    "small/stage1.yaml": {"multi_modal_projector", "language_model"},
    "small/stage2.yaml": {"vision_tower", "multi_modal_projector", "language_model"},
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "checkpoint"
    save_checkpoint(folder, *tiny_model_and_processor(width=32))
    return folder


def command(start, output_dir, *options, steps=4):
    main([
        "--model_name_or_path", str(start), "--output_dir", str(output_dir), "--dataset", "synthetic:12",
        "--max_steps", str(steps), "--per_device_train_batch_size", "2", "--use_cpu", "true", "--bf16", "false",
        "--report_to", "none", "--disable_tqdm", "true", "--dataloader_num_workers", "0", *map(str, options),
    ])  # fmt: skip


def hashes(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    return {name: hashlib.sha256(weight.numpy().tobytes()).hexdigest() for name, weight in model.state_dict().items()}


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize("recipe", TRAINED)
def test_a_stage_changes_exactly_the_parameters_it_says(start, tmp_path, recipe):
    command(
        start, tmp_path, "--config", recipe, "--learning_rate", "0.01", "--warmup_steps", "1", "--weight_decay", "0.1"
    )
    before = hashes(start)
    moved = changed(before, hashes(tmp_path / "final"))
    trained = {name for name in before if PART_OF_HEAD.get(name, name.split(".")[1]) in TRAINED[recipe]}
    assert moved == trained


def test_every_recipe_that_trains_weights_in_full_is_tested():
    assert set(SHIPPED) == {*TRAINED, "adopt/tune.yaml"}, "adapters are merged in `tests/evaluation/test_label.py`"


def test_three_stages_are_one_command_that_can_be_given_again(start, tmp_path, caplog):
    recipes = ["--config", *(f"full/stage{i}.yaml" for i in (1, 2, 3)), "--save_strategy", "no"]
    command(start, tmp_path, *recipes, steps=2)
    finals = [hashes(tmp_path / f"stage{i}" / "final") for i in (1, 2, 3)]
    assert {name.split(".")[1] for name in changed(finals[0], finals[1])} == {"vision_tower", "multi_modal_projector"}
    written = [(tmp_path / f"stage{i}" / "final" / "model.safetensors").stat().st_mtime_ns for i in (1, 2, 3)]
    shutil.rmtree(tmp_path / "stage3" / "final")
    command(start, tmp_path, *recipes, steps=2)
    again = [(tmp_path / f"stage{i}" / "final" / "model.safetensors").stat().st_mtime_ns for i in (1, 2, 3)]
    assert again[:2] == written[:2] and again[2] != written[2]
    assert caplog.text.count("this run has ended") == 2
    assert hashes(tmp_path / "stage3" / "final") == finals[2]
    alone = ["--config", "full/stage2.yaml", "--save_strategy", "no"]
    command(tmp_path / "stage1" / "final", tmp_path / "alone", *alone, steps=2)
    assert hashes(tmp_path / "alone" / "final") == finals[1], "a stage begins with the checkpoint of the one before"


def test_a_slip_in_the_last_recipe_shows_before_the_first_stage(start, tmp_path):
    (tmp_path / "bad.yaml").write_text("packign: true")
    with pytest.raises(ValueError, match="Did you mean `packing`"):
        command(start, tmp_path / "out", "--config", "small/stage1.yaml", tmp_path / "bad.yaml")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [(), ("--packing", "true"), ("--lora_rank", "4", "--lora_dropout", "0.1")])
def test_the_same_command_goes_on_where_it_was_stopped(start, tmp_path, options):
    options = (*options, "--save_strategy", "steps", "--save_steps", "2")
    command(start, tmp_path / "whole", *options)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for rest in ("final", "checkpoint-4", "adapter"):
        shutil.rmtree(tmp_path / "stopped" / rest, ignore_errors=True)
    (tmp_path / "stopped" / "checkpoint-3").mkdir()
    (tmp_path / "stopped" / "checkpoint-3.incomplete").touch()
    command(start, tmp_path / "stopped", *options)
    assert hashes(tmp_path / "stopped" / "final") == hashes(tmp_path / "whole" / "final")
    state = json.loads((tmp_path / "stopped" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    assert not (tmp_path / "stopped" / "checkpoint-3").exists()


def save_each(*steps):
    return ("--save_strategy", "steps", "--save_steps", *steps, "--lr_scheduler_type", "constant")


def test_a_longer_run_goes_on_from_a_shorter_one(start, tmp_path):
    command(start, tmp_path / "grown", *save_each(2), steps=2)
    command(start, tmp_path / "grown", *save_each(2), steps=4)
    command(start, tmp_path / "whole", *save_each(2), steps=4)
    assert hashes(tmp_path / "grown" / "final") == hashes(tmp_path / "whole" / "final")


def test_a_longer_run_that_is_stopped_is_not_taken_for_ended(start, tmp_path):
    command(start, tmp_path / "run", *save_each(2), steps=2)
    config = tmp_path / "run" / "final" / "config.json"
    config.rename(tmp_path / "config.json")
    with pytest.raises(ValueError, match="which holds other things"):
        command(start, tmp_path / "run", *save_each(2), steps=4)
    (tmp_path / "config.json").rename(config)
    command(start, tmp_path / "run", *save_each(2), steps=4)
    command(start, tmp_path / "whole", *save_each(2), steps=4)
    assert hashes(tmp_path / "run" / "final") == hashes(tmp_path / "whole" / "final")


@pytest.mark.parametrize("option", ["--learning_rate", "--projector_learning_rate"])
def test_another_run_is_not_begun_in_a_folder_that_holds_one(start, tmp_path, option):
    command(start, tmp_path, *save_each(4))
    before = hashes(tmp_path / "final")
    with pytest.raises(ValueError, match=f"holds another run, which differs in `{option[2:]}` .*not 0.5"):
        command(start, tmp_path, *save_each(4), option, "0.5")
    with pytest.raises(ValueError, match=r"differs in `max_steps` \(4, not 2\)"):
        command(start, tmp_path, *save_each(4), steps=2)
    with pytest.raises(ValueError, match="would be mixed"):
        command(start, tmp_path, *save_each(4), "--resume_from_checkpoint", "false")
    assert hashes(tmp_path / "final") == before


def test_a_folder_of_another_model_is_not_gone_on_from(start, tmp_path):
    command(start, tmp_path / "run", *save_each(4))
    explicitly = ("--resume_from_checkpoint", tmp_path / "run" / "checkpoint-4")
    save_checkpoint(tmp_path / "wider", *tiny_model_and_processor(width=64))
    with pytest.raises(ValueError, match="differs in `model_name_or_path`"):
        command(tmp_path / "wider", tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"another model, which differs in .*vision_config.hidden_size \(32, not 64\)"
    ):
        command(tmp_path / "wider", tmp_path / "other", *explicitly)
    with pytest.raises(ValueError, match="holds a whole model, but adapters are to be trained"):
        command(start, tmp_path / "other", *explicitly, "--lora_rank", "4")
    command(start, tmp_path / "lora", *save_each(4), "--lora_rank", "4")
    explicitly = ("--resume_from_checkpoint", tmp_path / "lora" / "checkpoint-4")
    with pytest.raises(ValueError, match=r"differs in r \(4, not 8\)"):
        command(start, tmp_path / "other", *explicitly, "--lora_rank", "8")
    with pytest.raises(ValueError, match="differs in target_modules"):
        command(start, tmp_path / "other", *explicitly, "--lora_rank", "4", "--lora_vision_tower", "true")


def test_checkpoints_that_are_not_there_are_named(tmp_path):
    assert find_checkpoint("auto", tmp_path, {}) is None and find_checkpoint("false", tmp_path, {}) is None
    with pytest.raises(ValueError, match="holds no checkpoint"):
        find_checkpoint("true", tmp_path, {})
    with pytest.raises(ValueError, match="is no checkpoint of a training run"):
        find_checkpoint(str(tmp_path), tmp_path, {})


def test_a_stage_notices_that_the_one_before_it_was_trained_anew(start, tmp_path):
    recipes = ["--config", "small/stage1.yaml", "small/stage2.yaml", "--save_strategy", "no"]
    command(start, tmp_path, *recipes, steps=2)
    shutil.rmtree(tmp_path / "stage1")
    with pytest.raises(ValueError, match="stage2 holds another run, which differs in `start`"):
        command(start, tmp_path, *recipes, steps=2)


def test_stages_that_cannot_be_told_apart_are_refused(start, tmp_path):
    with pytest.raises(ValueError, match="names the stages stage1, stage1"):
        command(start, tmp_path, "--config", "small/stage1.yaml", "full/stage1.yaml")
    with pytest.raises(ValueError, match="with several stages: use auto"):
        command(
            start, tmp_path, "--config", "small/stage1.yaml", "small/stage2.yaml", "--resume_from_checkpoint", "true"
        )


def test_a_stream_is_found_again_behind_its_first_epoch(start, tmp_path):
    rows = [json.dumps({"question": f"{i}?", "answer": str(i) * (i % 5 + 1)}) for i in range(7)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, "{broken"]))
    options = ("--dataset", tmp_path / "rows.jsonl", "--streaming", "true", "--on_bad_row", "skip", *save_each(1))
    command(start, tmp_path / "whole", *options, steps=9)
    for step in (2, 5):
        shutil.copytree(tmp_path / "whole", tmp_path / str(step))
        for later in (*range(step + 1, 10), None):
            shutil.rmtree(tmp_path / str(step) / (f"checkpoint-{later}" if later else "final"))
        command(start, tmp_path / str(step), *options, steps=9)
        assert hashes(tmp_path / str(step) / "final") == hashes(tmp_path / "whole" / "final")


def test_adapters_train_and_are_merged_into_a_checkpoint(start, tmp_path):
    command(start, tmp_path, "--lora_rank", "4", "--learning_rate", "0.01")
    moved = changed(hashes(start), hashes(tmp_path / "final"))
    assert {name for name in moved if "multi_modal_projector" in name}
    assert all("multi_modal_projector" in name or name.endswith("_proj.weight") for name in moved)
    assert not any("vision_tower" in name for name in moved)
    merged = merge_adapters(start, tmp_path / "adapter").state_dict()
    final = AutoModelForImageTextToText.from_pretrained(tmp_path / "final")
    assert all(torch.equal(weight, merged[name]) for name, weight in final.state_dict().items())
    with pytest.raises(ValueError, match="Leave `freeze` out"):
        command(start, tmp_path / "other", "--lora_rank", "4", "--freeze", "vision_tower")
    with pytest.raises(ValueError, match="Give a `lora_rank`"):
        command(start, tmp_path / "other", "--load_in_4bit", "true")


@pytest.mark.parametrize("keeping", [("--freeze", "language_model"), ("--lora_rank", "4")])
def test_new_tokens_are_named_until_a_stage_trains_them(tmp_path, caplog, keeping):
    built = add_stage({"base_models": [], "stages": []}, "new projector", new_tokens=["<|im_start|>", "<|im_end|>"])
    save_checkpoint(tmp_path / "built", *tiny_model_and_processor(width=32), provenance=built)
    warning, warned = "<|im_start|> and <|im_end|>, which chats are written with, are new", []
    stages = [keeping, keeping, ("--freeze", "vision_tower"), keeping]
    start = tmp_path / "built"
    for number, options in enumerate(stages):
        caplog.clear()
        command(start, tmp_path / str(number), *options, steps=1)
        warned.append(warning in caplog.text)
        start = tmp_path / str(number) / "final"
    assert warned == [True, True, False, False]
    assert untrained_tokens(read_provenance(start)) == []


def test_mixed_streamed_and_long_rows_train_from_the_command_line(start, tmp_path):
    turns = [{"from": "human", "value": "tell me"}, {"from": "gpt", "value": "and so on " * 300}]
    lines = [json.dumps({"conversations": turns}), "{broken", json.dumps({"question": "two?", "answer": "four"})]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines * 3))
    for number, options in enumerate(
        [("--on_long_row", "truncate"), ("--on_long_row", "skip", "--streaming", "true")]
    ):
        out = tmp_path / str(number)
        sets = ("--dataset", tmp_path / "rows.jsonl", "synthetic:6", "--dataset_weights", "2", "1")
        if number == 1:
            sets = ("--dataset", tmp_path / "rows.jsonl")
        limits = ("--max_length", "128", "--on_bad_row", "skip", "--logging_steps", "1", "--save_steps", "4")
        command(start, out, *sets, *limits, *options)
        state = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())
        skipped = [log["skipped_rows"] for log in state["log_history"] if "skipped_rows" in log]
        assert (skipped[-1] > 0) == (number == 1)


def test_the_command_evaluates_at_every_count_and_keeps_the_best(start, tmp_path):
    options = ("--eval_dataset", "synthetic:2@9", "--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "2")
    command(start, tmp_path, *options, "--load_best_model_at_end", "true")
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    logged = [log for log in state["log_history"] if "eval_accuracy" in log]
    assert len(logged) == 2 and {"eval_4_accuracy", "eval_16_accuracy", "eval_36_accuracy"} <= logged[0].keys()
    assert hashes(tmp_path / "final") == hashes(state["best_model_checkpoint"])


def test_weights_that_features_do_not_depend_on_are_not_trained():
    model = tiny_model_and_processor(width=32)[0]
    model.config.vision_feature_layer = model.model.config.vision_feature_layer = 1
    freeze_parts(model, [])
    idle = {name for name, weight in model.model.vision_tower.named_parameters() if not weight.requires_grad}
    assert idle and all(name.startswith(("encoder.layers.1", "encoder.layers.2", "post_layernorm")) for name in idle)
    batch = {"input_ids": torch.tensor([[7, 8, 9]]), "labels": torch.tensor([[7, 8, 9]])}
    model.train()(**batch).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)
