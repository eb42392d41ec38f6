import doctest
import importlib
import pkgutil
import re
import shlex
from argparse import ArgumentParser
from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from transformers import HfArgumentParser, Qwen2ForCausalLM

import tokenflex
from tokenflex import cli
from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.data.synthetic import draw_scene


ROOT = Path(__file__).parents[1]
MODULES = sorted(
    f"tokenflex.{name}"
    for name in [
        *(path.stem for path in ROOT.glob("*.py") if path.stem not in ("__init__", "__main__", "setup")),
        *(
            f"{package}.{found.name}"
            for package in ("checkpoints", "data", "towers", "training", "evaluation", "hub", "inference", "research")
            for found in pkgutil.iter_modules([str(ROOT / package)])
            if found.name != "vllm_model"  # has no example, and imports vLLM
        ),
    ]
)


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    source = importlib.import_module(module)
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=options)
    for example in finder.find(source, module=source):
        # A closing fence directly behind the output would be taken for output.
        for part in example.examples:
            part.want = part.want.replace("```\n", "")
            part.exc_msg = part.exc_msg and part.exc_msg.replace("```\n", "")
        runner.run(example)
    assert runner.failures == 0


def blocks(language):
    found = []
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for number, block in enumerate(re.findall(rf"```{language}\n(.*?)```", path.read_text(), flags=re.DOTALL)):
            found.append(pytest.param(block, id=f"{path.name}-{number}"))
    return found


@pytest.mark.parametrize("block", blocks("python"))
def test_python_in_the_documentation_runs(block, tiny, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "outputs/demo/checkpoint", *tiny)
    draw_scene(0, 0).image.save(tmp_path / "outputs/demo/question.png")
    monkeypatch.chdir(tmp_path)
    if "easy_vqa" in block:
        pytest.importorskip("easy_vqa", reason="the block needs the data package easy-vqa")
    if "ExportedModel" in block and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("the block needs the exporters of transformers 5.23")
    exec(compile(block, "block", "exec"), {})


@pytest.mark.parametrize("block", blocks("py"))
def test_python_with_the_hubs_names_runs_on_local_folders(block, tiny, tmp_path, monkeypatch):
    """Blocks that name checkpoints of the Hub; `tests/test_serve.py` runs the one that asks a server."""
    if "base_url" in block or "vllm" in block:
        pytest.skip("asks a server, or vLLM")
    model, processor = tiny
    causal_lm = Qwen2ForCausalLM(model.config.text_config)
    model.model.vision_tower.save_pretrained(tmp_path / "tower")
    causal_lm.save_pretrained(tmp_path / "language_model")
    processor.tokenizer.save_pretrained(tmp_path / "language_model")
    save_checkpoint(tmp_path / "mine", model, processor)
    local = {
        "google/siglip-so400m-patch14-384": "tower",
        "Qwen/Qwen2.5-7B-Instruct": "language_model",
        "you/mine": "mine",
    }
    for name, folder in local.items():
        block = block.replace(f'"{name}"', repr(str(tmp_path / folder)))
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "block", "exec"), {})


class _Accepted(Exception):
    pass


@pytest.mark.parametrize("block", blocks("bash"))
def test_commands_in_the_documentation_are_accepted(block, monkeypatch):
    """Every command's arguments are parsed by the command itself, up to where it would begin to work."""
    parse = ArgumentParser.parse_args

    def parse_only(self, args=None, **kwargs):
        parse(self, args)
        raise _Accepted

    monkeypatch.setattr(ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(HfArgumentParser, "parse_args_into_dataclasses", parse_only)
    commands = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
    for command in commands:
        if "tokenflex" in command[:1]:
            with pytest.raises(_Accepted):
                cli.main(["--traceback", *command[1:]])
        elif command[:1] == ["make"]:
            assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        elif command[:1] == ["python"] and command[1].endswith(".py"):
            assert (ROOT / command[1]).is_file()


def test_files_named_in_the_documentation_exist():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    named = {path for page in pages for path in re.findall(r"`((?:\w+/)+\w+\.(?:py|md))`", page.read_text())}
    assert not [path for path in named if not (ROOT / path).is_file()]


def test_version_stands_in_one_place():
    assert tokenflex.__version__ not in (ROOT / "pyproject.toml").read_text()
    assert tokenflex.__version__ not in (ROOT / "setup.py").read_text()
