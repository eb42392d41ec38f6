import json

import pytest
from PIL import Image

from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.checkpoints.provenance import add_stage, read_provenance
from tokenflex.towers.init import main as init
from tokenflex.training import train as train_module


def test_a_checkpoint_that_says_nothing_has_an_empty_one(tiny, tmp_path):
    save_checkpoint(tmp_path / "checkpoint", *tiny)
    assert read_provenance(tmp_path / "checkpoint") == {"base_models": [], "stages": []}


def test_it_is_saved_with_the_checkpoint(tiny, tmp_path):
    made = add_stage({"base_models": ["a/b"], "stages": []}, "training", seed=3)
    save_checkpoint(tmp_path / "checkpoint", *tiny, provenance=made)
    assert read_provenance(tmp_path / "checkpoint") == made


def test_stages_add_up_and_local_paths_stay_private(tmp_path, monkeypatch):
    folder = tmp_path / "somebodys-home"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    rows = [{"image": "a.png", "question": "which color?", "answer": "black"}] * 4
    (folder / "rows.json").write_text(json.dumps(rows))
    data = ["--dataset", str(folder / "rows.json")]
    init([*data, "--output_dir", str(tmp_path / "start")])
    start = str(tmp_path / "start")
    for number, scheme in enumerate(("batch", "nested")):
        options = {"output_dir": tmp_path / scheme, "max_steps": 2, "per_device_train_batch_size": 2, "seed": number}
        arguments = [f"--{name}={value}" for name, value in options.items()]
        quiet = ["--report_to=none", "--save_strategy=no", "--disable_tqdm=true", "--dataloader_num_workers=0"]
        train_module.main(["--model_name_or_path", start, *data, f"--scheme={scheme}", *arguments, *quiet])
        start = str(tmp_path / scheme / "final")
    made = read_provenance(start)
    assert [stage["stage"] for stage in made["stages"]] == ["new weights", "training", "training"]
    first, last = made["stages"][1:]
    assert (first["scheme"], last["scheme"]) == ("batch", "nested")
    assert (first["seed"], last["seed"]) == (0, 1)
    assert last["data"] == ["rows.json"] and last["steps"] == 2 and last["batch_size"] == 2
    assert last["vision_token_weights"] == [0.2, 0.3, 0.5]
    assert "somebodys-home" not in json.dumps(made)


def test_a_checkpoint_of_the_hub_that_cannot_be_asked_is_what_others_are_built_from():
    assert read_provenance("somebody/model") == {"base_models": ["somebody/model"], "stages": []}


@pytest.mark.parametrize("text", ["", "[]", '{"stages": 1}', '{"base_models": [], "stages": ["x"]}'])
def test_a_record_that_cannot_be_read_is_named(tmp_path, text):
    (tmp_path / "provenance.json").write_text(text)
    with pytest.raises(ValueError, match="provenance.json is no record"):
        read_provenance(tmp_path)
