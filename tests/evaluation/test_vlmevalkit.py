import copy
import json
import sys

import pytest
import torch
from PIL import Image

from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.data.synthetic import draw_scene
from tokenflex.evaluation import vlmevalkit


# The interfaces of VLMEvalKit, as small as they can be.
PACKAGE = {
    "vlmeval/__init__.py": "",
    "vlmeval/config.py": "supported_VLM = {'other': None}\n",
    "vlmeval/vlm/__init__.py": "from .base import BaseModel\n",
    "vlmeval/vlm/base.py": """
import os


class BaseModel:
    INTERLEAVE = False
    allowed_types = ["text", "image", "video"]

    def __init__(self):
        self.dump_image_func = None

    def use_custom_prompt(self, dataset):
        return False

    def set_dump_image(self, dump_image_func):
        self.dump_image_func = dump_image_func

    def preproc_content(self, inputs):
        if isinstance(inputs, (str, dict)):
            inputs = [inputs]
        kind = lambda value: "image" if os.path.exists(value) else "text"
        return [dict(type=kind(x), value=x) if isinstance(x, str) else x for x in inputs]

    def generate(self, message, dataset=None):
        message = self.preproc_content(message)
        assert all(item["type"] in self.allowed_types for item in message)
        return self.generate_inner(message, dataset)

    def chat(self, messages, dataset=None):
        for message in messages:
            message["content"] = self.preproc_content(message["content"])
        return self.chat_inner(messages, dataset=dataset)
""",
    "run.py": """
import argparse
import json

import vlmeval.vlm
from vlmeval.config import supported_VLM

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--model", nargs="+")
    parser.add_argument("--config")
    parser.add_argument("--work-dir")
    args = parser.parse_args()
    if args.config:
        assert args.data is None and args.model is None
        config = json.load(open(args.config))
        models = {name: getattr(vlmeval.vlm, c.pop("class"))(**c) for name, c in config["model"].items()}
        data = config["data"]
    else:
        models, data = {name: supported_VLM[name]() for name in args.model}, args.data
    for name, model in models.items():
        model.set_dump_image(lambda line: [line])
        assert not model.use_custom_prompt("MMStar")
        answers = [model.generate(message=json.load(open(path)), dataset="MMStar") for path in data]
        json.dump(answers, open(f"{name}.json", "w"))
""",
}


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    for name, text in PACKAGE.items():
        path = tmp_path / "clone" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "clone")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    vlmevalkit._model_class.cache_clear()
    yield tmp_path
    vlmevalkit._model_class.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "vlmeval"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlmevalkit") / "checkpoint"
    save_checkpoint(folder, *tiny)
    return str(folder)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index, mode in enumerate(["RGB", "L", "RGBA"]):
        draw_scene(3, index).image.convert(mode).save(folder / f"{index}.png")
    return [str(folder / f"{index}.png") for index in range(3)]


def interleaved(paths):
    first, second, third = paths
    return [
        [{"type": "image", "value": first}, {"type": "text", "value": "which color is the paper?"}],
        [
            {"type": "text", "value": "is this"},
            {"type": "image", "value": second},
            {"type": "text", "value": "taller than that?"},
            {"type": "image", "value": third},
        ],
        [{"type": "text", "value": "hello"}],
    ]


