import copy
import io
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.data.synthetic import SyntheticVQA
from tokenflex.towers.tiny import tiny_model_and_processor
from tokenflex.training.arguments import PARTS, TokenFlexTrainingArguments
from tokenflex.training.optimization import MuonAdamW
from tokenflex.training.train import freeze_parts, main
from tokenflex.training.trainer import TokenFlexTrainer


@pytest.fixture(scope="module")
def folder(narrow, tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    save_checkpoint(folder / "start", *narrow)
    rows = []
    for row in SyntheticVQA(12, seed=3, questions_per_image=2):
        buffer = io.BytesIO()
        row["image"].save(buffer, "PNG")
        rows.append({**row, "image": {"bytes": buffer.getvalue(), "path": None}})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet")
    rows[5]["answers"] = []
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "bad.parquet")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def train(folder, output_dir, *options, dataset="train.parquet", steps=2):
    main([
        "--model_name_or_path", str(folder / "start"),
        "--dataset", str(folder / dataset),
        "--output_dir", str(output_dir),
        "--max_steps", str(steps),
        "--per_device_train_batch_size", "2",
        "--learning_rate", "1e-3",
        "--use_cpu", "true",
        "--report_to", "none",
        "--save_strategy", "no",
        "--disable_tqdm", "true",
        *map(str, options),
    ])  # fmt: skip
    return output_dir / "final"


def load(path):
    return AutoModelForImageTextToText.from_pretrained(path), AutoProcessor.from_pretrained(path)


def changed_names(before, after):
    other = after.state_dict()
    return {name for name, tensor in before.state_dict().items() if not torch.equal(tensor, other[name])}


def test_trained_checkpoint_loads_and_has_changed(folder, narrow, tmp_path, capsys):
    final = train(folder, tmp_path / "out")
    assert f"Saved {final}" in capsys.readouterr().out
    model, processor = load(final)
    assert changed_names(narrow[0], model)
    assert processor.tokenizer.get_vocab() == narrow[1].tokenizer.get_vocab()
    assert model.config.vision_token_choices == narrow[0].config.vision_token_choices


@pytest.mark.parametrize("muon", [False, True])
def test_saved_logits_are_those_in_memory(folder, tmp_path, muon):
    model, processor = load(folder / "start")
    args = TokenFlexTrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, muon=muon, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = TokenFlexTrainer(
        model, args, processing_class=processor, train_dataset=SyntheticVQA(8, 1, questions_per_image=2)
    )
    trainer.train()
    save_checkpoint(tmp_path / "final", trainer.model, processor)
    loaded, reader = load(tmp_path / "final")
    row = SyntheticVQA(1, 9)[0]
    text = "<|vision_start|><|image_pad|><|vision_end|>which color?"
    for count in (4, 16, 36):
        logits = []
        for some_model, some_processor in ((trainer.model.eval(), processor), (loaded, reader)):
            inputs = some_processor(images=row["image"], text=text, num_vision_tokens=count, return_tensors="pt")
            with torch.no_grad():
                logits.append(some_model(**inputs).logits)
        assert torch.equal(*logits)


def test_command_line_trains_as_the_function_does(folder, tmp_path):
    model, processor = load(folder / "start")
    args = TokenFlexTrainingArguments(
        str(tmp_path / "function"), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = TokenFlexTrainer(
        model, args, processing_class=processor, train_dataset=SyntheticVQA(12, seed=3, questions_per_image=2)
    )
    trainer.train()
    assert changed_names(load(train(folder, tmp_path / "command"))[0], trainer.model) == set()


@pytest.mark.parametrize("muon", ["false", "true"])
@pytest.mark.parametrize("frozen", [["vision_tower"], ["language_model", "vision_tower"], ["multi_modal_projector"]])
def test_frozen_parts_stay_and_the_others_change(folder, narrow, tmp_path, frozen, muon):
    final = train(folder, tmp_path / "out", "--muon", muon, "--weight_decay", 0.1, "--freeze", *frozen)
    changed = changed_names(narrow[0], load(final)[0])
    for part in PARTS:
        assert any(name.startswith(f"model.{part}.") for name in changed) == (part not in frozen), part
    if "language_model" in frozen:
        assert "lm_head.weight" not in changed


def test_frozen_projector_alone_is_trained_in_alignment(folder, narrow, tmp_path):
    final = train(folder, tmp_path / "out", "--freeze", "vision_tower", "language_model")
    names = {name for name, _ in narrow[0].named_parameters() if "multi_modal_projector" in name}
    assert changed_names(narrow[0], load(final)[0]) == names


@pytest.mark.parametrize("parts", [["vision"], ["vision_tower", "projector"], list(PARTS)])
def test_freezing_what_is_not_there_or_everything_is_refused(narrow, parts):
    with pytest.raises(ValueError, match="freeze"):
        freeze_parts(copy.deepcopy(narrow[0]), parts)


def test_misspelled_part_stops_the_command_before_training(folder, tmp_path):
    with pytest.raises(ValueError, match="vision_towers.*vision_tower, multi_modal_projector, language_model"):
        train(folder, tmp_path / "out", "--freeze", "vision_towers")
    assert not (tmp_path / "out" / "final").exists()


def test_label_smoothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        args = TokenFlexTrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to="none")
        model, processor = tiny_model_and_processor(width=32)
        TokenFlexTrainer(model, args, processing_class=processor, train_dataset=SyntheticVQA(4, 0))


