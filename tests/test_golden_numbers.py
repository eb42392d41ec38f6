"""
Numbers that no upgrade may change in silence: logits and answers of the untrained tiny model at several counts, and
the losses of its first steps. `python tests/test_golden_numbers.py` writes golden_numbers.json anew.
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tokenflex.data.synthetic import SyntheticVQA
from tokenflex.towers.tiny import tiny_model_and_processor
from tokenflex.training import TokenFlexDataCollator


GOLDEN = Path(__file__).with_name("golden_numbers.json")
COUNTS = {"4": 4, "16": 16, "36": 36, "2x6": (2, 6), "4 and 36": [4, 36]}


def tiny_model(**options):
    """SigLIP draws its patch embedding with `trunc_normal_`, which torch changed after 2.9; all else is as ever."""
    model, processor = tiny_model_and_processor(**options)
    patches = model.model.vision_tower.embeddings.patch_embedding.weight
    torch.nn.init.normal_(patches, std=0.08, generator=torch.Generator().manual_seed(0))
    return model.eval(), processor


def encoded(processor, counts):
    """Two prompts of different lengths, so that padding, positions and masks have their say."""
    images = [row["image"] for row in SyntheticVQA(2, seed=7)]
    texts = ["<|image_pad|>which color is the big shape?", "how many dots?<|image_pad|>"]
    return processor(images=images, text=texts, num_vision_tokens=counts, padding=True, return_tensors="pt")


@torch.no_grad()
def logits(model, processor, counts):
    """Eight of the logits behind each of the two prompts."""
    return model(**encoded(processor, counts)).logits[:, -1, 8:16].tolist()


def answers(model, processor, counts):
    inputs = encoded(processor, 36)
    tokens = model.generate(**inputs, num_vision_tokens=counts, max_new_tokens=6, do_sample=False)
    return tokens[:, inputs["input_ids"].shape[1] :].tolist()


def losses(folder):
    """Losses and gradient norms of six steps of the plain Trainer, at drawn counts."""
    model, processor = tiny_model(seed=1, width=32)
    collator = TokenFlexDataCollator(processor)
    args = TrainingArguments(
        folder,
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = SyntheticVQA(12, seed=3, questions_per_image=2)
    trainer = Trainer(model, args, data_collator=collator, callbacks=[collator.callback], train_dataset=rows)
    trainer.train()
    keys = ("loss", "grad_norm", "num_vision_tokens")
    return [{key: float(entry[key]) for key in keys} for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def tiny():
    return tiny_model()


@pytest.mark.parametrize("counts", COUNTS)
def test_logits(tiny, golden, counts):
    expected = torch.tensor(golden["logits"][counts])
    torch.testing.assert_close(torch.tensor(logits(*tiny, COUNTS[counts])), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("counts", COUNTS)
def test_answers(tiny, golden, counts):
    assert answers(*tiny, COUNTS[counts]) == golden["answers"][counts]


def test_losses(golden, tmp_path):
    assert losses(tmp_path) == [pytest.approx(entry, rel=2e-5, abs=0) for entry in golden["losses"]]


if __name__ == "__main__":
    model, processor = tiny_model()
    with tempfile.TemporaryDirectory() as folder:
        numbers = {
            "logits": {name: logits(model, processor, counts) for name, counts in COUNTS.items()},
            "answers": {name: answers(model, processor, counts) for name, counts in COUNTS.items()},
            "losses": losses(folder),
        }
    GOLDEN.write_text(json.dumps(numbers, indent=1) + "\n")
