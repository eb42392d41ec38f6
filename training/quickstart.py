"""
`tokenflex quickstart` (`make demo`): the whole job in minutes on two CPU cores, from nothing to answers at two counts.

Trains a tiny tower on images that it draws, then the tiny model by the small recipes at drawn counts and resolutions,
evaluates it at each, writes table, plot and checkpoint, loads the checkpoint through the Auto classes and asks it a
question. Stages that a former run has finished with the same settings are used again.
"""

import os
import resource
import shutil
import time
from argparse import ArgumentParser
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from ..checkpoints.files import save_checkpoint
from ..checkpoints.provenance import add_stage, read_provenance
from ..choices_tokenflex import resolve_named_count
from ..data.synthetic import SyntheticVQA, draw_scene
from ..evaluation import evaluate, save_report
from ..evaluation.report import markdown_table
from ..inference.ask import answer
from ..towers.tiny import tiny_model_and_processor
from .arguments import RECIPES
from .optimization import MuonAdamW
from .patch_labels import PatchLabelCollator, PatchLabelDataset, PatchLabelModel
from .resume import end_run, has_ended
from .train import train_stages


STAGES = [RECIPES / f"small/stage{number}.yaml" for number in (1, 2)]  # behind the tower's own
# The paper's three counts, two of them also of smaller images, which save the tower's time.
CHOICES = {"4@32": 0.1, 4: 0.1, "16@48": 0.2, 16: 0.2, 36: 0.4}
TOWER_SEED, TEST_SEED = 1, 1000  # of images that no recipe draws


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="tokenflex quickstart", description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--output_dir", default="outputs/demo", help="Where everything goes. Default: %(default)s.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of weights and draws. Default: %(default)s.")
    parser.add_argument("--steps_scale", type=float, default=1.0, help="Scales every stage's steps. Default: 1.")
    parser.add_argument("--test_images", type=int, default=1000, help="Images to evaluate on. Default: %(default)s.")
    parser.add_argument("--fresh", action="store_true", help="Train again even if a former run can be used.")
    args = parser.parse_args(argv)
    quickstart(Path(args.output_dir), args.seed, args.steps_scale, args.test_images, args.fresh)


