import pytest
import torch
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from tokenflex.research import adoption


NAMES = ["drawn", "adopted", "tuned on own answers", "tuned on labels"]
SIZE = {"scale": 0.001, "test_images": 3}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    def label(model, *args, **kwargs):
        """Untrained weights hardly ever end an answer by themselves."""
        model.generation_config.forced_eos_token_id = model.generation_config.eos_token_id
        return own(model, *args, **kwargs)

    folder, own = tmp_path_factory.mktemp("adoption"), adoption.label
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adoption, "TUNE_IMAGES", 32)
        patch.setattr(adoption, "label", label)
        patch.setattr(adoption, "TUNING", [*adoption.TUNING, "--max_steps", "2"])
        yield adoption.run_seed(0, folder, **SIZE), folder


def test_every_model_is_tested_at_every_count(result):
    tested, folder = result
    assert list(tested["right"]) == NAMES
    for right in tested["right"].values():
        assert list(right) == ["4", "16", "36", "64"]
        assert {len(rates) for rates in right.values()} == {len(tested["families"])} == {len(tested["images"])}
    again = adoption.run_seed(0, folder, **SIZE)
    assert again["right"] == tested["right"], "what is done is used again"


def test_what_is_adopted_is_transformers_llava_with_the_trained_weights(result):
    folder = result[1] / "0"
    llava = LlavaForConditionalGeneration.from_pretrained(folder / "llava")
    adopted = AutoModelForImageTextToText.from_pretrained(folder / "adopted")
    assert adopted.config.vision_token_choices == list(adoption.COUNTS) and adopted.config.num_vision_tokens == 64
    own, theirs = adopted.model.language_model.state_dict(), llava.model.language_model.state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)
    for name in ("tuned_on_own_answers", "tuned_on_labels"):
        tuned = AutoModelForImageTextToText.from_pretrained(folder / name / "final")
        assert tuned.model.vision_tower.state_dict().keys() == adopted.model.vision_tower.state_dict().keys()
        moved = tuned.model.multi_modal_projector.connector.up.weight
        assert not torch.equal(moved, adopted.model.multi_modal_projector.connector.up.weight)


def test_the_table_holds_every_model_and_the_differences(result):
    tested = result[0]
    lines = adoption.table([tested, tested]).splitlines()
    rows = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("| ")}
    assert set(NAMES) < set(rows)
    same = rows["tuned on own answers - drawn"]
    a, b = (tested["right"][name]["64"] for name in ("tuned on own answers", "drawn"))
    if a == b:
        assert same.endswith("| +0.0 (+0.0 to +0.0) |")
    assert lines[-1].startswith("Minutes at most: labeling ")
