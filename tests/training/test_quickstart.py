import json
import shutil

import pytest
import torch
import transformers
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer

from tokenflex.checkpoints.provenance import read_provenance
from tokenflex.training.quickstart import CHOICES, STAGES, TEST_SEED, TOWER_SEED, quickstart


SCALE = {"steps_scale": 0.005, "test_images": 20}


@pytest.fixture(scope="module", autouse=True)
def verbosity():
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    torch.manual_seed(99)
    assert quickstart(folder, **SCALE) == folder / "checkpoint"
    return folder


def weights(folder):
    return AutoModelForImageTextToText.from_pretrained(folder / "checkpoint").state_dict()


def test_everything_is_written(folder):
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "checkpoint", "predictions.jsonl", "question.png", "results.json", "results.md", "results.png", "stages",
    }  # fmt: skip
    Image.open(folder / "results.png").load()
    assert Image.open(folder / "question.png").size == (64, 64)
    report = json.loads((folder / "results.json").read_text())
    assert report["accuracy"].keys() == report["milliseconds_to_first_token"].keys() == set(map(str, CHOICES))
    table, differences = (folder / "results.md").read_text().strip().split("\n\n")
    assert len(table.split("\n")) == 2 + 5 + 1 and len(differences.split("\n")) == 4
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().strip().split("\n")]
    assert {line["index"] for line in lines} == set(range(20))
    assert sum(report["questions"].values()) == len(lines)


def test_checkpoint_loads_through_the_auto_classes(folder):
    processor = AutoProcessor.from_pretrained(folder / "checkpoint")
    model = AutoModelForImageTextToText.from_pretrained(folder / "checkpoint")
    text = "<|vision_start|><|image_pad|><|vision_end|>which color?"
    for count in model.config.vision_token_choices:
        inputs = processor(images=Image.new("RGB", (64, 64)), text=text, num_vision_tokens=count, return_tensors="pt")
        assert model(**inputs).logits.isfinite().all()


def test_checkpoint_says_how_it_was_made(folder):
    made, saw, *trained = read_provenance(folder / "checkpoint")["stages"]
    assert (made["stage"], saw["steps"]) == ("new weights", 4)
    facts = [(stage["stage"], stage.get("frozen")) for stage in trained]
    assert facts == [("training", ["vision_tower"]), ("training", None)]


def test_test_images_are_none_of_the_training_images():
    names = [name for recipe in STAGES for name in yaml.safe_load(recipe.read_text())["dataset"]]
    seeds = [int(name.partition("@")[2]) for name in names]  # of their own, whatever `--seed` says
    assert len({TEST_SEED, TOWER_SEED, *seeds}) == 2 + len(names)


def test_second_run_trains_nothing_and_ends_the_same(folder, monkeypatch, capsys, caplog):
    before = weights(folder)
    answers = (folder / "predictions.jsonl").read_text()

    def refuse(*args, **kwargs):
        raise AssertionError("a finished stage is trained again")

    monkeypatch.setattr(Trainer, "train", refuse)
    quickstart(folder, **SCALE)
    after = weights(folder)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert (folder / "predictions.jsonl").read_text() == answers
    assert capsys.readouterr().out.count("Done by a former run") == 1
    assert caplog.text.count("this run has ended") == len(STAGES)


@pytest.mark.parametrize("change", [{"seed": 1}, {"steps_scale": 0.006}, {"fresh": True}])
def test_other_settings_use_no_former_stage(folder, tmp_path, monkeypatch, change):
    class Trained(Exception):
        pass

    def stop(*args, **kwargs):
        raise Trained

    monkeypatch.setattr(Trainer, "train", stop)
    shutil.copytree(folder / "stages", tmp_path / "stages")
    with pytest.raises(Trained):
        quickstart(tmp_path, **{**SCALE, **change})
    assert not list(tmp_path.glob("stages/stage*"))


def test_same_seed_ends_the_same_whatever_was_drawn_before(folder, tmp_path):
    torch.manual_seed(4321)
    quickstart(tmp_path, **SCALE)
    expected, again = weights(folder), weights(tmp_path)
    for name, tensor in expected.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_interrupted_run_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    trained = []
    train = Trainer.train

    def interrupt_third(self, *args, **kwargs):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(self)
        return train(self, *args, **kwargs)

    torch.manual_seed(99)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", interrupt_third)
        with pytest.raises(KeyboardInterrupt):
            quickstart(tmp_path, **SCALE)
    quickstart(tmp_path, **SCALE)
    expected, resumed = weights(folder), weights(tmp_path)
    for name, tensor in expected.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=1e-6, msg=name)