def quickstart(
    output_dir: Path, seed: int = 0, steps_scale: float = 1.0, test_images: int = 1000, fresh: bool = False
) -> Path:
    """
    Runs all stages, the evaluation and the trial; prints as it goes.

    Args:
        output_dir (`Path`): Where stages, checkpoint, table and plot go.
        seed (`int`, *optional*, defaults to 0): Seed of weights and draws.
        steps_scale (`float`, *optional*, defaults to 1.0): Scales every stage's steps.
        test_images (`int`, *optional*, defaults to 1000): How many images to evaluate on.
        fresh (`bool`, *optional*, defaults to `False`): Train again even if a former run can be used.

    Returns:
        `Path`: The checkpoint.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    start, stages = time.time(), output_dir / "stages"
    tower, settings = stages / "tower", {"seed": seed, "steps_scale": steps_scale, "choices": list(CHOICES)}
    model, processor = tiny_model_and_processor(seed)
    model.config.vision_token_choices, model.config.vision_token_weights = list(CHOICES), list(CHOICES.values())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    _say(f"A tiny TokenFLEX model: {parameters:,} parameters, {torch.get_num_threads()} CPU threads, seed {seed}.")
    _say("\nStage 1 of 3: the tower alone learns to see, from dense labels.")
    if has_ended(tower, settings) and not fresh:
        _say(f"  Done by a former run: using {tower}. To train again, say --fresh.")
    else:
        for folder in (tower, *(stages / recipe.stem for recipe in STAGES)):
            shutil.rmtree(folder, ignore_errors=True)
        train_tower(model, processor, tower, seed, steps_scale)
        end_run(tower, settings)
    _say("\nStages 2 and 3, by the small recipes: projector and language model on all patches; all at drawn choices.")
    argv = ["--model_name_or_path", str(tower / "final"), "--output_dir", str(stages), "--seed", str(seed)]
    argv += ["--num_train_epochs", str(steps_scale), "--disable_tqdm", "false", "--dataloader_pin_memory", "false"]
    final = train_stages(STAGES, argv)

    _say(f"\nEvaluation at every choice, on {test_images} images that training never saw.")
    model, processor = AutoModelForImageTextToText.from_pretrained(final), AutoProcessor.from_pretrained(final)
    report, predictions = evaluate(model, processor, SyntheticVQA(test_images, TEST_SEED))
    report["minutes"] = round((time.time() - start) / 60, 2)
    processes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)  # the largest data loader worker is the child
    report["peak_memory_gib"] = round(sum(resource.getrusage(who).ru_maxrss for who in processes) / 2**20, 2)
    report |= {"settings": settings, "dataset": ["synthetic"], "dataset_split": f"generator seed {TEST_SEED}"}
    save_report(output_dir, report, predictions, "TokenFLEX, tiny model, synthetic questions")
    checkpoint = output_dir / "checkpoint"
    save_checkpoint(checkpoint, model, processor, provenance=read_provenance(final))
    _say("\n" + markdown_table(report))
    _try_out(checkpoint, output_dir)
    _say(
        f"\n{report['minutes']} minutes of training and evaluation, {report['peak_memory_gib']} GiB of memory at most."
        f" Written to {output_dir}:"
    )
    _say("  results.md, results.json, results.png, predictions.jsonl, question.png, checkpoint/")
    return checkpoint


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def train_tower(model: nn.Module, processor, folder: Path, seed: int, steps_scale: float) -> None:
    """
    Trains a tiny model's tower alone and saves the model where a run of `train` would.

    Args:
        model ([`TokenFlexForConditionalGeneration`]): The model, changed in place.
        processor ([`TokenFlexProcessor`]): Its processor.
        folder (`Path`): The folder.
        seed (`int`): The seed of the labels' head and of the order.
        steps_scale (`float`): Scales the steps.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        labeled = PatchLabelModel(model.model.vision_tower, model.config.patch_grid)
    steps, batch_size = max(1, round(800 * steps_scale)), 32
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=3e-3,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": steps // 2, "decay_type": "linear", "min_lr_ratio": 0.02},
        warmup_steps=min(50, steps // 10),
        seed=seed,
        logging_steps=max(1, steps // 8),
        disable_tqdm=False,
        save_strategy="no",
        remove_unused_columns=False,
        dataloader_num_workers=1,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        labeled,
        args,
        data_collator=PatchLabelCollator(processor),
        train_dataset=PatchLabelDataset(steps * batch_size, TOWER_SEED),
        optimizers=(MuonAdamW(labeled, args.learning_rate), None),
    )
    trainer.train()
    made = add_stage({"base_models": [], "stages": []}, "new weights", seed=seed)
    facts = {"steps": steps, "batch_size": batch_size, "learning_rate": args.learning_rate, "seed": seed}
    made = add_stage(made, "the tower alone, from dense labels", data=["synthetic"], **facts)
    save_checkpoint(folder / "final", model, processor, provenance=made)


def _try_out(checkpoint: Path, output_dir: Path) -> None:
    """Loads the checkpoint as a user would and asks one question at the smallest and the largest count."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    scene = next(
        scene
        for scene in (draw_scene(TEST_SEED, index) for index in range(1000))
        if scene.questions[0][0] == "cell_color"
    )
    _, question, expected = scene.questions[12]
    image_file = output_dir / "question.png"
    scene.image.save(image_file)
    _say(f"Loaded {checkpoint} through AutoProcessor and AutoModelForImageTextToText.")
    _say(f"{image_file}: {question} (it is {expected})")
    for name in ("low", "high"):
        count = resolve_named_count(name, model.config.vision_token_choices)
        _say(f"  {count:>4} vision tokens: {answer(model, processor, scene.image, question, count)}")