def test_dispatched_batches_are_refused(tmp_path):
    with pytest.raises(ValueError, match="dispatch_batches"):
        args = TokenFlexTrainingArguments(
            str(tmp_path), accelerator_config={"dispatch_batches": True}, report_to="none"
        )
        model, processor = tiny_model_and_processor(width=32)
        TokenFlexTrainer(model, args, processing_class=processor, train_dataset=SyntheticVQA(4, 0))


def test_bad_row_stops_or_is_skipped(folder, tmp_path):
    with pytest.raises(ValueError, match="bad.parquet, row 5"):
        train(folder, tmp_path / "out", dataset="bad.parquet")
    assert train(folder, tmp_path / "out", "--on_bad_row", "skip", dataset="bad.parquet", steps=1).is_dir()


@pytest.mark.parametrize("choices", [[5], [4, 100], [-9]])
def test_impossible_choices_stop_the_command(folder, tmp_path, choices):
    weights = [1.0 + (count == choices[-1]) * 99 for count in choices]
    with pytest.raises(ValueError, match=rf"(?<!\w){choices[-1]}\b"):
        train(folder, tmp_path / "out", "--vision_token_choices", *choices, "--vision_token_weights", *weights)


def test_given_choices_are_the_ones_trained_at(narrow, tmp_path):
    args = TokenFlexTrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, use_cpu=True, report_to="none", disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    model = copy.deepcopy(narrow[0])
    trainer = TokenFlexTrainer(
        model, args, processing_class=narrow[1], train_dataset=SyntheticVQA(8, 1),
        vision_token_choices=[9, 25], vision_token_weights=[1, 1],
    )  # fmt: skip
    seen = set()
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs["vision_token_grids"].prod(-1).tolist()), with_kwargs=True
    )
    trainer.train()
    assert seen and seen <= {9, 25}


def test_a_run_may_go_on_with_kept_features_or_without(folder, tmp_path):
    plain = ["--freeze", "vision_tower", "--save_strategy", "steps", "--save_steps", 2]
    plain += ["--lr_scheduler_type", "constant"]
    cached = [*plain, "--cache_features", tmp_path / "features"]
    expected = load(train(folder, tmp_path / "plain", *plain, steps=6))[0].state_dict()
    for name, parts in {"kept": (cached, cached), "begun": (cached, plain), "ended": (plain, cached)}.items():
        for steps, options in zip((4, 6), parts):
            final = train(folder, tmp_path / name, *options, steps=steps)
        torch.testing.assert_close(load(final)[0].state_dict(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("muon", ["false", "true"])
def test_resumed_command_equals_uninterrupted(folder, tmp_path, muon):
    options = ["--muon", muon, "--save_strategy", "steps", "--save_steps", 2]
    whole = train(folder, tmp_path / "whole", *options, steps=4)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed = train(folder, tmp_path / "resumed", *options, "--resume_from_checkpoint", checkpoint, steps=4)
    first, second = load(whole)[0].state_dict(), load(resumed)[0].state_dict()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_muon_is_what_the_trainer_steps_when_asked(narrow, tmp_path):
    for muon in (False, True):
        args = TokenFlexTrainingArguments(str(tmp_path), muon=muon, use_cpu=True, report_to="none", weight_decay=0.3)
        trainer = TokenFlexTrainer(
            copy.deepcopy(narrow[0]), args, processing_class=narrow[1], train_dataset=SyntheticVQA(2, 1)
        )
        trainer.create_optimizer()
        assert isinstance(trainer.optimizer, MuonAdamW) == muon
        assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.3, 0.0}


def test_saved_config_names_the_auto_classes(folder, tmp_path):
    train(folder, tmp_path / "out", "--freeze", "vision_tower", "--seed", 7)
    state = json.loads((tmp_path / "out" / "final" / "config.json").read_text())
    assert state["architectures"] == ["TokenFlexForConditionalGeneration"]
    assert state["auto_map"].keys() >= {"AutoConfig", "AutoModel", "AutoModelForImageTextToText"}
