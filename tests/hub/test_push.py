import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokenflex.evaluation import evaluate, save_report
from tokenflex.files import save_checkpoint
from tokenflex.training.synthetic import SyntheticVQA


spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).with_name("hub_server.py"))
hub_server = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hub_server)

LOAD = """
import sys, torch
repo, out, installed = sys.argv[1], sys.argv[2], sys.argv[3] == "installed"
if installed:
    import tokenflex
else:
    sys.modules["tokenflex"] = None
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
trust = {} if installed else {"trust_remote_code": True}
assert AutoConfig.from_pretrained(repo, **trust).model_type == "tokenflex"
assert type(AutoModel.from_pretrained(repo, **trust)).__name__ == "TokenFlexModel"
processor = AutoProcessor.from_pretrained(repo, **trust)
model = AutoModelForImageTextToText.from_pretrained(repo, **trust)
assert ("transformers_modules" in type(model).__module__) is not installed
image = Image.open(out + "/image.png")
inputs = processor(images=image, text="<|image_pad|> which color?", return_tensors="pt")
answers = {n: model.generate(**inputs, num_vision_tokens=n, max_new_tokens=4, min_new_tokens=4) for n in (4, 16, 36)}
torch.save(answers, out + "/answers.pt")
"""

PUSH = """
import json, os, sys, time
from urllib.request import Request, urlopen
time.sleep = lambda seconds: None  # huggingface_hub waits between attempts
from tokenflex.hub import push_checkpoint
for token, breaks in json.loads(sys.argv[2]):
    urlopen(Request(f"{os.environ['HF_ENDPOINT']}/breaks/{breaks}", data=b""))
    os.environ["HF_TOKEN"] = token
    try:
        print("published", push_checkpoint(sys.argv[1], "alice/other"))
    except (ValueError, ConnectionError) as error:
        print(type(error).__name__, error)
"""

CLASSES = """
import sys
from transformers import Trainer, TrainingArguments
from tokenflex import TokenFlexForConditionalGeneration, TokenFlexProcessor
from tokenflex.training.arguments import TokenFlexTrainingArguments
from tokenflex.training.synthetic import SyntheticVQA
from tokenflex.training.trainer import TokenFlexTrainer
model = TokenFlexForConditionalGeneration.from_pretrained(sys.argv[1])
processor = TokenFlexProcessor.from_pretrained(sys.argv[1])
model.push_to_hub("alice/parts")
processor.push_to_hub("alice/parts")
model.config.push_to_hub("alice/config")
options = {"output_dir": sys.argv[2], "max_steps": 1, "per_device_train_batch_size": 2, "report_to": "none",
           "disable_tqdm": True, "push_to_hub": True, "hub_model_id": "alice/trained"}
args = TokenFlexTrainingArguments(**options)
rows = SyntheticVQA(4, 5)
trainer = TokenFlexTrainer(model, args, processing_class=processor, train_dataset=rows, eval_dataset=rows)
trainer.train()
trainer.evaluate()
trainer.push_to_hub(license="mit")
"""


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("push")
    save_checkpoint(folder / "checkpoint", *tiny)
    report, predictions = evaluate(*tiny, SyntheticVQA(4, 5), latency_batch_size=2, show_progress=False)
    save_report(folder / "eval", report, predictions, "shapes")
    return folder / "checkpoint"


@pytest.fixture
def hub():
    with hub_server.running_hub() as running:
        yield running


def run(url, home, token, *command):
    variables = hub_server.environment(url, home, token)
    return subprocess.run(
        [sys.executable, *map(str, command)], env=variables, cwd=home, capture_output=True, text=True
    )


def push(url, home, token, checkpoint, repo_id, *options):
    command = ("-m", "tokenflex", "push", "--model_name_or_path", checkpoint, "--repo_id", repo_id, *options)
    return run(url, home, token, *command)


