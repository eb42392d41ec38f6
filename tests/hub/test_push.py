import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import read_rows

from tokenflex import TokenFlexForConditionalGeneration, TokenFlexProcessor
from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.data.synthetic import SyntheticVQA
from tokenflex.evaluation import evaluate, save_report
from tokenflex.hub.push import collect_files
from tokenflex.training.arguments import TokenFlexTrainingArguments
from tokenflex.training.lora import add_adapters, lora_config
from tokenflex.training.trainer import TokenFlexTrainer


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
from tokenflex import TokenFlexForConditionalGeneration, TokenFlexProcessor
from tokenflex.training.arguments import TokenFlexTrainingArguments
from tokenflex.data.synthetic import SyntheticVQA
from tokenflex.training.train import main
from tokenflex.training.trainer import TokenFlexTrainer
checkpoint, folder, token = sys.argv[1:]
model = TokenFlexForConditionalGeneration.from_pretrained(checkpoint)
processor = TokenFlexProcessor.from_pretrained(checkpoint)
model.push_to_hub("alice/parts")
processor.push_to_hub("alice/parts")
model.config.push_to_hub("alice/config")
options = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True,
           "learning_rate": 0.01, "save_steps": 1, "save_strategy": "steps", "dataloader_num_workers": 0,
           "hub_token": token, "push_to_hub": True}
rows = SyntheticVQA(4, 5)
args = TokenFlexTrainingArguments(folder + "/script", hub_model_id="alice/script", **options)
trainer = TokenFlexTrainer(model, args, processing_class=processor, train_dataset=rows, eval_dataset=rows)
trainer.evaluate()  # of weights that are not what is published
trainer.train()
trainer.push_to_hub(license="mit")
for name, more in (("trained", []), ("adapted", ["--lora_rank", "2"])):
    arguments = [f"--{key}={value}" for key, value in options.items()]
    main(["--model_name_or_path", checkpoint, "--dataset", "synthetic:4", *arguments, *more,
          "--eval_dataset", "synthetic:4", f"--output_dir={folder}/{name}", f"--hub_model_id=alice/{name}"])
