import copy
import errno
import os
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

from tokenflex.checkpoints import files
from tokenflex.data.synthetic import SyntheticVQA, draw_scene
from tokenflex.training import TokenFlexDataCollator
from tokenflex.training.arguments import TokenFlexTrainingArguments
from tokenflex.training.callback import VisionTokenCallback
from tokenflex.training.feature_cache import FeatureCache
from tokenflex.training.lora import add_adapters, lora_config
from tokenflex.training.train import freeze_parts
from tokenflex.training.trainer import TokenFlexTrainer


COUNTS, PAIRS = [4, 16, 36], ["4@32", "16@48", 36]
TEXT = {"question": "is it even?", "answer": "yes"}


@pytest.fixture
def frozen(narrow):
    model = copy.deepcopy(narrow[0])
    freeze_parts(model, ["vision_tower"])
    return model, narrow[1]


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(transformers_logging.get_logger("tokenflex.training.feature_cache"), "warning", said.append)
    return said


def count_passes(model):
    """A list that grows by the number of images each time that the tower runs."""
    passes = []
    tower = next(module for name, module in model.named_modules() if name.endswith("model.vision_tower"))
    tower.register_forward_pre_hook(lambda tower, args: passes.append(len(args[0])))
    return passes


def train(frozen, folder, cache=None, choices=COUNTS, resume=None, rows=None, **options):
    """Two epochs of three steps. Returns the trainer, and the images its tower saw but for the check's two."""
    model = copy.deepcopy(frozen[0])
    passes = count_passes(model)
    args = TokenFlexTrainingArguments(
        str(folder),
        cache_features=cache and str(cache),
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        seed=5,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        **{"max_steps": 6, "save_strategy": "no", **options},
    )
    rows = [*SyntheticVQA(11, 3, questions_per_image=2), TEXT] if rows is None else rows
    trainer = TokenFlexTrainer(
        model, args, processing_class=frozen[1], train_dataset=rows,
        vision_token_choices=choices, vision_token_weights=[1.0] * len(choices),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer, sum(passes) - 2 * (cache is not None)


def assert_close_weights(first, second):
    """Those of two trainers; where the tower runs on fewer images at a time, its features may be rounded otherwise."""
    torch.testing.assert_close(first.model.state_dict(), second.model.state_dict(), rtol=0, atol=1e-6)


def kept_files(cache):
    return sorted(Path(cache).rglob("*.safetensors"))


def batch_of(processor, *indices, choices=COUNTS, **options):
    collator = TokenFlexDataCollator(processor, choices, [1.0] * len(choices), seed=0, **options)
    rows = [{"image": draw_scene(3, i).image, "question": "which?", "answer": "red"} for i in indices]
    return collator.arrange(collator.collate(rows), collator.draw(0, samples=range(len(rows))))[0]


@pytest.mark.parametrize("choices", [COUNTS, PAIRS], ids=["counts", "pairs"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"packing": True},
        {"gradient_accumulation_steps": 3},
        {"bf16": True},
        {"scheme": "sample"},
        {"scheme": "sample", "packing": True},
        {"scheme": "nested"},
        {"scheme": "distill"},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "batch",
)
def test_weights_are_those_of_a_run_without(frozen, tmp_path, options, choices):
    plain, plain_passes = train(frozen, tmp_path, choices=choices, **options)
    kept, passes = train(frozen, tmp_path, tmp_path / "kept", choices, **options)
    assert_close_weights(kept, plain)
    assert kept.vision_tokens.totals["images"] == plain.vision_tokens.totals["images"]
    assert passes == len(kept_files(tmp_path / "kept")) < plain_passes


def test_tiles_are_kept_one_by_one(frozen, tmp_path):
    processor = copy.deepcopy(frozen[1])
    processor.crop_to_patches = True
    rows = [{**TEXT, "image": draw_scene(3, i).image.resize((128, 64))} for i in range(4)]
    options = {"rows": rows, "scheme": "nested", "max_steps": 2}
    plain, _ = train((frozen[0], processor), tmp_path, **options)
    kept, passes = train((frozen[0], processor), tmp_path, tmp_path / "kept", **options)
    assert passes > len(rows)
    assert_close_weights(kept, plain)


@pytest.mark.parametrize("scheme", ["batch", "sample", "nested"])
@pytest.mark.parametrize("packing", [False, True])
def test_naflex_images_are_kept_in_their_shapes(pristine_naflex, tmp_path, scheme, packing):
    model, processor = copy.deepcopy(pristine_naflex)
    freeze_parts(model, ["vision_tower"])
    rows = [{**TEXT, "image": draw_scene(3, i).image.resize((32 * (i + 1), 64))} for i in range(4)]
    options = {"rows": rows, "max_steps": 2, "scheme": scheme, "packing": packing}
    plain, _ = train((model, processor), tmp_path, **options)
    kept, _ = train((model, processor), tmp_path, tmp_path / "kept", **options)
    assert_close_weights(kept, plain)


@pytest.mark.parametrize("from_base", [False, True])
def test_adapters_on_the_language_model_train_on_kept_features(narrow, tmp_path, from_base):
    torch.manual_seed(0)
    model = copy.deepcopy(narrow[0])
    adapted = add_adapters(model, lora_config(model, rank=4)), narrow[1]
    options = {"scheme": "distill", "distillation_from_base": from_base, "max_steps": 2}
    plain, _ = train(adapted, tmp_path, choices=PAIRS, **options)
    kept, _ = train(adapted, tmp_path, tmp_path / "kept", PAIRS, **options)
    assert_close_weights(kept, plain)


def test_resumed_equals_uninterrupted(frozen, tmp_path):
    whole, _ = train(frozen, tmp_path / "whole", tmp_path / "kept", save_strategy="steps", save_steps=2)
    for cache in (tmp_path / "kept", tmp_path / "new", None):  # the run may go on with it, with another or without
        resumed, passes = train(frozen, tmp_path / "again", cache, resume=str(tmp_path / "whole" / "checkpoint-2"))
        assert (passes == 0) == (cache == tmp_path / "kept")
        assert_close_weights(resumed, whole)


def test_the_plain_trainer_takes_kept_features(frozen, tmp_path):
    model, passes = copy.deepcopy(frozen[0]), []
    collator = TokenFlexDataCollator(frozen[1], cache_features=tmp_path / "kept")
    args = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, remove_unused_columns=False, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, dataloader_num_workers=1,
    )  # fmt: skip
    rows = SyntheticVQA(4, 3, questions_per_image=1)
    trainer = Trainer(model, args, data_collator=collator, callbacks=[collator.callback], train_dataset=rows)
    passes = count_passes(model)
    trainer.train()
    assert sum(passes) == 2 + 4
    alone = TokenFlexDataCollator(frozen[1], COUNTS, [1.0] * 3, cache_features=tmp_path / "kept")
    with pytest.raises(ValueError, match="`cache_features`=.*needs to know the model"):
        alone([rows[0]])


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=5),
    st.sampled_from(["batch", "sample", "nested"]),
    st.sampled_from([COUNTS, PAIRS]),
    st.booleans(),
)
def test_served_batches_have_the_logits_of_their_pixels(narrow, indices, scheme, choices, packing):
    model, processor = copy.deepcopy(narrow)
    model.model.vision_tower.requires_grad_(False)
    batch = batch_of(processor, *indices, choices=choices, scheme=scheme, packing=packing)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        expected = model(**batch).logits
        cache = FeatureCache(folder, model, processor)
        cache.serve(batch_of(processor, *indices[:2]))  # some are there already, some not
        for _ in range(2):
            served = cache.serve(batch)
            assert "pixel_values" in batch and "pixel_values" not in served
            torch.testing.assert_close(model(**served).logits, expected, rtol=0, atol=1e-5)


