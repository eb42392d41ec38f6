import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tokenflex.data.examples import Example
from tokenflex.data.synthetic import SyntheticVQA
from tokenflex.towers.tiny import tiny_model_and_processor
from tokenflex.training import TokenFlexDataCollator
from tokenflex.training.packing import first_fit, pack_rows, plan_rows


few = settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow])
SCENES = SyntheticVQA(50, 7)


@st.composite
def rows_of_all_kinds(draw):
    """Rows with several questions, several images, no image, and texts of all lengths."""
    rows = []
    for index in range(draw(st.integers(1, 6))):
        words = " ".join(["word"] * draw(st.integers(1, 40)))
        kind = draw(st.sampled_from(["questions", "images", "text"]))
        if kind == "questions":
            answers = ["red", words, "three"][: draw(st.integers(1, 3))]
            questions = [f"which {i}?" for i in range(len(answers))]
            rows.append({"image": SCENES[index]["image"], "questions": questions, "answers": answers})
        elif kind == "images":
            images = [SCENES[index + i]["image"] for i in range(draw(st.integers(1, 3)))]
            rows.append({"images": images, "question": words, "answer": "both"})
        else:
            turns = [{"role": "user", "content": [{"type": "text", "text": words}]}]
            turns.append({"role": "assistant", "content": [{"type": "text", "text": "yes"}]})
            rows.append(Example([], [turns]))
    return rows


def collate(processor, rows, count):
    return TokenFlexDataCollator(processor, [count], [1.0]).collate(rows)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30))
def test_first_fit_places_each_item_once_and_never_overfills(lengths):
    bins = first_fit(lengths, max(lengths))
    assert sorted(item for members in bins for item in members) == list(range(len(lengths)))
    sums = [sum(lengths[item] for item in members) for members in bins]
    assert max(sums) <= max(lengths)
    assert len(bins) < 2 or sum(sorted(sums)[:2]) > max(lengths), "two bins that fit into one"


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30))
def test_planned_rows_hold_each_sample_once_in_no_more_room_than_before(lengths):
    rows = plan_rows(lengths)
    assert sorted(sample for members in rows for sample in members) == list(range(len(lengths)))
    width = max(sum(lengths[sample] for sample in members) for members in rows)
    assert width <= 2 * max(lengths)
    assert len(rows) * width <= len(lengths) * max(lengths)


def test_a_batch_that_cannot_be_packed_is_left_as_it_is(narrow):
    rows = [{"image": SCENES[0]["image"], "question": "which?", "answer": "red"}]
    batch = collate(narrow[1], rows, 4)
    packed, origin = pack_rows(batch, narrow[1].image_token_id)
    assert packed is batch and origin.tolist() == [[0] * batch["input_ids"].shape[1]]


@given(rows_of_all_kinds(), st.sampled_from([4, 16]))
@few
def test_every_token_has_the_logits_it_had_in_a_row_of_its_own(narrow, rows, count):
    model, processor = narrow
    batch = collate(processor, rows, count)
    packed, origin = pack_rows(batch, processor.image_token_id, processor.tokenizer.pad_token_id)
    assert packed["input_ids"].numel() <= batch["input_ids"].numel()
    with torch.no_grad():
        expected, logits = model(**batch), model(**packed)
    for row in range(len(rows)):
        kept = batch["attention_mask"][row].bool()
        for name in ("input_ids", "labels"):
            assert torch.equal(packed[name][origin == row], batch[name][row][kept])
        torch.testing.assert_close(logits.logits[origin == row], expected.logits[row][kept], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits.loss, expected.loss)
    assert ((origin == -1) == (packed["attention_mask"] == 0)).all()


@given(rows_of_all_kinds())
@few
def test_one_row_told_apart_by_positions_alone_is_the_same(narrow, rows):
    model, processor = narrow
    single = [
        {**row, "questions": row["questions"][:1], "answers": row["answers"][:1]}
        if isinstance(row, dict) and "questions" in row
        else row
        for row in rows
    ]
    batch = collate(processor, single, 16)
    packed, _ = pack_rows(batch, processor.image_token_id, one_row=True)
    assert packed["input_ids"].shape == (1, int(batch["attention_mask"].sum()))
    assert "attention_mask" not in packed and "sample_ids" not in packed
    with torch.no_grad():
        # Behind a cache transformers does not read samples off the positions.
        torch.testing.assert_close(model(**packed, use_cache=False).loss, model(**batch).loss)


def test_one_row_refuses_questions_behind_one_image(narrow):
    row = {"image": SCENES[0]["image"], "questions": ["a?", "b?"], "answers": ["yes", "no"]}
    with pytest.raises(ValueError, match="attn_implementation"):
        pack_rows(collate(narrow[1], [row], 4), narrow[1].image_token_id, one_row=True)


def test_tiles_keep_to_their_image(narrow):
    model = narrow[0]
    processor = tiny_model_and_processor(width=32)[1]
    processor.crop_to_patches, processor.max_patches = True, 4
    wide, high = Image.effect_noise((200, 60), 80).convert("RGB"), Image.effect_noise((60, 260), 80).convert("RGB")
    rows = [
        {"image": wide, "question": "short?", "answer": "yes"},
        {"images": [high, SCENES[1]["image"]], "question": "a longer question than that?", "answer": "no"},
        {"image": SCENES[2]["image"], "question": "which?", "answer": "blue"},
    ]
    batch = collate(processor, rows, 4)
    packed, _ = pack_rows(batch, processor.image_token_id)
    assert len(packed["input_ids"]) < 3
    with torch.no_grad():
        torch.testing.assert_close(model(**packed).loss, model(**batch).loss)