"""


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("push")
    save_checkpoint(folder / "checkpoint", *tiny)
    report, predictions = evaluate(*tiny, SyntheticVQA(4, 5), latency_batch_size=2, show_progress=False)
    save_report(folder / "eval", report, predictions, "shapes")
    return folder / "checkpoint"


def test_scores_of_another_checkpoint_are_refused(checkpoint, tiny, tmp_path):
    model, processor = copy.deepcopy(tiny[0]), copy.deepcopy(tiny[1])
    scores = [checkpoint.with_name("eval")]
    assert collect_files(checkpoint, "me/same", scores)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    save_checkpoint(tmp_path / "trained on", model, processor)
    with pytest.raises(ValueError, match=r"`evaluation`=.*another checkpoint, which differs in weights \(\w+, not"):
        collect_files(tmp_path / "trained on", "me/other", scores)
    processor.image_processor.image_mean = [0.1, 0.1, 0.1]
    save_checkpoint(tmp_path / "seen otherwise", tiny[0], processor)
    with pytest.raises(ValueError, match=r"differs in processor \("):
        collect_files(tmp_path / "seen otherwise", "me/other", scores)


def test_scores_that_do_not_say_of_which_checkpoint_are_refused(checkpoint, tmp_path):
    report = json.loads((checkpoint.with_name("eval") / "results.json").read_text())
    del report["checkpoint"]
    save_report(tmp_path, report, [], "shapes")
    with pytest.raises(ValueError, match="another checkpoint.*`tokenflex eval`"):
        collect_files(checkpoint, "me/same", [tmp_path])


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_scores_of_the_loaded_checkpoint_are_its_own(tiny, tmp_path, dtype):
    """Whatever the dtypes of the saved weights and the files they are in."""
    model = copy.deepcopy(tiny[0])
    model.model.vision_tower.to(torch.bfloat16)
    model.to(dtype)
    save_checkpoint(tmp_path / "checkpoint", model, tiny[1], max_shard_size="500KB")
    assert len(list((tmp_path / "checkpoint").glob("*.safetensors"))) > 1
    loaded = TokenFlexForConditionalGeneration.from_pretrained(tmp_path / "checkpoint")
    processor = TokenFlexProcessor.from_pretrained(tmp_path / "checkpoint")
    report, _ = evaluate(loaded, processor, SyntheticVQA(1, 5), [4], latency_batch_size=0, show_progress=False)
    save_report(tmp_path / "eval", report, [], "shapes")
    assert collect_files(tmp_path / "checkpoint", "me/same", [tmp_path / "eval"])


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
    assert files["evaluation/eval-exact_match/results.png"].startswith(b"\x89PNG")
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
    cases += [(hub_server.READER, "no")]
    cases += [(hub_server.WRITER, breaks) for breaks in ("upload", "commit", "race", "answer")]
    done = run(url, tmp_path, None, "-c", PUSH, checkpoint, json.dumps(cases))
    assert done.returncode == 0, done.stderr
    nobody, unknown, stranger, reader, upload, commit, race, answer = done.stdout.splitlines()
    assert nobody.startswith("ValueError Nobody is logged in: run `hf auth login`")
    assert "does not know the token" in unknown
    assert "may not write there" in stranger and "may not write there" in reader
    assert "Nothing was published: somebody has committed to alice/other meanwhile" in race
    for message in (upload, commit):
        assert message.startswith("ConnectionError The upload broke off")
        assert "Nothing was published: the files of alice/other are as they were" in message
    # Made, somebody else's, and the one that arrived though its answer did not.
    (_, made), (_, others), (arrived, published) = server.commits["alice/other"]
    assert list(made) == [".gitattributes"] and list(others) == [".gitattributes", "notes.md"]
    assert f"It was published all the same, as commit {arrived}" in answer
    assert published["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()


def test_a_second_push_replaces_what_is_no_longer_part_of_the_model(checkpoint, hub, tmp_path):
    server, url = hub
    stale = ["model-00001-of-00002.safetensors", "adapter_config.json"]
    stale += ["evaluation/old/results.json", ".eval_results/old-4.yaml"]
    own = ["notes.md", "lora/adapter_model.safetensors", "evaluation/notes.md", ".eval_results/gsm8k.yaml"]
    server.commit("alice/other", dict.fromkeys([*stale, *own], b"{}"))
    done = run(url, tmp_path, None, "-c", PUSH, checkpoint, json.dumps([(hub_server.WRITER, "no")]))
    assert done.stdout.startswith("published"), done.stdout + done.stderr
    files = server.head("alice/other")[1]
    assert len(server.commits["alice/other"]) == 2
    assert {*own, "model.safetensors"} <= files.keys() and not files.keys() & set(stale)


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


def test_every_class_and_the_trainers_push(checkpoint, hub, tmp_path):
    server, url = hub
    token = hub_server.WRITER
    done = run(url, tmp_path, token, "-c", CLASSES, checkpoint, tmp_path / "run", token)
    assert done.returncode == 0, done.stderr
    parts = server.head("alice/parts")[1]
    needed = {"model.safetensors", "config.json", "modeling_tokenflex.py", "processor_config.json", "tokenizer.json"}
    assert needed <= set(parts)
    assert b'"AutoModel"' in server.head("alice/config")[1]["config.json"]
    for name in ("script", "trained", "adapted"):
        for _, files in server.commits[f"alice/{name}"]:
            assert not [
                file for file in files if file.endswith((".bin", ".pt")) or "adapter" in file or "/model" in file
            ]
            assert not [file for file, content in files.items() if token.encode() in content], "the token stays here"
            assert not [file for file, content in files.items() if str(tmp_path).encode() in content], (
                "and so do paths"
            )
        assert needed <= set(files)
        assert json.loads(files["provenance.json"])["stages"][-1]["steps"] == 2
    assert len(server.commits["alice/trained"]) == 2, "the repository and the final model"
    assert len(server.commits["alice/script"]) == 4, "the repository, two checkpoints and the final model"
    assert "license: mit" in server.head("alice/script")[1]["README.md"].decode()
    for name, slug, rows in (
        ("script", "evaluation-set", SyntheticVQA(4, 5)),
        ("trained", "synthetic-4-test", read_rows("synthetic:4")),
        ("adapted", "synthetic-4-test", read_rows("synthetic:4")),
    ):
        files = server.head(f"alice/{name}")[1]
        report = json.loads(files[f"evaluation/{slug}-exact_match/results.json"])
        assert all(f"value: {mean}" in files["README.md"].decode() for mean in report["mean"].values())
        assert report["interval"] and report["milliseconds_to_first_token"]
        for file, content in files.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_bytes(content)
        model = TokenFlexForConditionalGeneration.from_pretrained(tmp_path / name)
        processor = TokenFlexProcessor.from_pretrained(tmp_path / name)
        again, _ = evaluate(model, processor, rows, latency_batch_size=0, show_progress=False)
        assert {str(count): mean for count, mean in again["mean"].items()} == report["mean"], "the weights' own scores"


def test_a_trainer_refuses_to_publish_what_is_no_model(tiny, tmp_path):
    model, processor = tiny
    options = {"report_to": "none", "push_to_hub": True, "hub_model_id": "alice/x"}
    for strategy in ("checkpoint", "all_checkpoints"):
        args = TokenFlexTrainingArguments(str(tmp_path), hub_strategy=strategy, **options)
        with pytest.raises(ValueError, match=f"`hub_strategy`='{strategy}'"):
            TokenFlexTrainer(model, args, processing_class=processor, train_dataset=SyntheticVQA(2, 5))


def test_an_upload_that_fails_on_the_way_does_not_end_training(tiny, tmp_path, monkeypatch):
    def break_off(self, *args, **kwargs):
        raise ConnectionError("The upload broke off")

    monkeypatch.setattr(TokenFlexTrainer, "publish", break_off)
    monkeypatch.setattr(TokenFlexTrainer, "init_hf_repo", lambda self: None)
    options = {"report_to": "none", "disable_tqdm": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    args = TokenFlexTrainingArguments(str(tmp_path), push_to_hub=True, per_device_train_batch_size=2, **options)
    model, processor = copy.deepcopy(tiny[0]), tiny[1]
    trainer = TokenFlexTrainer(model, args, processing_class=processor, train_dataset=SyntheticVQA(4, 5))
    trainer.train()
    assert trainer.state.global_step == 2
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_adapters_alone_are_refused_before_anything_is_trained(tiny, tmp_path):
    model = add_adapters(copy.deepcopy(tiny[0]), lora_config(tiny[0], rank=2))
    args = TokenFlexTrainingArguments(str(tmp_path), report_to="none", push_to_hub=True)
    with pytest.raises(ValueError, match="adapters, not a model"):
        TokenFlexTrainer(model, args, processing_class=tiny[1], train_dataset=SyntheticVQA(2, 5))
