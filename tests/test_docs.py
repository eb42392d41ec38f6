import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import tokenflex
from tokenflex.files import save_checkpoint
from tokenflex.training.synthetic import draw_scene


ROOT = Path(__file__).parents[1]
MODULES = sorted(
    f"tokenflex.{name}"
    for name in [
        *(path.stem for path in ROOT.glob("*.py") if path.stem not in ("__init__", "__main__", "setup")),
        *(f"training.{found.name}" for found in pkgutil.iter_modules([str(ROOT / "training")])),
        *(f"evaluation.{found.name}" for found in pkgutil.iter_modules([str(ROOT / "evaluation")])),
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
        runner.run(example)
    assert runner.failures == 0


def python_blocks():
    blocks = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)):
            blocks.append(pytest.param(block, id=f"{path.name}-{number}"))
    return blocks


@pytest.mark.parametrize("block", python_blocks())
def test_python_in_the_documentation_runs(block, tiny, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "outputs/demo/checkpoint", *tiny)
    draw_scene(0, 0).image.save(tmp_path / "outputs/demo/question.png")
    monkeypatch.chdir(tmp_path)
    if "easy_vqa" in block:
        pytest.importorskip("easy_vqa", reason="the block needs the data package easy-vqa")
    exec(compile(block, "block", "exec"), {})


def test_version_stands_in_one_place():
    assert tokenflex.__version__ not in (ROOT / "pyproject.toml").read_text()
    assert tokenflex.__version__ not in (ROOT / "setup.py").read_text()
