import copy
import dataclasses
import errno
import json
import multiprocessing
import os
import random
import re
import signal
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import assert_same_weights
from transformers import AutoModelForImageTextToText, SchedulerType, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from tokenflex import TokenFlexForConditionalGeneration
from tokenflex.data.examples import Example, to_example
from tokenflex.data.synthetic import SyntheticVQA
from tokenflex.evaluation.sweep import predict, score
from tokenflex.towers.tiny import tiny_model_and_processor
from tokenflex.training.arguments import TokenFlexTrainingArguments
from tokenflex.training.collator import TokenFlexDataCollator
from tokenflex.training.lora import add_adapters, lora_config
from tokenflex.training.resume import clean_up, find_checkpoint, mark_incomplete
from tokenflex.training.trainer import TokenFlexTrainer


def make_trainer(narrow, folder, rows=None, lora=False, callbacks=(), eval_rows=None, **options):
    model, processor = copy.deepcopy(narrow[0]), narrow[1]
    if lora:
        torch.manual_seed(0)
        model = add_adapters(model, lora_config(model, rank=4, dropout=0.1))
    defaults = {"max_steps": 6, "save_strategy": "no", "logging_steps": 1, "report_to": "none", "learning_rate": 1e-3}
    options = defaults | options
    args = TokenFlexTrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        use_cpu=True,
        disable_tqdm=True,
        seed=5,
        **options,
    )
    rows = SyntheticVQA(12, 3, questions_per_image=2) if rows is None else rows
    return TokenFlexTrainer(
        model, args, processing_class=processor, train_dataset=rows, eval_dataset=eval_rows, callbacks=callbacks
    )


def always_yes(num_rows):
    scenes = SyntheticVQA(num_rows, 3)
    return [to_example({"image": scene["image"], "question": "?", "answer": "yes"}) for scene in scenes]


