import copy

import pytest
import torch

from tokenflex.checkpoints import fingerprint as module
from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.checkpoints.fingerprint import fingerprint, fingerprint_checkpoint
from tokenflex.training.lora import add_adapters, lora_config


@pytest.fixture(scope="module")
def saved(narrow, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fingerprint") / "checkpoint"
    save_checkpoint(folder, *narrow)
    return folder


def test_a_saved_model_is_the_one_in_memory(narrow, saved, tmp_path):
    expected = fingerprint(*narrow)
    assert fingerprint_checkpoint(saved) == expected
    save_checkpoint(tmp_path / "in parts", *narrow, max_shard_size="50KB")
    assert len(list((tmp_path / "in parts").glob("*.safetensors"))) > 1
    assert fingerprint_checkpoint(tmp_path / "in parts") == expected


def test_a_checkpoint_of_the_hub_is_its_files(narrow, saved, monkeypatch):
    monkeypatch.setattr(module, "snapshot_download", lambda name, **options: str(saved))
    assert fingerprint_checkpoint("me/tiny") == fingerprint(*narrow)


def test_every_weight_counts(narrow):
    model, processor = copy.deepcopy(narrow[0]), narrow[1]
    seen = {fingerprint(model, processor)["weights"]}
    for weight in (model.model.vision_tower, model.model.multi_modal_projector, model.lm_head):
        with torch.no_grad():
            next(weight.parameters()).view(-1)[-1] += 1
        seen.add(fingerprint(model, processor)["weights"])
    assert len(seen) == 4


def test_adapters_and_smaller_dtypes_are_other_weights(narrow):
    model, processor = copy.deepcopy(narrow[0]), narrow[1]
    before = fingerprint(model, processor)
    adapted = fingerprint(add_adapters(copy.deepcopy(model), lora_config(model, rank=2)), processor)
    assert {name for name in before if before[name] != adapted[name]} == {"weights"}
    assert fingerprint(model.to(torch.bfloat16), processor)["weights"] != before["weights"]


def test_using_a_processor_does_not_change_it(narrow):
    model, processor = narrow[0], copy.deepcopy(narrow[1])
    before = fingerprint(model, processor)
    processor.tokenizer(["a", "two words"], padding=True, truncation=True, max_length=1)
    assert fingerprint(model, processor) == before
    processor.tokenizer.add_tokens(["unheard"])
    assert fingerprint(model, processor) != before