def test_features_are_those_before_pooling_in_the_towers_dtype(frozen, tmp_path):
    model = frozen[0].to(torch.bfloat16)
    cache = FeatureCache(tmp_path, model, frozen[1])
    cache.serve(batch_of(frozen[1], 0, choices=[4]))
    (file,) = kept_files(tmp_path)
    features = load_file(file)["features"]
    assert features.shape == (64, 32) and features.dtype == torch.bfloat16
    assert cache.bytes_per_image([4]) == features.nbytes
    assert cache.bytes_per_image(["4@32", "16@48", 36]) == (16 + 36 + 64) * 32 * 2


def change_weights(model, processor):
    with torch.no_grad():
        next(model.model.vision_tower.parameters()).add_(1e-3)


def change_layer(model, processor):
    model.config.vision_feature_layer = -2


def change_processor(model, processor):
    processor.image_processor.image_mean = [0.4, 0.5, 0.5]


def change_dtype(model, processor):
    model.model.vision_tower.to(torch.bfloat16)


@pytest.mark.parametrize(
    "change, named",
    [
        (change_weights, "weights"),
        (change_layer, "config"),
        (change_processor, "image_processor"),
        (change_dtype, "weights"),
    ],
)
def test_what_another_tower_made_is_named_and_never_used(frozen, tmp_path, change, named):
    model, processor = copy.deepcopy(frozen)
    batch = batch_of(processor, 0, 1)
    FeatureCache(tmp_path, model, processor).serve(batch)
    FeatureCache(tmp_path, model, processor)
    change(model, processor)
    with pytest.raises(ValueError, match=rf"holds what another vision tower .* differs in {named} \(\w+, not \w+\)"):
        FeatureCache(tmp_path, model, processor)
    (tmp_path / "tower.json").unlink()
    passes = count_passes(model)
    FeatureCache(tmp_path, model, processor).serve(batch)
    assert sum(passes) == 2 + 2, "without its manifest a folder still serves none of another tower's"