def weights(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"packing": True},
        {"lora": True},
        {"lora": True, "packing": True},
        {"scheme": "sample"},
        {"scheme": "distill"},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_resumed_weights_are_bit_equal_at_every_step(narrow, tmp_path, options):
    """Six steps are two epochs of three: the resume falls into, between and behind epochs."""
    whole = make_trainer(narrow, tmp_path, save_strategy="steps", save_steps=1, **options)
    whole.train()
    for step in (1, 3, 4):
        resumed = make_trainer(narrow, tmp_path / "again", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_weights(weights(resumed), weights(whole))
        assert resumed.vision_tokens.histogram == whole.vision_tokens.histogram


def test_packed_training_takes_the_steps_that_unpacked_training_takes(narrow, tmp_path):
    text = Example(
        [], [[{"role": role, "content": [{"type": "text", "text": role * 9}]} for role in ("user", "assistant")]]
    )
    drawn = SyntheticVQA(9, 3, questions_per_image=3)
    rows = [drawn[i] for i in range(9)] + [text] * 3
    runs = [make_trainer(narrow, tmp_path, rows=rows, packing=packing) for packing in (False, True)]
    for run in runs:
        run.train()
    losses = [[log["loss"] for log in run.state.log_history if "loss" in log] for run in runs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    for name, weight in weights(runs[0]).items():
        torch.testing.assert_close(weights(runs[1])[name], weight, rtol=1e-3, atol=1e-4, msg=name)


def test_logs_hold_what_was_trained_on(narrow, tmp_path):
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer = make_trainer(narrow, tmp_path, callbacks=[Reporter()])
    trainer.callback_handler.callbacks.sort(
        key=lambda callback: not isinstance(callback, Reporter)
    )  # as report_to's are
    trainer.train()
    steps = [logs for logs in seen if "loss" in logs]
    assert len(steps) == 6
    for logs in steps:
        assert logs["num_vision_tokens"] in (4, 16, 36)
        assert logs["tokens_per_second"] > logs["images_per_second"] > 0 and logs["skipped_rows"] == 0
    totals = trainer.vision_tokens.totals
    assert float(totals["images"]) == 24
    assert float(totals["vision_tokens"]) == sum(4 * logs["num_vision_tokens"] for logs in steps)
    assert sum(trainer.vision_tokens.histogram.values()) == 6


def test_skipped_rows_are_counted_whatever_reads_them(narrow, tmp_path):
    rows = [dataclasses.replace(row, skipped=i % 3) for i, row in enumerate(always_yes(12))]
    trainer = make_trainer(narrow, tmp_path, rows=rows, max_steps=3, dataloader_num_workers=1)
    trainer.train()
    assert trainer.state.log_history[2]["skipped_rows"] == 12
    assert trainer.evaluate(rows[:2])["eval_accuracy"] >= 0


def test_parts_learn_at_their_own_rates(narrow, tmp_path):
    rates = {"vision_tower_learning_rate": 1e-5, "projector_learning_rate": 1e-2}
    trainer = make_trainer(narrow, tmp_path, **rates)
    trainer.create_optimizer()
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    seen = set()
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            part = names[parameter].split(".")[1]
            assert group["lr"] == {"vision_tower": 1e-5, "multi_modal_projector": 1e-2}.get(part, 1e-3)
            assert (group["weight_decay"] == 0) or parameter.ndim > 1
            seen.add(names[parameter])
    assert seen == set(names.values())
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] == 0, "the schedule drives every group"


def test_evaluation_while_training_scores_every_count_and_keeps_the_best(narrow, tmp_path):
    rows = always_yes(4)
    options = {
        "learning_rate": 3e-3,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    trainer = make_trainer(
        narrow,
        tmp_path,
        rows,
        eval_rows=rows,
        load_best_model_at_end=True,
        save_total_limit=1,
        max_steps=30,
        **options,
    )
    trainer.train()
    logged = [log for log in trainer.state.log_history if "eval_accuracy" in log]
    assert len(logged) == 15
    for log in logged:
        assert log["eval_accuracy"] == pytest.approx(sum(log[f"eval_{n}_accuracy"] for n in (4, 16, 36)) / 3)
    best = max(logged, key=lambda log: log["eval_accuracy"])
    assert trainer.state.best_metric == best["eval_accuracy"] > 0
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{trainer.state.best_global_step}")
    assert os.path.isdir(trainer.state.best_model_checkpoint)
    predictions = predict(trainer.model, narrow[1], rows, [4, 16, 36], show_progress=False)
    overall = score(predictions, [4, 16, 36])["overall"]
    assert sum(overall.values()) / 3 == pytest.approx(best["eval_accuracy"])


def test_several_evaluation_sets_are_told_apart(narrow, tmp_path):
    sets = {"seen": SyntheticVQA(2, 3), "new": SyntheticVQA(2, 9)}
    metrics = make_trainer(narrow, tmp_path, eval_rows=sets).evaluate()
    assert {"eval_seen_accuracy", "eval_seen_4_accuracy", "eval_new_accuracy"} <= metrics.keys()
    assert metrics["eval_accuracy"] == (metrics["eval_seen_accuracy"] + metrics["eval_new_accuracy"]) / 2


def test_reports_go_to_tensorboard_with_all_figures(narrow, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    make_trainer(narrow, tmp_path, report_to="tensorboard", max_steps=2).train()
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    wanted = {"loss", "num_vision_tokens", "tokens_per_second", "images_per_second", "skipped_rows"}
    assert wanted <= {tag.removeprefix("train/") for tag in events.Tags()["scalars"]}


def steps_saved(folder):
    return {int(path.name.rsplit("-", 1)[1]) for path in folder.glob("checkpoint-*")}


class FullDisk(dict):
    """A scheduler's state that cannot be written."""

    def __reduce__(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_checkpoints_that_were_there(narrow, tmp_path):
    class FillAtFour(TrainerCallback):
        def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
            if state.global_step == 4:
                lr_scheduler.state_dict = FullDisk

    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    with pytest.raises(OSError, match="No space left"):
        make_trainer(narrow, tmp_path, callbacks=[FillAtFour()], **options).train()
    assert (tmp_path / "checkpoint-4" / "model.safetensors").is_file()
    whole = make_trainer(narrow, tmp_path / "whole")
    whole.train()
    resumed = make_trainer(narrow, tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert [log["step"] for log in resumed.state.log_history if "loss" in log] == [1, 2, 3, 4, 5, 6]
    assert steps_saved(tmp_path) == {6}
    assert_same_weights(weights(resumed), weights(whole))


def test_what_is_marked_as_incomplete_is_deleted_and_nothing_else(narrow, tmp_path):
    for step in (2, 3, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    mark_incomplete(tmp_path / "checkpoint-3")
    mark_incomplete(tmp_path / "checkpoint-5")
    clean_up(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]


def test_half_a_checkpoint_of_another_folder_is_not_gone_on_from(narrow, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make_trainer(narrow, tmp_path / "killed", **options).train()
    mark_incomplete(tmp_path / "killed" / "checkpoint-2")
    half = f"{tmp_path}/killed/checkpoint-2/"
    with pytest.raises(ValueError, match="half a checkpoint"):
        make_trainer(narrow, tmp_path / "new", **options).train(half)
    with pytest.raises(ValueError, match="is no checkpoint of a training run"):
        find_checkpoint(half, tmp_path / "new", {})


def test_what_is_saved_by_hand_after_an_interruption_is_whole(narrow, tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer = make_trainer(narrow, tmp_path, callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.save_model(str(tmp_path / "checkpoint-1"))
    clean_up(tmp_path)
    AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint-1")


def test_a_checkpoint_that_is_written_again_is_incomplete_meanwhile(narrow, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(narrow, tmp_path, **options).train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
            lr_scheduler.state_dict = FullDisk

    with pytest.raises(OSError, match="No space left"):
        make_trainer(narrow, tmp_path, callbacks=[Stop()], **options).train(str(tmp_path / "checkpoint-2"))
    clean_up(tmp_path)
    assert steps_saved(tmp_path) == {2, 6}


def test_the_last_checkpoints_are_kept(narrow, tmp_path):
    make_trainer(narrow, tmp_path, save_strategy="steps", save_steps=1, save_total_limit=2).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", "checkpoint-6"]


def test_arguments_and_collator_have_to_agree(narrow, tmp_path):
    args = TokenFlexTrainingArguments(str(tmp_path), scheme="nested", use_cpu=True, report_to="none")
    collator = TokenFlexDataCollator(narrow[1])
    with pytest.raises(ValueError, match="the `data_collator` says 'batch' and False"):
        TokenFlexTrainer(narrow[0], args, collator, processing_class=narrow[1])


def test_arguments_in_each_others_places_are_refused(narrow, tmp_path):
    (model, processor), args = narrow, TokenFlexTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    collator = TokenFlexDataCollator(processor)
    for arguments, message in (
        ((args, model), "`args` is a TokenFlexForConditionalGeneration: give a TokenFlexTrainingArguments"),
        ((model, TrainingArguments(str(tmp_path))), "`args` is a TrainingArguments: give a TokenFlexTrainingArg"),
        ((model, args, processor), "`data_collator` is a TokenFlexProcessor: give a TokenFlexDataCollator"),
        ((model, collator, args), "`args` is a TokenFlexDataCollator"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenFlexTrainer(*arguments, processing_class=processor)


@pytest.mark.parametrize("part", ["multi_modal_projector", "language_model"])
def test_checkpoints_of_mixed_dtypes_resume_and_load_unrounded(narrow, tmp_path, part):
    def train(folder, resume=None):
        model = copy.deepcopy(narrow[0]).to(torch.bfloat16)
        getattr(model.model, part).float()
        collator = TokenFlexDataCollator(narrow[1])
        args = TrainingArguments(
            str(folder), max_steps=2, save_steps=1, learning_rate=1e-3, per_device_train_batch_size=2,
            report_to="none", use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        rows = SyntheticVQA(8, 1, questions_per_image=1)
        trainer = Trainer(model, args, data_collator=collator, callbacks=[collator.callback], train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train(tmp_path / "whole")
    resumed = train(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-1"))
    assert_same_weights(resumed.model.state_dict(), whole.model.state_dict())
    whole.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "whole" / "checkpoint-2", tmp_path / "final"):
        loaded = TokenFlexForConditionalGeneration.from_pretrained(folder).state_dict()
        assert_same_weights(loaded, {name: weight.float() for name, weight in whole.model.state_dict().items()})


def _train_in_child(folder, packing):
    torch.set_num_threads(1)
    narrow = tiny_model_and_processor(width=32)
    trainer = make_trainer(
        narrow, folder, max_steps=40, save_strategy="steps", save_steps=2, save_total_limit=2, packing=packing
    )
    clean_up(folder)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))
    trainer.save_model(f"{folder}/end")


@pytest.mark.parametrize("packing", [False, True])
def test_runs_killed_at_random_moments_end_with_the_weights_of_one_left_alone(tmp_path, packing):
    """Five `kill -9`s in each case, half of them aimed at a checkpoint that is being written."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tokenflex.training.trainer", "tokenflex.training.lora", __name__])
    os.makedirs(tmp_path / "killed")
    rng, reached, killed = random.Random(packing), 0, 0
    while killed < 5:
        process = context.Process(target=_train_in_child, args=(str(tmp_path / "killed"), packing))
        process.start()
        aim = reached + rng.randint(1, 4)
        while process.is_alive() and killed < 5:
            names = os.listdir(tmp_path / "killed")
            saved = [int(found[1]) for name in names if (found := re.fullmatch(r"checkpoint-(\d+)", name))]
            writing = any(name.endswith(".incomplete") for name in names)
            if max(saved, default=0) >= aim and (writing or rng.random() < 0.001):
                os.kill(process.pid, signal.SIGKILL)
                killed += 1
                break
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0)
        clean_up(tmp_path / "killed")
        last = get_last_checkpoint(tmp_path / "killed")
        if last is not None:
            step = json.loads(Path(last, "trainer_state.json").read_text())["global_step"]
            assert step >= reached, "work before the last checkpoint is never lost"
            assert step == int(last.rsplit("-", 1)[1])
            reached = step
            for name in os.listdir(tmp_path / "killed"):
                if name.startswith("checkpoint-"):
                    AutoModelForImageTextToText.from_pretrained(tmp_path / "killed" / name)
    for folder in ("killed", "whole"):
        os.makedirs(tmp_path / folder, exist_ok=True)
        process = context.Process(target=_train_in_child, args=(str(tmp_path / folder), packing))
        process.start()
        process.join()
        assert process.exitcode == 0
    ends = [AutoModelForImageTextToText.from_pretrained(tmp_path / folder / "end") for folder in ("killed", "whole")]
    assert_same_weights(*(dict(model.named_parameters()) for model in ends))
    assert not list((tmp_path / "killed").glob("*.incomplete"))


def test_metrics_that_would_never_be_asked_for_are_refused(narrow, tmp_path):
    model, processor = narrow
    args = TokenFlexTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    for name in ("compute_metrics", "preprocess_logits_for_metrics"):
        with pytest.raises(ValueError, match=f"`{name}` is given, but the evaluation generates answers"):
            TokenFlexTrainer(model, args, processing_class=processor, **{name: len})


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_rows_are_grouped_by_lengths_only_if_these_are_given(narrow, tmp_path, strategy):
    rows = [{"question": "which?", "answer": "a" * (n % 7 + 1), "length": n % 7} for n in range(8)]
    options = {"train_sampling_strategy": strategy, "max_steps": 1}
    with pytest.raises(ValueError, match=f"`train_sampling_strategy`='{strategy}'.*a column 'length'"):
        make_trainer(narrow, tmp_path, rows=rows, **options)
    make_trainer(narrow, tmp_path, rows=Dataset.from_list(rows), **options).train()


@pytest.mark.parametrize("scheduler", ["reduce_lr_on_plateau", "greedy"])
def test_schedulers_that_watch_wait_for_more_accuracy(narrow, tmp_path, scheduler):
    if scheduler not in list(SchedulerType):
        pytest.skip("this release of transformers has no such scheduler")
    rows = SyntheticVQA(2, 4)
    options = {"lr_scheduler_type": scheduler, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    trainer = make_trainer(narrow, tmp_path, eval_rows=rows, **options)
    trainer.train()
    assert (trainer.args.metric_for_best_model, trainer.lr_scheduler.mode) == ("accuracy", "max")
    options["lr_scheduler_kwargs"] = {"mode": "min"}
    assert make_trainer(narrow, tmp_path, eval_rows=rows, **options).args.lr_scheduler_kwargs["mode"] == "min"
