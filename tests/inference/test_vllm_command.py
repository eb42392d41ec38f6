import json
import sys

import pytest

from tokenflex.checkpoints.files import save_checkpoint


pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from tokenflex.inference import serve, vllm_command  # noqa: E402


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("vllm") / "checkpoint"
    save_checkpoint(path, *tiny)
    return str(path)


@pytest.fixture
def started(monkeypatch):
    """What the process would have become, and in what environment."""
    became = []

    class Became(BaseException):
        pass

    def execve(path, command, environment):
        became.append((command, environment))
        raise Became

    monkeypatch.setattr(vllm_command.os, "execve", execve)
    monkeypatch.setattr(vllm_command, "find_spec", lambda name: name)

    def start(*arguments):
        with pytest.raises(Became):
            serve.main(["--engine", "vllm", *arguments])
        return became.pop()

    return start


def option(command, name):
    return command[command.index(name) + 1]


@pytest.mark.parametrize(("text", "count"), [(None, 36), ("16", 16), ("low", 4), ("2x5", [2, 5])])
def test_the_engine_starts_with_the_count(started, checkpoint, text, count):
    arguments = ["--num_vision_tokens", text] if text else []
    command, _ = started("--model_name_or_path", checkpoint, *arguments)
    assert command[:4] == [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
    assert command[4] == checkpoint
    assert json.loads(option(command, "--mm-processor-kwargs")) == {"num_vision_tokens": count}
    assert "--trust-request-mm-kwargs" in command, "counts of requests need it, and the middleware refuses the rest"


def test_the_middleware_is_there(started, checkpoint):
    command, _ = started("--model_name_or_path", checkpoint)
    module, name = option(command, "--middleware").rsplit(".", 1)
    assert hasattr(pytest.importorskip(module), name)


def test_limits_and_arguments_that_are_vllms_are_passed_on(started, checkpoint):
    arguments = ["--max_images", "3", "--max_megapixels", "2", "--port", "81", "--", "--tensor-parallel-size", "2"]
    command, environment = started("--model_name_or_path", checkpoint, *arguments)
    assert json.loads(option(command, "--limit-mm-per-prompt")) == {"image": 3}
    assert environment["VLLM_MAX_IMAGE_PIXELS"] == "2000000"
    assert option(command, "--port") == "81"
    assert command[-2:] == ["--tensor-parallel-size", "2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "vllm", "--keep_images", "3"], "--keep_images is not taken with --engine vllm"),
        (["--engine", "vllm", "--device", "cpu"], "--device is not taken with --engine vllm"),
        (["--", "--tensor-parallel-size", "2"], "unrecognized arguments: --tensor-parallel-size 2"),
    ],
)
def test_arguments_of_the_other_server_are_refused(checkpoint, capsys, arguments, message):
    with pytest.raises(SystemExit):
        serve.main(["--model_name_or_path", checkpoint, *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("count", "message"), [("5", "`num_vision_tokens`=5"), ("auto", "not learned to choose")])
def test_a_count_that_cannot_be_is_refused(checkpoint, count, message):
    with pytest.raises(ValueError, match=message):
        vllm_command.build_command(checkpoint, count)


def test_a_checkpoint_that_chooses_cannot_do_so_there(calibrated, tmp_path):
    save_checkpoint(tmp_path / "checkpoint", *calibrated)
    with pytest.raises(ValueError, match="in vLLM no model chooses a count"):
        vllm_command.build_command(str(tmp_path / "checkpoint"), "auto")


def test_without_vllm_it_says_what_to_install(checkpoint, monkeypatch):
    monkeypatch.setattr(vllm_command, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install vllm"):
        vllm_command.run_vllm(model_name_or_path=checkpoint)
