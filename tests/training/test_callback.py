import contextlib
import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import Siglip2VisionConfig, Trainer, TrainerCallback, TrainingArguments

from tokenflex import TokenFlexForConditionalGeneration
from tokenflex.data.synthetic import SyntheticVQA, draw_scene
from tokenflex.training import TokenFlexDataCollator, draw_num_vision_tokens


class Recorder:
    """The counts that the model really ran at, in training and in evaluation."""

    def __init__(self, model):
        self.trained, self.evaluated = [], []
        model.model.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, module, args, kwargs):
        if kwargs.get("vision_token_grids") is None:  # a question asked while training
            return
        counts = set(kwargs["vision_token_grids"].prod(-1).tolist())
        assert len(counts) == 1
        (self.trained if module.training else self.evaluated).append(counts.pop())


def run(narrow, folder, resume=None, collator_arguments=(), rows=None, callbacks=(), **options):
    model, processor = copy.deepcopy(narrow[0]), narrow[1]
    recorder = Recorder(model)
    collator = TokenFlexDataCollator(processor, *collator_arguments)
    options = {"max_steps": 6, "save_strategy": "no", "seed": 5, "per_device_train_batch_size": 2, **options}
    args = TrainingArguments(
        str(folder),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_steps=1,
        **{"learning_rate": 1e-3, **options},
    )
    trainer = Trainer(
        model,
        args,
        data_collator=collator,
        train_dataset=rows or SyntheticVQA(40, 3, questions_per_image=2),
        eval_dataset=SyntheticVQA(4, 4, questions_per_image=2),
        callbacks=[collator.callback, *callbacks],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, recorder


def expected_draws(config, seed, steps, micro_steps=1):
    return [
        draw_num_vision_tokens(config.vision_token_choices, config.vision_token_weights, seed, step, micro_step)
        for step in steps
        for micro_step in range(micro_steps)
    ]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("micro_steps", [1, 2])
def test_training_runs_at_the_drawn_counts(narrow, tmp_path, workers, micro_steps):
    _, recorder = run(narrow, tmp_path, dataloader_num_workers=workers, gradient_accumulation_steps=micro_steps)
    assert recorder.trained == expected_draws(narrow[0].config, 5, range(6), micro_steps)
    assert len(set(recorder.trained)) > 1


def test_log_history_names_the_count_of_every_loss(narrow, tmp_path):
    trainer, recorder = run(narrow, tmp_path)
    logged = [log.get("num_vision_tokens") for log in trainer.state.log_history if "loss" in log]
    assert logged == recorder.trained


def test_draws_go_on_through_epochs(narrow, tmp_path):
    rows = SyntheticVQA(5, 3, questions_per_image=1)
    _, recorder = run(narrow, tmp_path, rows=rows, max_steps=8, gradient_accumulation_steps=2)
    per_step = iter(recorder.trained)
    for step in range(8):
        sizes = (2, 1)[step % 2]
        assert [next(per_step) for _ in range(sizes)] == expected_draws(narrow[0].config, 5, [step], sizes)


def test_given_choices_and_seed_go_before_the_configs(narrow, tmp_path):
    choices, weights = [1, 9, 64], [1, 1, 1]
    _, recorder = run(narrow, tmp_path, collator_arguments=(choices, weights, 77))
    assert recorder.trained == [draw_num_vision_tokens(choices, weights, 77, step) for step in range(6)]


@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_training_equals_uninterrupted(narrow, tmp_path, workers):
    options = {"save_strategy": "steps", "save_steps": 3, "dataloader_num_workers": workers}
    whole, recorder = run(narrow, tmp_path / "run", **options)
    checkpoint = str(tmp_path / "run" / "checkpoint-3")
    resumed, resumed_recorder = run(narrow, tmp_path / "again", resume=checkpoint, **options)
    assert resumed_recorder.trained == recorder.trained[3:]
    final = resumed.model.state_dict()
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(final[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_evaluation_takes_the_largest_count_and_no_draws(narrow, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}
    trainer, recorder = run(narrow, tmp_path, **options)
    assert recorder.trained == expected_draws(narrow[0].config, 5, range(6))
    assert recorder.evaluated == [36] * 6
    in_training = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log][-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(in_training, abs=1e-6)
    assert set(recorder.evaluated) == {36}


def test_evaluation_before_training_takes_the_largest_count(narrow, tmp_path):
    model = copy.deepcopy(narrow[0])
    recorder = Recorder(model)
    collator = TokenFlexDataCollator(narrow[1])
    args = TrainingArguments(
        str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, remove_unused_columns=False
    )
    rows = SyntheticVQA(3, 4, questions_per_image=1)
    trainer = Trainer(model, args, data_collator=collator, eval_dataset=rows, callbacks=[collator.callback])
    trainer.evaluate()
    assert set(recorder.evaluated) == {36}


ROWS = SyntheticVQA(4, 4, questions_per_image=1)


@pytest.mark.parametrize(
    "rows",
    [ROWS, [{**ROWS[0], "labels": 3}], Dataset.from_list([{"question": "?", "answer": "red", "labels": 3}])],
    ids=["list", "list with a column of the model's", "data set with a column of the model's"],
)
def test_removed_columns_are_refused_with_what_to_do(narrow, tmp_path, rows):
    collator = TokenFlexDataCollator(narrow[1])
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = Trainer(
        copy.deepcopy(narrow[0]), args, data_collator=collator, train_dataset=rows, callbacks=[collator.callback]
    )
    with pytest.raises(ValueError, match="`remove_unused_columns`=True.*Use `remove_unused_columns=False`"):
        trainer.train()


def test_several_devices_in_one_process_are_refused(narrow, tmp_path):
    # Data parallelism in one process cuts prompts by rows, and images where their number is halved.
    collator = TokenFlexDataCollator(narrow[1])
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    args._n_gpu = 2
    assert args.n_gpu == 2
    with pytest.raises(ValueError, match=r"`args.n_gpu`=2.*torchrun --nproc_per_node 2.*CUDA_VISIBLE_DEVICES=0"):
        Trainer(narrow[0], args, data_collator=collator, train_dataset=ROWS, callbacks=[collator.callback])


def test_nothing_is_left_on_the_model_after_training(narrow, tmp_path):
    trainer, recorder = run(narrow, tmp_path, max_steps=1)
    assert not trainer.model._forward_pre_hooks
    batch = TokenFlexDataCollator(narrow[1], [4], [1.0])([SyntheticVQA(1, 7)[0]])
    trainer.model.train()
    trainer.model(**batch)
    assert recorder.trained[-1] == 4


def test_nothing_is_warned_about_with_the_callback(narrow, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run(narrow, tmp_path, max_steps=2)
    assert "without its callback" not in caplog.text


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def test_a_second_training_after_an_interrupted_one_draws_as_a_first(narrow, tmp_path):
    model, processor = copy.deepcopy(narrow[0]), narrow[1]
    recorder = Recorder(model)
    collator = TokenFlexDataCollator(processor)
    args = TrainingArguments(
        str(tmp_path), max_steps=3, seed=5, report_to="none", use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False, save_strategy="no",
    )  # fmt: skip
    rows = SyntheticVQA(40, 3, questions_per_image=1)
    for callbacks in ([collator.callback, Stop()], [collator.callback]):
        recorder.trained.clear()
        trainer = Trainer(model, args, data_collator=collator, train_dataset=rows, callbacks=callbacks)
        try:
            trainer.train()
        except KeyboardInterrupt:
            assert len(recorder.trained) == 1
    assert recorder.trained == expected_draws(model.config, 5, range(3))


def test_loss_does_not_depend_on_how_a_step_is_split(narrow, tmp_path):
    losses = []
    for batch_size, micro_steps in ((4, 1), (2, 2), (1, 4)):
        trainer, _ = run(
            narrow, tmp_path, max_steps=2, per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=micro_steps, collator_arguments=([16], [1.0]),
        )  # fmt: skip
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)
    assert losses[2] == pytest.approx(losses[0], abs=2e-4)


def test_another_collator_takes_over_what_an_interrupted_training_left(narrow, tmp_path):
    model, processor = copy.deepcopy(narrow[0]), narrow[1]
    recorder = Recorder(model)
    args = TrainingArguments(
        str(tmp_path), max_steps=3, seed=5, report_to="none", use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False, save_strategy="no",
    )  # fmt: skip
    for stop in ([Stop()], []):
        recorder.trained.clear()
        collator = TokenFlexDataCollator(processor)
        callbacks = [collator.callback, *stop]
        trainer = Trainer(model, args, data_collator=collator, train_dataset=SyntheticVQA(40, 3), callbacks=callbacks)
        with contextlib.suppress(KeyboardInterrupt):
            trainer.train()
    assert recorder.trained == expected_draws(model.config, 5, range(3))
    assert len(collator.callback.drawn) == 1 and not model._forward_pre_hooks


def test_streams_need_batches_that_are_not_handed_out(narrow, tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([SyntheticVQA(1, 0)[0]] * 8)

    for config, fails in (({}, True), ({"dispatch_batches": False}, False)):
        collator = TokenFlexDataCollator(narrow[1])
        args = TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True,
            save_strategy="no", remove_unused_columns=False, accelerator_config=config,
        )  # fmt: skip
        model = copy.deepcopy(narrow[0])
        trainer = Trainer(model, args, data_collator=collator, train_dataset=Stream(), callbacks=[collator.callback])
        if fails:
            with pytest.raises(ValueError, match='accelerator_config={"dispatch_batches": False}'):
                trainer.train()
        else:
            assert trainer.train().global_step == 2


def test_training_keeps_no_cache(narrow, tmp_path):
    caches = []
    model = copy.deepcopy(narrow[0])
    model.model.register_forward_hook(lambda module, args, output: caches.append(output.past_key_values))
    run((model, narrow[1]), tmp_path, max_steps=1)
    assert caches == [None]


class Asker(TrainerCallback):
    """Generates between micro-batches, in train mode as training left it."""

    def __init__(self, processor):
        self.inputs = processor(images=draw_scene(7, 0).image, text="<|image_pad|>which color?", return_tensors="pt")
        self.answers = []

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        assert model.training
        answer = model.generate(**self.inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        self.answers.append(answer.tolist())


@pytest.mark.parametrize("packing", [False, True])
def test_answers_asked_for_while_training_shift_no_draws(narrow, tmp_path, packing):
    asker, options = Asker(narrow[1]), {"gradient_accumulation_steps": 3, "max_steps": 3, "learning_rate": 0.0}
    arguments = (None, None, None, "batch", packing)
    plain, drawn = run(narrow, tmp_path, collator_arguments=arguments, **options)
    asked, _ = run(narrow, tmp_path, collator_arguments=arguments, callbacks=[asker], **options)
    losses = [[log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in (plain, asked)]
    assert losses[0] == losses[1]
    expected = narrow[0].generate(**asker.inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False).tolist()
    assert asker.answers == [expected] * 6


def test_a_collator_draws_for_the_trainer_that_trains(narrow, tmp_path):
    model, processor = copy.deepcopy(narrow[0]), narrow[1]
    other = copy.deepcopy(model)
    other.config.vision_token_choices, other.config.vision_token_weights = [1, 9, 25], [1.0, 1.0, 1.0]
    collator = TokenFlexDataCollator(processor)
    options = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False}
    trainers = [
        Trainer(
            trained,
            TrainingArguments(str(tmp_path), seed=seed, max_steps=4, logging_steps=1, save_strategy="no", **options),
            data_collator=collator,
            train_dataset=SyntheticVQA(40, 3),
            callbacks=[collator.callback],
        )
        for trained, seed in ((model, 0), (other, 5))
    ]
    for trainer, seed in zip(trainers, (0, 5)):
        trainer.train()
        drawn = [log["num_vision_tokens"] for log in trainer.state.log_history if "loss" in log]
        assert drawn == expected_draws(trainer.model.config, seed, range(4))


@pytest.mark.parametrize("steps", [None, 1])
def test_the_plain_trainer_evaluates_with_metrics(narrow, tmp_path, steps):
    model, processor = narrow
    rows = [*SyntheticVQA(2, 4, questions_per_image=2), {"question": "two and two?", "answer": "four"}]
    rows += [{"question": "what is it?", "answer": "a long answer"}]
    collator = TokenFlexDataCollator(processor)

    def rate(evaluated):
        labels = evaluated.label_ids[:, 1:]
        hits = evaluated.predictions[:, :-1].argmax(-1) == labels
        return {"right": int(hits[labels != -100].sum()), "labeled": int((labels != -100).sum())}

    options = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False}
    args = TrainingArguments(str(tmp_path), per_device_eval_batch_size=2, eval_accumulation_steps=steps, **options)
    trainer = Trainer(
        model, args, data_collator=collator, callbacks=[collator.callback], compute_metrics=rate, eval_dataset=rows
    )
    metrics = trainer.evaluate()
    right = labeled = 0
    for start in (0, 2):
        batch = collator.collate(rows[start : start + 2])
        with torch.no_grad():
            predicted = model(**batch).logits[:, :-1].argmax(-1)
        labels = batch["labels"][:, 1:]
        right += int((predicted == labels)[labels != -100].sum())
        labeled += int((labels != -100).sum())
    assert (metrics["eval_right"], metrics["eval_labeled"]) == (right, labeled) and labeled > 4
    assert "eval_loss" in metrics


@pytest.mark.parametrize(
    ("keeps_shapes", "choices", "is_refused"),
    [(True, [4, 16], True), (True, ["4@32", 16], True), (True, ["4@32", "16@32"], False), (False, [4, 16], False)],
)
@pytest.mark.parametrize("scheme", ["batch", "nested"])
def test_images_in_their_own_shapes_are_refused_where_weights_are_shared_out(
    narrow, tmp_path, monkeypatch, keeps_shapes, choices, is_refused, scheme
):
    config, processor = copy.deepcopy(narrow[0].config), copy.deepcopy(narrow[1])
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config.vision_config = Siglip2VisionConfig(**sizes, patch_size=8, num_patches=64)
    processor.match_aspect_ratio = keeps_shapes
    collator = TokenFlexDataCollator(processor, choices, [1, 1], scheme=scheme)
    state = SimpleNamespace(distributed_type=DistributedType.FSDP)
    monkeypatch.setattr("tokenflex.training.callback.AcceleratorState", lambda: state)
    args, model = TrainingArguments(str(tmp_path), use_cpu=True), TokenFlexForConditionalGeneration(config)
    refused = pytest.raises(ValueError, match="`match_aspect_ratio`=True under FSDP")
    with refused if is_refused else contextlib.nullcontext():
        collator.callback.on_init_end(args, None, None, model=model)
