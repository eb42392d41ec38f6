import copy

import pytest
import torch
from helpers import assert_same_weights
from torch.nn import functional
from transformers import Trainer, TrainerCallback, TrainingArguments

from tokenflex.data.examples import Example, to_example
from tokenflex.data.synthetic import SyntheticVQA
from tokenflex.training import TokenFlexDataCollator
from tokenflex.training.arguments import TokenFlexTrainingArguments
from tokenflex.training.lora import add_adapters, lora_config
from tokenflex.training.schemes import nested_loss
from tokenflex.training.trainer import TokenFlexTrainer


CHOICES, WEIGHTS = [4, 16, 36], [2, 3, 5]
PAIRS = ["4@32", "16@48", 36]
TEXT = Example([], [[{"role": role, "content": [{"type": "text", "text": role}]} for role in ("user", "assistant")]])


def rows(with_text=True):
    drawn = SyntheticVQA(5, 3, questions_per_image=3)
    return [drawn[0], *([TEXT] if with_text else []), *[drawn[i] for i in range(1, 5)]]


def nested(model, processor, scheme="nested", choices=CHOICES, **options):
    """The loss and gradients that training would have, by way of the collator alone."""
    model = copy.deepcopy(model).train()
    collator = TokenFlexDataCollator(processor, choices, WEIGHTS, seed=0, scheme=scheme, **options)
    arranged, origin = collator.arrange(collator.collate(rows()), collator.draw(0))
    loss = nested_loss(
        model(**arranged).logits,
        arranged["labels"],
        origin,
        WEIGHTS,
        teacher=2,
        distillation_weight=options.get("distillation_weight", 0),
        temperature=options.get("distillation_temperature", 1),
    )
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in model.named_parameters()}


def separate_outputs(model, processor, count, data=None):
    batch = TokenFlexDataCollator(processor, [count], [1]).collate(rows() if data is None else data)
    output = model(**batch)
    return output.loss, output.logits[:, :-1][batch["labels"][:, 1:] != -100]


@pytest.mark.parametrize("choices", [CHOICES, PAIRS])
def test_nested_loss_and_gradients_are_the_weighted_means_of_the_counts(narrow, choices):
    model, processor = narrow
    loss, gradients = nested(model, processor, choices=choices)
    model = copy.deepcopy(model).train()
    expected = sum(
        weight / 10 * separate_outputs(model, processor, count)[0] for count, weight in zip(choices, WEIGHTS)
    )
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("choices", [CHOICES, PAIRS])
def test_distillation_adds_the_divergence_from_the_largest_count(narrow, choices):
    model, processor = narrow
    options = {"distillation_weight": 0.7, "distillation_temperature": 2.0}
    loss, gradients = nested(model, processor, "distill", choices, **options)
    model = copy.deepcopy(model).train()
    outputs = [separate_outputs(model, processor, count) for count in choices]
    teacher = (outputs[2][1].detach() / 2).softmax(-1)
    expected = sum(weight / 10 * output[0] for output, weight in zip(outputs, WEIGHTS))
    for (_, logits), weight in zip(outputs[:2], WEIGHTS):
        divergence = functional.kl_div((logits / 2).log_softmax(-1), teacher, reduction="batchmean")
        expected = expected + 0.7 * 4 * weight / 5 * divergence
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("data", "moved", "packing"), [(rows(), 0.0, False), (rows(), 0.1, False), ([TEXT] * 3, 0.1, True)]
)
def test_a_frozen_teacher_teaches_every_count(narrow, tmp_path, data, moved, packing):
    model, processor = narrow
    options = {"distillation_weight": 0.7, "distillation_temperature": 2.0, "distillation_from_base": True}
    options["packing"] = packing
    collator = TokenFlexDataCollator(processor, CHOICES, WEIGHTS, seed=0, scheme="distill", **options)
    adapted = add_adapters(copy.deepcopy(model), lora_config(model, rank=4))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if weight.requires_grad:
                weight += moved * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=5, use_cpu=True, report_to="none")
    trainer = Trainer(
        adapted, args, data_collator=collator, callbacks=[collator.callback], train_dataset=[TEXT],
        compute_loss_func=collator.callback.compute_loss,
    )  # fmt: skip
    trainer.control = trainer.callback_handler.on_train_begin(args, trainer.state, trainer.control)
    adapted.train()
    loss = trainer.compute_loss(adapted, collator.collate(data))
    loss.backward()
    gradients = {name: weight.grad for name, weight in adapted.named_parameters() if weight.requires_grad}
    adapted.zero_grad()
    trainer.callback_handler.on_train_end(args, trainer.state, trainer.control)

    teacher = (separate_outputs(copy.deepcopy(model).train(), processor, 36, data)[1].detach() / 2).softmax(-1)
    expected = 0
    for count, weight in zip(CHOICES, WEIGHTS):
        output, logits = separate_outputs(adapted, processor, count, data)
        divergence = functional.kl_div((logits / 2).log_softmax(-1), teacher, reduction="batchmean")
        assert (divergence.abs() < 1e-6) == (count == 36 and not moved)
        expected = expected + weight / 10 * (output + 0.7 * 4 * divergence)
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        expected = dict(adapted.named_parameters())[name].grad
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5, msg=name)