def test_a_checkpoint_that_was_loaded_again_is_the_same_tower(frozen, tmp_path):
    model, processor = frozen
    FeatureCache(tmp_path / "kept", model, processor)
    files.save_checkpoint(tmp_path / "saved", model, processor)
    loaded = type(model).from_pretrained(tmp_path / "saved"), type(processor).from_pretrained(tmp_path / "saved")
    loaded[0].model.vision_tower.requires_grad_(False)
    FeatureCache(tmp_path / "kept", *loaded)


def test_mixed_precision_is_part_of_what_made_features(frozen, tmp_path):
    train(frozen, tmp_path, tmp_path / "kept", max_steps=1)
    with pytest.raises(ValueError, match=r"differs in mixed_precision \(no, not bf16\)"):
        train(frozen, tmp_path, tmp_path / "kept", max_steps=1, bf16=True)


def test_towers_that_change_are_refused(narrow, tmp_path):
    model, processor = copy.deepcopy(narrow)
    with pytest.raises(ValueError, match="the vision tower is trained.*--freeze vision_tower"):
        train(narrow, tmp_path, tmp_path / "kept")
    freeze_parts(model, ["vision_tower"])
    adapted = add_adapters(model, lora_config(model, rank=2, vision_tower=True))
    for trains in (True, False):
        adapted.base_model.model.model.vision_tower.requires_grad_(trains)
        with pytest.raises(ValueError, match="the vision tower has adapters"):
            train((adapted, processor), tmp_path, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_towers_that_vary_while_they_train_are_refused(frozen, tmp_path):
    model, processor = frozen
    for layer in model.model.vision_tower.encoder.layers:
        layer.self_attn.dropout = 0.5
    with pytest.raises(ValueError, match="features of an image vary"):
        FeatureCache(tmp_path, model, processor)


def test_folders_that_are_none_are_named(frozen, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file: name a folder"):
        FeatureCache(tmp_path / "file", *frozen)
    (tmp_path / "tower.json").write_text("{")
    with pytest.raises(ValueError, match=r"tower\.json is damaged"):
        FeatureCache(tmp_path, *frozen)


def test_arguments_and_collator_have_to_agree(frozen, tmp_path):
    args = TokenFlexTrainingArguments(str(tmp_path), cache_features="kept", use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="`cache_features`='kept', the `data_collator` says None"):
        TokenFlexTrainer(frozen[0], args, TokenFlexDataCollator(frozen[1]), processing_class=frozen[1])


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_damaged_files_are_named_and_written_anew(narrow, data):
    model, processor = copy.deepcopy(narrow)
    model.model.vision_tower.requires_grad_(False)
    batch = batch_of(processor, 0)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr(transformers_logging.get_logger("tokenflex.training.feature_cache"), "warning", said.append)
        cache = FeatureCache(folder, model, processor)
        cache.serve(batch)
        (file,) = kept_files(folder)
        whole = file.read_bytes()
        file.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        cache.serve(batch)
        assert file.read_bytes() == whole
        assert len(said) == 1 and str(file) in said[0]


def test_a_full_disk_is_named_once_and_training_goes_on(frozen, tmp_path, monkeypatch, warnings):
    plain, _ = train(frozen, tmp_path)
    replace, left = os.replace, [5]

    def fill(source, target):
        if str(target).endswith(".safetensors"):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", fill)
    kept, passes = train(frozen, tmp_path / "run", tmp_path / "kept", save_strategy="steps", save_steps=6)
    said = [line for line in warnings if "takes no more" in line]
    assert len(said) == 1 and "No space left on device" in said[0]
    assert len(kept_files(tmp_path / "kept")) == 5 and passes > 11
    assert (tmp_path / "run" / "checkpoint-6" / "trainer_state.json").is_file()
    assert not list((tmp_path / "kept").rglob(".*")), "what could not be put in its place is gone"
    assert_close_weights(kept, plain)


def test_a_write_that_was_killed_leaves_nothing_that_is_read(frozen, tmp_path, warnings):
    batch, cache = batch_of(frozen[1], 0), FeatureCache(tmp_path, *frozen)
    cache.serve(batch)
    (file,) = kept_files(tmp_path)
    whole = file.read_bytes()
    file.unlink()
    child = os.fork()
    if not child:
        files.os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
        files.write_file(file, whole[:100])
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert [path.stat().st_size for path in file.parent.iterdir()] == [100]
    passes = count_passes(frozen[0])
    cache.serve(batch)
    assert sum(passes) == 1 and file.read_bytes() == whole and warnings == []


def test_the_size_is_said(frozen, tmp_path, warnings):
    FeatureCache(tmp_path, *frozen).say_size([4, 16, 36])
    assert f"{tmp_path}: 0.00781 MiB for each image, 0.763 GiB for 100,000" in warnings[0]


def test_the_cache_stays_in_its_process(frozen, tmp_path):
    collator = TokenFlexDataCollator(frozen[1], COUNTS, [1.0] * 3, cache_features=tmp_path)
    collator.callback._features = object()
    assert collator.callback.__getstate__()["_features"] is None
    assert isinstance(copy.deepcopy(collator).callback, VisionTokenCallback)
