import copy

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments, set_seed

from tokenflex import TokenFlexForConditionalGeneration
from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.data.synthetic import SyntheticVQA
from tokenflex.training import TokenFlexDataCollator
from tokenflex.training.lora import lora_config


peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")

OPTIONS = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "optim": "sgd",  # Adam would make full steps of rounding errors where a gradient is zero
    "learning_rate": 0.1,
    "logging_steps": 1,
    "save_strategy": "no",
    "remove_unused_columns": False,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def dataset():
    rows = []
    for row in SyntheticVQA(12, seed=1):
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["questions"][0]}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": row["answers"][0]}]}
        rows.append({"images": [row["image"]], "messages": [question, answer]})
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def prompts(dataset):
    def split(row):
        return {"prompt": row["messages"][:1], "completion": row["messages"][1:]}

    return dataset.map(split, remove_columns="messages")


@pytest.fixture
def model(narrow):
    return copy.deepcopy(narrow[0])


def seen_grids(model):
    seen = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["vision_token_grids"].tolist()), with_kwargs=True
    )
    return seen


def fit_plain(model, processor, dataset, tmp_path, peft_config=None, **options):
    args = TrainingArguments(str(tmp_path), **OPTIONS, **options)
    if peft_config is not None:
        set_seed(args.seed)
        model = peft.get_peft_model(model, peft_config)
    collator = TokenFlexDataCollator(processor)
    trainer = Trainer(
        model, args, data_collator=collator, train_dataset=dataset, eval_dataset=dataset, callbacks=[collator.callback]
    )
    trainer.train()
    return trainer


def fit_trl(model, processor, dataset, tmp_path, peft_config=None, **options):
    collator = TokenFlexDataCollator(processor)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(str(tmp_path), max_length=None, **OPTIONS, **options),
        data_collator=collator,
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=processor,
        callbacks=[collator.callback],
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


def losses(trainer):
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [entry["loss"] for entry in steps], [entry["num_vision_tokens"] for entry in steps]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("adapters", [False, True])
def test_sft_trainer_takes_the_steps_of_the_plain_one(narrow, dataset, tmp_path, adapters, accumulation):
    runs = []
    for fit in (fit_plain, fit_trl):
        model = copy.deepcopy(narrow[0])
        config = lora_config(model, rank=4) if adapters else None
        runs.append(fit(model, narrow[1], dataset, tmp_path, config, gradient_accumulation_steps=accumulation))
    (plain_losses, plain_counts), (trl_losses, trl_counts) = map(losses, runs)
    assert trl_counts == plain_counts and len(set(plain_counts)) > 1
    torch.testing.assert_close(trl_losses, plain_losses, rtol=1e-5, atol=0)
    plain, other = (dict(run.model.named_parameters()) for run in runs)
    assert plain.keys() == other.keys()
    trained = [name for name, weight in plain.items() if weight.requires_grad]
    assert trained == [name for name, weight in other.items() if weight.requires_grad]
    for name in plain:
        torch.testing.assert_close(other[name], plain[name], rtol=0, atol=1e-6 if name in trained else 0, msg=name)
    first, second = (run.evaluate()["eval_loss"] for run in runs)
    assert first == pytest.approx(second, rel=1e-4)


def test_questions_about_one_image_share_it(narrow, model, tmp_path):
    """Columns and segments that TRL does not know of."""
    dataset = Dataset.from_list(list(SyntheticVQA(4, seed=1, questions_per_image=3)))
    runs = [fit(copy.deepcopy(model), narrow[1], dataset, tmp_path) for fit in (fit_plain, fit_trl)]
    torch.testing.assert_close(*(losses(run)[0] for run in runs), rtol=1e-5, atol=0)


def test_model_by_its_folder(narrow, dataset, tmp_path):
    save_checkpoint(tmp_path / "start", *narrow)
    collator = TokenFlexDataCollator(narrow[1])
    trainer = trl.SFTTrainer(
        str(tmp_path / "start"),
        trl.SFTConfig(str(tmp_path), **OPTIONS),
        data_collator=collator,
        train_dataset=dataset,
        callbacks=[collator.callback],
    )
    trainer.train()
    assert type(trainer.model) is TokenFlexForConditionalGeneration
    assert type(trainer.processing_class) is type(narrow[1])


def test_trained_model_generates(narrow, model, dataset, tmp_path):
    trained = fit_trl(model, narrow[1], dataset, tmp_path, lora_config(model, rank=4)).model.eval()
    inputs = narrow[1](images=dataset[0]["images"][0], text="<|image_pad|>color?", return_tensors="pt")
    output = trained.generate(**inputs, num_vision_tokens=4, max_new_tokens=3, do_sample=False)
    merged = trained.merge_and_unload()
    assert torch.equal(merged.generate(**inputs, num_vision_tokens=4, max_new_tokens=3, do_sample=False), output)


@pytest.mark.parametrize("adapters", [False, True])
def test_trl_collates_by_itself_at_the_processors_count(narrow, model, prompts, tmp_path, adapters):
    processor = copy.deepcopy(narrow[1])
    processor.num_vision_tokens = 16
    seen = seen_grids(model)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(str(tmp_path), max_length=None, **OPTIONS),
        train_dataset=prompts,
        processing_class=processor,
        peft_config=lora_config(model, rank=4) if adapters else None,
    )
    batch = trainer.data_collator([prompts[0], prompts[1]])
    answers = [row["completion"][0]["content"][0]["text"] for row in (prompts[0], prompts[1])]
    said = [processor.tokenizer.decode(labels[labels != -100], skip_special_tokens=True) for labels in batch["labels"]]
    assert [text.strip() for text in said] == answers
    before = [weight.clone() for weight in trainer.model.parameters()]
    trainer.train()
    assert seen == [[[4, 4]] * 2] * 3
    for weight, old in zip(trainer.model.parameters(), before):
        assert weight.requires_grad or torch.equal(weight, old)
    assert any(not torch.equal(weight, old) for weight, old in zip(trainer.model.parameters(), before))