def test_a_frozen_teacher_needs_adapters(narrow, tmp_path):
    with pytest.raises(ValueError, match="`distillation_from_base`=True.*`--lora_rank 16`"):
        fit(narrow, tmp_path, SyntheticVQA(15, 3), scheme="distill", distillation_from_base=True)
    with pytest.raises(ValueError, match="`distillation_from_base`=True.*'distill'"):
        TokenFlexDataCollator(narrow[1], scheme="nested", distillation_from_base=True)


def fit(narrow, folder, data, batch_size=5, **options):
    model, processor = copy.deepcopy(narrow[0]), narrow[1]
    passes = []
    model.model.vision_tower.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    args = TokenFlexTrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=batch_size, learning_rate=1e-3, use_cpu=True, seed=5,
        report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1, **options,
    )  # fmt: skip
    trainer = TokenFlexTrainer(model, args, processing_class=processor, train_dataset=data)
    trainer.train()
    return trainer, passes


@pytest.mark.parametrize("scheme", ["nested", "distill"])
def test_the_tower_sees_each_image_once_per_step(narrow, tmp_path, scheme):
    trainer, passes = fit(narrow, tmp_path, SyntheticVQA(15, 3), scheme=scheme)
    assert passes == [5, 5, 5]
    assert trainer.vision_tokens.histogram == {4: 3, 16: 3, 36: 3}
    assert float(trainer.vision_tokens.totals["vision_tokens"]) == 3 * 5 * (4 + 16 + 36)
    assert float(trainer.vision_tokens.totals["images"]) == 15


@pytest.mark.parametrize("scheme", ["sample", "nested", "distill"])
def test_a_step_split_into_micro_batches_is_the_same_step(narrow, tmp_path, scheme):
    data = [row for _ in range(3) for row in rows()]  # a text-only row among every six
    whole, _ = fit(narrow, tmp_path, data, 6, scheme=scheme)
    split, _ = fit(narrow, tmp_path, data, 1, scheme=scheme, gradient_accumulation_steps=6)
    for first, second in zip(whole.state.log_history, split.state.log_history):
        assert first.get("loss") == pytest.approx(second.get("loss"), abs=1e-4)
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(weight, split.model.state_dict()[name], rtol=1e-3, atol=1e-4, msg=name)


def test_every_sample_has_a_draw_of_its_own(narrow, tmp_path):
    model, processor = narrow
    collator = TokenFlexDataCollator(processor, CHOICES, WEIGHTS, seed=1, scheme="sample")
    drawn = collator.draw(3, samples=range(5))
    assert len(set(drawn)) > 1
    arranged, _ = collator.arrange(collator.collate(rows(with_text=False)), drawn)
    assert (arranged["input_ids"] == processor.image_token_id).sum(-1).tolist() == drawn
    assert [collator.draw(3, samples=[i])[0] for i in range(5)] == drawn


