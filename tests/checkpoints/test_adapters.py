import pytest
import torch
from PIL import Image

from tokenflex.checkpoints.adapters import adapted_checkpoint, load_processor, refuse_adapters
from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.cli import main
from tokenflex.training.lora import add_adapters, lora_config, merge_adapters


pytest.importorskip("peft")


@pytest.fixture(scope="module")
def folder(narrow, tmp_path_factory):
    """A checkpoint, adapters of it that turn its answers into others, and the two merged."""
    folder = tmp_path_factory.mktemp("adapters")
    save_checkpoint(folder / "base", *narrow)
    model = type(narrow[0]).from_pretrained(folder / "base")
    adapted = add_adapters(model, lora_config(model, rank=2))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight))
    adapted.save_pretrained(folder / "adapter")
    save_checkpoint(folder / "merged", merge_adapters(folder / "base", folder / "adapter"), narrow[1])
    Image.new("RGB", (8, 8)).save(folder / "image.png")
    return folder


def generate(folder, name, capsys):
    question = ["--image", str(folder / "image.png"), "--question", "why?", "--max_new_tokens", "8"]
    main(["generate", "--model_name_or_path", str(folder / name), "--num_vision_tokens", "4", *question])
    return capsys.readouterr().out


def test_adapters_answer_as_they_do_merged(folder, capsys):
    assert (
        generate(folder, "adapter", capsys) == generate(folder, "merged", capsys) != generate(folder, "base", capsys)
    )


def test_adapters_name_the_checkpoint_they_adapt(folder):
    assert adapted_checkpoint(folder / "adapter") == str(folder / "base")
    assert adapted_checkpoint(folder / "base") is adapted_checkpoint(folder / "nothing") is None
    processors = [load_processor(folder / name) for name in ("adapter", "base")]
    assert processors[0].to_dict() == processors[1].to_dict()
    refuse_adapters(folder / "merged")


@pytest.mark.parametrize(
    "command",
    [
        ["calibrate", "--dataset", "synthetic:2"],
        ["train", "--dataset", "synthetic:2", "--max_steps", "1"],
        ["push", "--repo_id", "me/adapted", "--without_evaluation"],
    ],
)
def test_commands_that_need_a_whole_model_say_how_to_merge(folder, tmp_path, command):
    verb, *options = command
    arguments = ["--model_name_or_path", str(folder / "adapter"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="adapters of .*base, not a model.*merge_adapters"):
        main([verb, *arguments, *options])
    assert not (tmp_path / "out").exists()
