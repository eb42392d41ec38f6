import datasets
import pytest
import torch
from helpers import read_rows
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.cli import main
from tokenflex.towers.init import init_checkpoint
from tokenflex.towers.tiny import tiny_model_and_processor


QUESTIONS = ["is the rhombus turquoise?", "is the rhombus not turquoise?"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = {
        "image": [Image.new("RGB", (8, 8), color) for color in ("red", "blue")],
        "questions": [QUESTIONS, QUESTIONS] * 1,
        "answers": [["certainly", "hardly"]] * 2,
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "questions": datasets.List(datasets.Value("string")),
            "answers": datasets.List(datasets.Value("string")),
        }
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return str(path)


def test_tokenizer_knows_the_words_of_the_data(file):
    _, processor = init_checkpoint(read_rows(file))
    words = " ".join(QUESTIONS).split(" ")
    assert len(processor.tokenizer(QUESTIONS[0])["input_ids"]) <= len(words)
    ids = processor.tokenizer("naïve 日本 ?")["input_ids"]
    assert processor.tokenizer.decode(ids) == "naïve 日本 ?", "bytes spell what the data does not hold"


def test_tower_is_taken_over_and_the_rest_is_new(file, tmp_path, tiny):
    trained, _ = tiny_model_and_processor(seed=5)
    save_checkpoint(tmp_path / "trained", trained, tiny[1])
    start = str(tmp_path / "start")
    main(
        ["init", "--dataset", file, "--vision_tower", str(tmp_path / "trained"), "--seed", "1", "--output_dir", start]
    )
    model = AutoModelForImageTextToText.from_pretrained(start)
    own = model.model.vision_tower.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in trained.model.vision_tower.state_dict().items())
    projector = model.model.multi_modal_projector.connector.gate.weight
    assert not torch.equal(projector, trained.model.multi_modal_projector.connector.gate.weight)
    assert len(AutoProcessor.from_pretrained(start).tokenizer) == model.config.text_config.vocab_size


def test_a_tower_of_another_size_is_refused(file, tmp_path):
    other = tiny_model_and_processor(width=32)
    save_checkpoint(tmp_path / "other", *other)
    with pytest.raises(ValueError, match="`vision_tower`=.* differs from the tiny tower in .*hidden_size"):
        init_checkpoint(read_rows(file), vision_tower=str(tmp_path / "other"))
