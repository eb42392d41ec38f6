import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import tokenflex
from tokenflex.checkpoints.files import save_checkpoint


pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools>=77")

ROOT = Path(__file__).parents[1]
NOT_TREE = shutil.ignore_patterns(".*", "__pycache__", "outputs", "build", "dist", "*.egg-info", "unused")
NOT_PACKAGED = {"setup.py"}
USE = """
import json, sys
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
import tokenflex

model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
inputs = processor(images=Image.new("RGB", (64, 64), "red"), text="<|image_pad|>which color?", return_tensors="pt")
answers = [model.generate(**inputs, num_vision_tokens=n, max_new_tokens=4).tolist() for n in (4, 16, 36)]
print(json.dumps({"file": tokenflex.__file__, "module": type(model).__module__, "answers": answers}))
"""


def shell(*command, cwd, **environment):
    """The output of a command, in a process that sees no other copy of the package than `environment` says."""
    offline = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    result = subprocess.run(
        command, cwd=cwd, env={**os.environ, **offline, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def build(kind, source, target):
    """Runs setuptools' own hook, as every build frontend does, without fetching anything."""
    target.mkdir(exist_ok=True)
    hook = f"import setuptools.build_meta as b, sys; b.build_{kind}(sys.argv[1])"
    shell(sys.executable, "-c", hook, str(target), cwd=source)
    (made,) = target.iterdir()
    return made


def files_of(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what is, or is about to be, tracked."""
    target = tmp_path_factory.mktemp("source") / "tokenflex"
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True) if shutil.which("git") else None
    if listed is None or listed.returncode != 0:
        shutil.copytree(ROOT, target, ignore=NOT_TREE)
        return target
    for name in filter(lambda name: (ROOT / name).is_file(), listed.stdout.splitlines()):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory):
    return build("sdist", source, tmp_path_factory.mktemp("sdist") / "made")


@pytest.fixture(scope="module")
def wheel(source, sdist, tmp_path_factory):
    return build("wheel", source, tmp_path_factory.mktemp("wheel") / "made")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("installed")
    options = ["--no-deps", "--no-index", "--no-compile", "--target", str(target)]
    shell(sys.executable, "-m", "pip", "install", *options, str(wheel), cwd=target)
    return target


def test_wheel_holds_the_packages_and_nothing_else(source, wheel):
    modules = {path for path in source.glob("*.py") if path.name not in NOT_PACKAGED}
    folders = [path.parent for path in source.glob("*/__init__.py")]
    assert {"training", "evaluation", "research"} <= {folder.name for folder in folders}
    expected = modules | {path for folder in folders for path in folder.rglob("*") if path.is_file()}
    expected = {f"tokenflex/{path.relative_to(source).as_posix()}" for path in expected if path.suffix != ".pyc"}
    found = {name for name in files_of(wheel) if ".dist-info/" not in name}
    assert found == expected
    assert "tokenflex/training/recipes/full/stage1.yaml" in found
    assert not [
        name for name in found if name.split("/")[1] in ("tests", "benchmarks", "docs", "examples", "setup.py")
    ]


def test_wheel_says_what_it_is(wheel):
    files = files_of(wheel)
    folder = f"tokenflex-{tokenflex.__version__}.dist-info"
    entries = configparser.ConfigParser()
    entries.read_string(files[f"{folder}/entry_points.txt"].decode())
    assert entries["console_scripts"]["tokenflex"] == "tokenflex.cli:main"
    assert entries["lmms_eval.models"]["tokenflex"] == "tokenflex.evaluation.lmms_eval_plugin:manifests"
    assert files[f"{folder}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    metadata = files[f"{folder}/METADATA"].decode()
    assert re.search(r"^License(-Expression)?: Apache-2.0$", metadata, re.MULTILINE) and "# tokenflex" in metadata


def test_citation_and_changelog_are_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == tokenflex.__version__
    assert f"\n## [{tokenflex.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_sdist_builds_the_same_wheel(source, sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / f"tokenflex-{tokenflex.__version__}"
    again = build("wheel", unpacked, tmp_path / "made")
    assert files_of(again) == files_of(wheel)
    needed = {"LICENSE", "Makefile", "README.md", "constraints.txt", "pyproject.toml", "setup.py"}
    folders = ("benchmarks", "docs", "examples", "tests")
    needed |= {path.relative_to(source).as_posix() for name in folders for path in (source / name).rglob("*.*")}
    missing = {name for name in needed if "__pycache__" not in name and not (unpacked / name).exists()}
    assert not missing, "what `make test` reads"


def test_command_of_the_installed_package(installed, tmp_path):
    said = shell(sys.executable, "-m", "tokenflex", "--version", cwd=tmp_path, PYTHONPATH=str(installed))
    assert said == f"tokenflex {tokenflex.__version__}\n"


def test_installed_package_loads_a_checkpoint_without_remote_code(installed, tiny, tmp_path):
    model, processor = tiny
    save_checkpoint(tmp_path / "checkpoint", model, processor)
    said = shell(sys.executable, "-c", USE, str(tmp_path / "checkpoint"), cwd=tmp_path, PYTHONPATH=str(installed))
    said = json.loads(said.splitlines()[-1])
    assert Path(said["file"]).is_relative_to(installed)
    assert said["module"] == "tokenflex.modeling_tokenflex", "the installed class, not the checkpoint's copy"
    inputs = processor(images=Image.new("RGB", (64, 64), "red"), text="<|image_pad|>which color?", return_tensors="pt")
    with torch.no_grad():
        expected = [model.generate(**inputs, num_vision_tokens=n, max_new_tokens=4).tolist() for n in (4, 16, 36)]
    assert said["answers"] == expected
