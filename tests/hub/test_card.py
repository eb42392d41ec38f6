import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.checkpoints.provenance import ADOPTED, add_stage
from tokenflex.data.synthetic import SyntheticVQA
from tokenflex.evaluation import evaluate, save_report
from tokenflex.hub.card import build_card, eval_results_yaml, read_evaluation
from tokenflex.hub.push import collect_files


PROVENANCE = add_stage(
    {"base_models": ["google/siglip-tiny", "towers"], "stages": []},
    "training",
    data=["vikhyatk/lnqa", "mine.parquet"],
    steps=7,
    vision_token_weights=[0.2, 0.3, 0.5],
)


@pytest.fixture(scope="module")
def published(both, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    save_checkpoint(folder / "checkpoint", *both, provenance=PROVENANCE)
    report, predictions = evaluate(*both, SyntheticVQA(8, 5), latency_batch_size=2, show_progress=False)
    report |= {"dataset": ["someone/shapes"], "dataset_split": "test"}
    save_report(folder / "eval", report, predictions, "shapes")
    return folder


def test_every_score_in_the_card_is_the_evaluations(published):
    report = json.loads((published / "eval/results.json").read_text())
    card = build_card(published / "checkpoint", "me/tiny", [read_evaluation(published / "eval")], license="mit")
    read_again = ModelCard(str(card))
    assert str(read_again.data) == str(card.data)
    name, results = model_index_to_eval_results(read_again.data.to_dict()["model-index"])
    assert name == "tiny"
    assert {str(result.metric_args["num_vision_tokens"]): result.metric_value for result in results} == report["mean"]
    assert {result.dataset_type for result in results} == {"someone/shapes"}
    rows = [row.strip("| ").split(" | ") for row in card.text.splitlines() if row.startswith("| ")]
    titles, table = rows[0], {row[0]: row for row in rows[1:]}
    for count, mean in report["mean"].items():
        cells = dict(zip(titles, table[count]))
        assert cells["mean"] == f"{100 * mean:.1f}"
        assert cells["95 % of means"] == "–".join(f"{100 * bound:.1f}" for bound in report["interval"][count])
        assert cells["ms to first token"] == f"{report['milliseconds_to_first_token'][count]:.1f}"
        assert cells["peak MiB"] == f"{report['peak_memory_mib'][count]:.0f}"


def test_the_card_of_an_adopted_model_does_not_say_that_it_was_trained(pristine_adopted, tmp_path):
    adopted = add_stage({"base_models": ["OpenGVLab/InternVL3-1B-hf"], "stages": []}, ADOPTED)
    save_checkpoint(tmp_path / "adopted", *pristine_adopted, provenance=adopted)
    card = build_card(tmp_path / "adopted", "me/flexible", license="mit").text
    assert "Not trained at other counts than its base model." in card and "Trained at" not in card
    assert "16×16\npatches of a 64×64 image" in card
    save_checkpoint(tmp_path / "tuned", *pristine_adopted, provenance=add_stage(adopted, "training"))
    assert "Trained at 4" in build_card(tmp_path / "tuned", "me/flexible", license="mit").text


def test_the_card_says_how_the_checkpoint_was_made(published):
    card = build_card(published / "checkpoint", "me/tiny", base_models=["Qwen/tiny"], datasets=["x/y"], license="mit")
    data = card.data.to_dict()
    assert data["base_model"] == ["google/siglip-tiny", "Qwen/tiny"], "a local folder is no model of the Hub"
    assert data["datasets"] == ["vikhyatk/lnqa", "x/y"]
    assert data["license"] == "mit" and "model-index" not in data
    assert (
        "1. **training**: data vikhyatk/lnqa, mine.parquet; steps 7; vision token weights 0.2, 0.3, 0.5" in card.text
    )
    assert "- towers, a model that is not on the Hub" in card.text and "huggingface.co/towers" not in card.text
    assert "Not evaluated." in card.text and "measured" not in card.text.split("## Limits")[0]
    assert "{{" not in str(card) and "{%" not in str(card)


def test_code_in_the_card_runs(published, tmp_path, monkeypatch):
    SyntheticVQA(1, 5)[0]["image"].save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    card = build_card(
        published / "checkpoint", str(published / "checkpoint"), question="which \"color\" is\nthe 'paper'?"
    )
    blocks = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    assert len(blocks) == 3
    exec(blocks[0] + blocks[2], {})


def test_results_go_where_the_hub_looks_for_them(published):
    files = collect_files(published / "checkpoint", "me/tiny", [published / "eval"], eval_task_id="shapes")
    assert {"README.md", "config.json", "model.safetensors", "modeling_tokenflex.py", "provenance.json"} <= set(files)
    assert "evaluation/someone-shapes-test-exact_match/results.png" in files
    for count, mean in json.loads((published / "eval/results.json").read_text())["mean"].items():
        [entry] = yaml.safe_load(files[f".eval_results/someone-shapes-test-exact_match-{count}.yaml"])
        assert entry["dataset"] == {"id": "someone/shapes", "task_id": "shapes"} and entry["value"] == mean
        assert entry["notes"] == f"exact_match, num_vision_tokens={count}"
    local = read_evaluation(published / "eval")
    local.report["dataset"] = ["test.parquet"]
    with pytest.raises(ValueError, match="not one data set of the Hub"):
        eval_results_yaml(local, "shapes")
    assert not [name for name in collect_files(published / "checkpoint", "me/tiny") if name.startswith(".eval")]


def test_what_training_left_beside_a_checkpoint_is_not_published(tiny, tmp_path):
    save_checkpoint(tmp_path / "checkpoint", *tiny)
    for name in ("optimizer.pt", "pytorch_model.bin", "training_args.bin", "trainer_state.json", "notes.md"):
        (tmp_path / "checkpoint" / name).write_text("{}")
    files = collect_files(tmp_path / "checkpoint", "me/tiny")
    assert not {name for name in files if name.endswith((".bin", ".pt", "trainer_state.json", "notes.md"))}


def test_what_is_not_whole_is_refused(tiny, published, tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        collect_files(tmp_path / "nowhere", "me/tiny")
    save_checkpoint(tmp_path / "checkpoint", *tiny)
    (tmp_path / "checkpoint/model.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks model.safetensors"):
        collect_files(tmp_path / "checkpoint", "me/tiny")
    with pytest.raises(ValueError, match="holds no results.json.*tokenflex eval"):
        collect_files(published / "checkpoint", "me/tiny", [tmp_path / "checkpoint"])
    (tmp_path / "results.json").write_text('{"accuracy": 1}')
    with pytest.raises(ValueError, match="no report of an evaluation"):
        collect_files(published / "checkpoint", "me/tiny", [tmp_path])
    with pytest.raises(ValueError, match="the same data twice"):
        collect_files(published / "checkpoint", "me/tiny", [published / "eval"] * 2)


def test_reports_of_other_shapes_and_names_make_a_card(published, tmp_path):
    report = json.loads((published / "eval/results.json").read_text())
    del report["machine"], report["interval"]
    report |= {"dataset": "what | is\n*this* $x$?", "metric": "anls"}
    report["mean"]["9"], report["accuracy"]["9"] = report["mean"]["4"], report["accuracy"]["4"]
    for name in [name for name in report if name.startswith(("milliseconds", "tokens_per", "peak"))]:
        del report[name]
    save_report(tmp_path / "eval", report, [], report["dataset"])
    evaluation = read_evaluation(tmp_path / "eval")
    assert evaluation.slug == "what-is-this-x-test-anls"
    text = build_card(published / "checkpoint", "me/tiny", [evaluation]).text
    assert "### what \\| is \\*this\\* $x$?, test" in text
    assert "bootstrap" not in text and "Of these, 9 is measured above" in text
    nameless = read_evaluation(tmp_path / "eval")
    nameless.report |= {"dataset": ["???"], "dataset_split": None, "metric": "?"}
    assert nameless.file == "evaluation/evaluation/results.json"