def own_answer(tiny, message, count, max_new_tokens=5, before=()):
    model, processor = tiny
    content = [{"type": p["type"], **({"text": p["value"]} if p["type"] == "text" else {})} for p in message]
    images = [Image.open(part["value"]) for part in message if part["type"] == "image"] or None
    prompt = processor.apply_chat_template([*before, {"role": "user", "content": content}], add_generation_prompt=True)
    options = {} if count is None else {"num_vision_tokens": count}
    inputs = processor(images=images, text=prompt, return_tensors="pt", **options)
    output = model.generate(**inputs, **options, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("count", [4, 36, "2x5", [2, 5], None])
def test_answers_equal_generate_at_each_count(workspace, checkpoint, paths, tiny, count):
    model = vlmevalkit.TokenFlexVLM(checkpoint, num_vision_tokens=count, max_new_tokens=5)
    grid = (2, 5) if count in ("2x5", [2, 5]) else count
    for message in interleaved(paths):
        assert model.generate(message, dataset="MMStar") == own_answer(tiny, message, grid)


def test_every_form_of_message_is_taken(workspace, checkpoint, paths, tiny):
    from vlmeval.vlm.base import BaseModel

    model = vlmevalkit.TokenFlexVLM(checkpoint, num_vision_tokens=16, max_new_tokens=5)
    assert isinstance(model, BaseModel) and model.INTERLEAVE
    message = interleaved(paths)[0]
    assert model.generate([paths[0], message[1]["value"]]) == own_answer(tiny, message, 16)
    assert model.generate("hello") == own_answer(tiny, interleaved(paths)[2], 16)
    assert model.generate({"type": "text", "value": "hello"}) == own_answer(tiny, interleaved(paths)[2], 16)
    model.set_dump_image(lambda line: line["path"])
    assert model.dump_image_func({"path": "a.png"}) == "a.png"


def test_conversations_are_answered_in_whole(workspace, checkpoint, tiny):
    model = vlmevalkit.TokenFlexVLM(checkpoint, max_new_tokens=5)
    text = [{"type": "text", "value": "hello"}]
    turns = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "hello"},
    ]
    before = [{"role": turn["role"], "content": turn["content"]} for turn in turns[:2]]
    assert model.chat(turns) == own_answer(tiny, text, None, before=before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_vision_tokens": 50}, "`num_vision_tokens`=50: .* Nearest: 49 or 64"),
        ({"num_vison_tokens": 16}, "`num_vison_tokens`=16. Did you mean `num_vision_tokens`?"),
        ({"use_vllm": True}, "`use_vllm`=True"),
    ],
)
def test_wrong_arguments_are_refused_by_name(workspace, checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        vlmevalkit.TokenFlexVLM(checkpoint, **options)


@pytest.fixture
def data(workspace, paths):
    files = [workspace / f"{index}_message.json" for index in range(3)]
    for file, message in zip(files, interleaved(paths)):
        file.write_text(json.dumps(message))
    return [file.name for file in files]


def test_runner_makes_each_count_a_model(workspace, checkpoint, paths, tiny, data):
    counts = ["--num_vision_tokens", "4", "2x5"]
    vlmevalkit.main(["--pretrained", checkpoint, *counts, "--max_new_tokens", "3", "--", "--data", *data])
    for name, count in {"tokenflex-4": 4, "tokenflex-2x5": (2, 5)}.items():
        expected = [own_answer(tiny, message, count, 3) for message in interleaved(paths)]
        assert json.loads((workspace / f"{name}.json").read_text()) == expected


def test_models_of_a_configuration_file_are_found(workspace, checkpoint, paths, tiny, data):
    model = {"class": "TokenFlexVLM", "pretrained": checkpoint, "num_vision_tokens": 16, "max_new_tokens": 3}
    (workspace / "config.json").write_text(json.dumps({"model": {"sixteen": model}, "data": dict.fromkeys(data)}))
    vlmevalkit.main(["--", "--config", "config.json"])
    expected = [own_answer(tiny, message, 16, 3) for message in interleaved(paths)]
    assert json.loads((workspace / "sixteen.json").read_text()) == expected


def commands(folder, checkpoint, data):
    """A command that names the model itself, and one whose model stands in a configuration file."""
    model = {"class": "TokenFlexVLM", "pretrained": str(checkpoint), "num_vision_tokens": 4, "max_new_tokens": 3}
    (folder / "c.json").write_text(json.dumps({"model": {"tokenflex-4": model}, "data": dict.fromkeys(data)}))
    counts = ["--num_vision_tokens", "4", "--max_new_tokens", "3"]
    yield ["--pretrained", str(checkpoint), *counts, "--", "--work-dir", "w", "--data", *data]
    yield ["--", "--work-dir=w", "--config", "c.json"]


@pytest.mark.parametrize("kind", [0, 1])
def test_answers_of_another_checkpoint_of_the_same_name_are_refused(workspace, tiny, data, kind):
    model, processor = copy.deepcopy(tiny[0]), tiny[1]
    save_checkpoint(workspace / "checkpoint", model, processor)
    vlmevalkit.main(list(commands(workspace, workspace / "checkpoint", data))[kind])
    (workspace / "checkpoint").rename(workspace / "moved")
    vlmevalkit.main(list(commands(workspace, workspace / "moved", data))[kind])
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    save_checkpoint(workspace / "checkpoint", model, processor)
    with pytest.raises(ValueError, match=r"tokenflex-4 holds answers of another model.*in weights \(.*--work-dir"):
        vlmevalkit.main(list(commands(workspace, workspace / "checkpoint", data))[kind])
    with pytest.raises(ValueError, match=r"differs in max_new_tokens \(3, not 5\)"):
        vlmevalkit.claim("w", {"tokenflex-4": {"pretrained": "moved", "num_vision_tokens": 4, "max_new_tokens": 5}})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--", "--data", "MMStar"], "by --pretrained or, behind `--`, by VLMEvalKit's --config"),
        (["--pretrained", "folder", "--", "--config=c.json"], "by --pretrained or, behind `--`"),
        (["--pretrained", "folder", "--", "--model", "qwen"], "leave out VLMEvalKit's --model"),
        (
            ["--pretrained", "folder", "--num_vision_tokens", "medium", "--", "--data", "MMStar"],
            "`num_vision_tokens`='medium': give a count",
        ),
    ],
)
def test_contradictory_commands_are_refused(workspace, capsys, argv, message):
    with pytest.raises(SystemExit):
        vlmevalkit.main(argv)
    assert message in " ".join(capsys.readouterr().err.split())


def test_run_py_is_found_or_asked_for(workspace):
    assert vlmevalkit.find_run_py() == workspace / "clone/run.py"
    (workspace / "clone/run.py").rename(workspace / "clone/vlmeval/run.py")
    assert vlmevalkit.find_run_py() == workspace / "clone/vlmeval/run.py"
    (workspace / "clone/vlmeval/run.py").unlink()
    with pytest.raises(ValueError, match="No run.py in .*--run_py"):
        vlmevalkit.find_run_py()


def test_nothing_of_vlmevalkit_is_needed_before_it_is_run():
    assert "vlmeval" not in sys.modules
    with pytest.raises(AttributeError, match="no attribute 'TokenFlex'"):
        vlmevalkit.TokenFlex  # noqa: B018