def test_pushed_by_one_process_a_model_loads_in_another_clean_one(tiny, checkpoint, hub, tmp_path):
    server, url = hub
    done = push(url, tmp_path, hub_server.WRITER, checkpoint, "tiny", "--evaluation", checkpoint.with_name("eval"))
    assert done.returncode == 0, done.stderr
    _, files = server.head("alice/tiny")
    assert done.stdout.splitlines()[-1].startswith(f"Published: {url}/alice/tiny/commit/")
    assert len(server.commits["alice/tiny"]) == 2, "making the repository, and one commit for everything"
    assert files["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    assert files["evaluation/eval/results.png"].startswith(b"\x89PNG")
    assert not [name for name in files if name.endswith((".bin", ".pt"))]
    card = files["README.md"].decode()
    assert 'from_pretrained("alice/tiny", trust_remote_code=True)' in card
    means = json.loads((checkpoint.with_name("eval") / "results.json").read_text())["mean"].values()
    assert all(f"value: {mean}" in card for mean in means)

    model, processor = tiny
    image = SyntheticVQA(1, 5)[0]["image"]
    image.save(tmp_path / "image.png")
    inputs = processor(images=image, text="<|image_pad|> which color?", return_tensors="pt")
    for mode in ("remote code", "installed"):
        loaded = run(url, tmp_path, None, "-c", LOAD, "alice/tiny", tmp_path, mode)
        assert loaded.returncode == 0, loaded.stderr
        for count, answer in torch.load(tmp_path / "answers.pt").items():
            expected = model.generate(**inputs, num_vision_tokens=count, max_new_tokens=4, min_new_tokens=4)
            assert torch.equal(answer, expected), (mode, count)
        (tmp_path / "answers.pt").unlink()


def test_a_push_that_fails_publishes_nothing_and_says_so(checkpoint, hub, tmp_path):
    server, url = hub
    cases = [("", "no"), ("hf_unknown", "no"), (hub_server.STRANGER, "no")]
    cases += [(hub_server.WRITER, breaks) for breaks in ("upload", "commit", "answer")]
    done = run(url, tmp_path, None, "-c", PUSH, checkpoint, json.dumps(cases))
    assert done.returncode == 0, done.stderr
    nobody, unknown, stranger, upload, commit, answer = done.stdout.splitlines()
    assert nobody.startswith("ValueError Nobody is logged in: run `hf auth login`")
    assert "does not know the token" in unknown
    assert "may not write there" in stranger
    for message in (upload, commit):
        assert message.startswith("ConnectionError The upload broke off")
        assert "Nothing was published: alice/other is as it was" in message
    # One commit made the repository, the other is the one that arrived though its answer did not.
    (_, made), (arrived, published) = server.commits["alice/other"]
    assert list(made) == [".gitattributes"]
    assert f"It was published all the same, as commit {arrived}" in answer
    assert published["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()


def test_a_second_push_replaces_what_is_no_longer_part_of_the_model(checkpoint, hub, tmp_path):
    server, url = hub
    stale = {"model-00001-of-00002.safetensors": b"", "evaluation/old/results.json": b"{}"}
    server.commit("alice/other", {**stale, "notes.md": b"somebody's own"})
    done = run(url, tmp_path, None, "-c", PUSH, checkpoint, json.dumps([(hub_server.WRITER, "no")]))
    assert done.stdout.startswith("published"), done.stdout + done.stderr
    files = server.head("alice/other")[1]
    assert len(server.commits["alice/other"]) == 2
    assert "notes.md" in files and "model.safetensors" in files and not stale.keys() & files.keys()


def test_missing_and_private_repositories_are_named(checkpoint, hub, tmp_path):
    server, url = hub
    server.commit("alice/secret", {"config.json": b"{}"})
    server.private.add("alice/secret")
    script = """
import sys, tokenflex
from transformers import AutoModelForImageTextToText
for repo in ("alice/missing", "alice/secret"):
    try:
        AutoModelForImageTextToText.from_pretrained(repo)
    except OSError as error:
        print(repo, "|", str(error).splitlines()[0])
"""
    done = run(url, tmp_path, hub_server.STRANGER, "-c", script)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    assert all(repo in line for repo, line in zip(("alice/missing", "alice/secret"), lines))


def test_every_class_and_the_trainer_push(checkpoint, hub, tmp_path):
    server, url = hub
    done = run(url, tmp_path, hub_server.WRITER, "-c", CLASSES, checkpoint, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    parts = server.head("alice/parts")[1]
    assert {
        "model.safetensors",
        "config.json",
        "modeling_tokenflex.py",
        "processor_config.json",
        "tokenizer.json",
    } <= set(parts)
    assert b'"AutoModel"' in server.head("alice/config")[1]["config.json"]
    trained = server.head("alice/trained")[1]
    card = trained["README.md"].decode()
    report = json.loads(trained["evaluation/evaluation/results.json"])
    assert all(f"value: {mean}" in card for mean in report["mean"].values())
    assert "license: mit" in card and "generated automatically" not in card
    assert {"model.safetensors", "modeling_tokenflex.py", "processor_config.json"} <= set(trained)
