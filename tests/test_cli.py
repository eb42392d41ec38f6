import importlib
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.cli import VERBS, main
from tokenflex.data.synthetic import SyntheticVQA


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    assert f"usage: tokenflex {verb}" in capsys.readouterr().out


def test_help_lists_every_verb(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert all(verb in out and summary.split()[0] in out for verb, (_, summary) in VERBS.items())


@pytest.mark.parametrize("argv", [[], ["trian"], ["--nonsense"]])
def test_unknown_verbs_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "usage: tokenflex" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_unknown_options_are_refused(verb, capsys):
    with pytest.raises((SystemExit, ValueError)):
        main([verb, "--no_such_option", "3"])


words = st.text(st.characters(codec="ascii", categories=["L", "N", "P", "Zs"]), max_size=8)


@given(st.lists(words.filter(lambda word: word != "--")))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arguments_reach_the_verb_as_given(monkeypatch, arguments):
    received = []
    monkeypatch.setattr(importlib.import_module("tokenflex.inference.ask"), "main", received.append)
    main(["generate", *arguments])
    assert received == [arguments]


def test_verb_runs_through_the_command(tiny, tmp_path, capsys):
    save_checkpoint(tmp_path / "checkpoint", *tiny)
    SyntheticVQA(1, 4)[0]["image"].save(tmp_path / "image.png")
    main([
        "generate", "--model_name_or_path", str(tmp_path / "checkpoint"), "--image", str(tmp_path / "image.png"),
        "--question", "which color is it?", "--num_vision_tokens", "4", "36", "--max_new_tokens", "2",
    ])  # fmt: skip
    assert capsys.readouterr().out.count("vision tokens: ") == 2


def test_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "tokenflex", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage: tokenflex" in done.stdout