def fit_plain(narrow, folder, callbacks=(), **options):
    """Training as by [`TokenFlexTrainer`], with the plain Trainer."""
    collator = TokenFlexDataCollator(narrow[1], scheme=options.pop("scheme"), packing=options.pop("packing", False))
    if options.get("compute_loss_func") == "the callback's":
        options["compute_loss_func"] = collator.callback.compute_loss
    args = TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=5, learning_rate=1e-3, use_cpu=True, seed=5,
        report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(
        copy.deepcopy(narrow[0]), args, data_collator=collator, callbacks=[collator.callback, *callbacks],
        train_dataset=SyntheticVQA(15, 3), eval_dataset=SyntheticVQA(2, 4), **options,
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize("scheme", ["nested", "distill"])
def test_the_plain_trainer_nests_by_the_callbacks_loss(narrow, tmp_path, scheme):
    plain = fit_plain(narrow, tmp_path, scheme=scheme, compute_loss_func="the callback's")
    wired, _ = fit(narrow, tmp_path, SyntheticVQA(15, 3), scheme=scheme)
    assert_same_weights(plain.model.state_dict(), wired.model.state_dict())
    assert plain.evaluate()["eval_loss"] == pytest.approx(fit_loss(plain.model, narrow[1]), rel=1e-5)


def fit_loss(model, processor):
    rows = SyntheticVQA(2, 4)
    batch = TokenFlexDataCollator(processor, [36], [1]).collate([rows[0], rows[1]])
    with torch.no_grad():
        return model.eval()(**batch).loss.item()


@pytest.mark.parametrize("options", [{"scheme": "batch"}, {"scheme": "sample", "packing": True}], ids=str)
def test_the_callbacks_loss_is_the_usual_one_where_nothing_is_nested(narrow, tmp_path, options):
    usual, given = (
        fit_plain(narrow, tmp_path, compute_loss_func=loss, **options) for loss in (None, "the callback's")
    )
    assert_same_weights(usual.model.state_dict(), given.model.state_dict())


def test_a_batch_without_images_is_not_repeated(narrow, tmp_path):
    nested, passes = fit(narrow, tmp_path, [TEXT] * 15, scheme="nested")
    plain, _ = fit(narrow, tmp_path, [TEXT] * 15)
    losses = [[log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in (nested, plain)]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert passes == [1, 1, 1], "the blank image"


def test_unknown_schemes_and_settings_that_cannot_work_are_refused(narrow):
    with pytest.raises(ValueError, match="`scheme`='batches': the schemes are batch, sample, nested, distill"):
        TokenFlexDataCollator(narrow[1], scheme="batches")
    with pytest.raises(ValueError, match="distillation_temperature`=0"):
        TokenFlexDataCollator(narrow[1], scheme="distill", distillation_temperature=0)
    with pytest.raises(ValueError, match="callbacks"):
        TokenFlexDataCollator(narrow[1], CHOICES, WEIGHTS, scheme="nested")(rows())


@pytest.mark.parametrize(("choices", "weights"), [([16], [1]), ([4, 16], [0, 1])])
def test_distillation_needs_a_count_to_learn(narrow, tmp_path, choices, weights):
    with pytest.raises(ValueError, match="a smaller count with a weight above 0"):
        TokenFlexDataCollator(narrow[1], choices, weights, scheme="distill")


@pytest.mark.parametrize("loss", [None, lambda outputs, labels, **kwargs: outputs.logits.float().logsumexp(-1).mean()])
def test_a_trainer_that_computes_another_loss_cannot_nest(narrow, tmp_path, loss):
    class NoStep(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            raise AssertionError("weights have moved by another loss")

    with pytest.raises(ValueError, match="compute_loss_func=collator.callback.compute_loss"):
        fit_plain(narrow, tmp_path, scheme="nested", compute_loss_func=loss, callbacks=[NoStep()])


@pytest.mark.parametrize("name", ["narrow", "pristine_naflex"])
@pytest.mark.parametrize("packing", [False, True])
def test_samples_at_pairs_of_their_own_have_the_loss_of_each_alone(request, name, packing):
    model, processor = request.getfixturevalue(name)
    collator = TokenFlexDataCollator(processor, PAIRS, WEIGHTS, seed=0, scheme="sample", packing=packing)
    data = [
        Example([image.resize((64, 32 * (1 + i % 3))) for image in row.images], row.dialogs[:1])
        for i, row in enumerate(map(to_example, rows(with_text=False)))
    ]
    drawn = collator.draw(3, samples=range(len(data)))
    assert len(set(drawn)) > 1
    arranged, _ = collator.arrange(collator.collate(data), drawn)
    with torch.no_grad():
        loss, labels = model(**arranged).loss, (arranged["labels"][:, 1:] != -100).sum()
        total = 0
        for choice, row in zip(drawn, data):
            _, logits = separate_outputs(model, processor, choice, [row])
            batch = TokenFlexDataCollator(processor, [choice], [1]).collate([row])
            targets = batch["labels"][:, 1:][batch["labels"][:, 1:] != -100]
            total = total + functional.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(loss, total / labels, rtol=1e-4, atol=1e-5)
