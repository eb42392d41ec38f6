"""What experiments on tiny models share: their first stages, how to train and load, how to write a score."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

from ..evaluation.intervals import mean_over_seeds
from ..modeling_tokenflex import TokenFlexForConditionalGeneration
from ..processing_tokenflex import TokenFlexProcessor
from ..towers.tiny import tiny_model_and_processor
from ..training import train
from ..training.quickstart import train_tower
from ..training.resume import end_run, has_ended


TEST_SEED = 29_001  # of images that nothing is trained on
OPTIONS = ["--dataloader_pin_memory", "false", "--report_to", "none", "--disable_tqdm", "true"]


def train_base(
    folder: Path,
    seed: int,
    scale: float,
    change: Callable[[TokenFlexForConditionalGeneration, int], None] | None = None,
) -> Path:
    """
    Trains the tower and the first stage of the small recipes; what a former call has finished is used again.

    Args:
        folder (`Path`): Folder of the seed.
        seed (`int`): The seed of weights, data and draws.
        scale (`float`): Scales the steps.
        change (`Callable`, *optional*): Takes the untrained model and the seed and changes the model.

    Returns:
        `Path`: The checkpoint.
    """
    tower = folder / "tower"
    if not has_ended(tower, {"scale": scale}):
        model, processor = tiny_model_and_processor(seed)
        if change is not None:
            change(model, seed)
        train_tower(model, processor, tower, seed, scale)
        end_run(tower, {"scale": scale})
    return train_stage(folder / "base", "small/stage1.yaml", tower / "final", seed, "--num_train_epochs", str(scale))


def train_stage(folder: Path, recipe: str, start: Path, seed: int, *options: str) -> Path:
    """
    Trains by a recipe, as `tokenflex train` does; what a former call has finished is used again.

    Args:
        folder (`Path`): Folder for the run.
        recipe (`str`): A recipe, such as `"small/stage2.yaml"`.
        start (`Path`): The checkpoint to start from.
        seed (`int`): The seed of data and draws.
        options (`str`): Further flags.

    Returns:
        `Path`: The checkpoint.
    """
    run = ["--output_dir", str(folder), "--seed", str(seed), *OPTIONS, *options]
    train.main(["--config", recipe, "--model_name_or_path", str(start), *run])
    return folder / "final"


def load(checkpoint: Path) -> tuple[TokenFlexForConditionalGeneration, TokenFlexProcessor]:
    """
    Loads a checkpoint and its processor.

    Args:
        checkpoint (`Path`): The folder.
    """
    return AutoModelForImageTextToText.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)


def write_score(scores: Sequence[Sequence[int]], minus: Sequence[Sequence[int]] | None, questions: Mapping) -> str:
    """
    Writes an accuracy over seeds, or a paired difference of two, in %: `"97.3 (96.3 to 98.3)"`.

    Args:
        scores (`Sequence[Sequence[int]]`): A 1 or 0 for every question, for each seed.
        minus (`Sequence[Sequence[int]]`, *optional*): What to subtract.
        questions (`Mapping`): `families` and `images` of the questions.
    """
    if minus is not None:
        scores = [[a - b for a, b in zip(*pair)] for pair in zip(scores, minus)]
    interval = mean_over_seeds(scores, questions["families"], questions["images"])
    mean, low, high = (f"{100 * value:{'+' if minus is not None else ''}.1f}" for value in interval)
    return f"{mean} ({low} to {high})"
