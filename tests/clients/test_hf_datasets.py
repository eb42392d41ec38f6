"""`datasets` streams of one's own, without `tokenflex.data.loading`."""

import datasets
import pytest
import torch

from tokenflex.data.synthetic import draw_scene
from tokenflex.training import TokenFlexDataCollator


OPTIONS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def question(scene):
    return scene.questions[0][1:]


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """Two parquet files with an Image column, read as they come."""
    folder = tmp_path_factory.mktemp("stream")
    files = []
    for number in range(2):
        scenes = [draw_scene(11, 3 * number + index) for index in range(3)]
        columns = {"image": [scene.image for scene in scenes], "question": [question(scene)[0] for scene in scenes]}
        columns["answer"] = [question(scene)[1] for scene in scenes]
        files.append(str(folder / f"{number}.parquet"))
        rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        rows.to_parquet(files[-1])
    stream = datasets.load_dataset(
        "parquet", data_files=files, split="train", streaming=True, cache_dir=str(folder / "cache")
    )
    assert isinstance(stream, datasets.IterableDataset) and stream.n_shards == 2
    return stream


@pytest.mark.parametrize("count", [4, 36])
def test_a_mapped_stream_goes_into_generate(tiny, stream, count):
    model, processor = tiny

    def encode(rows):
        texts = [f"<|image_pad|>{text}" for text in rows["question"]]
        inputs = processor(images=rows["image"], text=texts, num_vision_tokens=count, padding=True)
        return {name: list(values) for name, values in inputs.items()}

    encoded = stream.map(encode, batched=True, batch_size=2, remove_columns=stream.column_names).with_format("torch")
    answers = []
    for batch in encoded.iter(batch_size=2):
        assert batch["vision_token_grids"].prod(-1).tolist() == [count, count]
        batch = {name: batch[name] for name in processor.model_input_names if name in batch}
        for other in (None, 16):
            output = model.generate(**batch, num_vision_tokens=other, **OPTIONS)
            answers.append(output[:, batch["input_ids"].shape[1] :])

    expected = []
    for number in range(3):
        scenes = [draw_scene(11, 2 * number + index) for index in range(2)]
        for other in (count, 16):
            texts = [f"<|image_pad|>{question(scene)[0]}" for scene in scenes]
            inputs = processor(
                images=[scene.image for scene in scenes],
                text=texts,
                num_vision_tokens=other,
                padding=True,
                return_tensors="pt",
            )
            expected.append(model.generate(**inputs, **OPTIONS)[:, inputs["input_ids"].shape[1] :])
    assert torch.equal(torch.cat(answers), torch.cat(expected))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_goes_through_the_collator(tiny, stream, num_workers):
    model, processor = tiny

    def collator():
        return TokenFlexDataCollator(processor, vision_token_choices=[16], vision_token_weights=[1.0])

    loader = torch.utils.data.DataLoader(stream, batch_size=3, num_workers=num_workers, collate_fn=collator())
    seen = {}
    for batch in loader:
        with torch.no_grad():
            loss = model(**batch).loss
        seen[tuple(batch["input_ids"].flatten().tolist())] = loss
        assert batch["vision_token_grids"].tolist() == [[4, 4]] * 3
        assert not (batch["labels"] == processor.image_token_id).any()
    assert len(seen) == 2

    scenes = [draw_scene(11, index) for index in range(6)]
    rows = [dict(zip(("image", "question", "answer"), (scene.image, *question(scene)))) for scene in scenes]
    for part in (rows[:3], rows[3:]):
        batch = collator()(part)
        with torch.no_grad():
            expected = model(**batch).loss
        torch.testing.assert_close(seen[tuple(batch["input_ids"].flatten().tolist())], expected)
