"""
`tokenflex quickstart` (`make demo`): the whole job in minutes on two CPU cores, from nothing to answers at two counts.

Draws its data, trains a tiny tower, then the tiny model with sampled counts, evaluates it at every count, writes table,
plot and checkpoint, loads the checkpoint through the Auto classes and asks it a question. Stages that a former run has
finished with the same settings are used again.
"""

import hashlib
import json
import os
import resource
import time
from argparse import ArgumentParser
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer

from ..checkpoints.files import save_checkpoint, write_file
from ..checkpoints.provenance import add_stage
from ..data.synthetic import SyntheticVQA, draw_scene
from ..evaluation import evaluate, save_report
from ..evaluation.report import markdown_table
from ..inference.ask import answer
from ..towers.tiny import tiny_model_and_processor
from .arguments import TokenFlexTrainingArguments
from .optimization import MuonAdamW
from .patch_labels import PatchLabelCollator, PatchLabelDataset, PatchLabelModel
from .train import freeze_parts
from .trainer import TokenFlexTrainer


@dataclass(frozen=True)
class Stage:
    """
    Args:
        name (`str`): The stage's name, and its folder's.
        summary (`str`): What it does, in a line.
        steps (`int`): Optimizer steps.
        batch_size (`int`): Images per step.
        learning_rate (`float`): The peak; held for half of the steps, then lowered linearly.
        vision_token_choices (`tuple[int, ...]`, *optional*): The counts drawn from; the model's own when not given.
        freeze (`tuple[str, ...]`, *optional*): Parts of the model that are not trained.
    """

    name: str
    summary: str
    steps: int
    batch_size: int
    learning_rate: float = 2e-3
    vision_token_choices: tuple[int, ...] | None = None
    freeze: tuple[str, ...] = ()


SEE = Stage("1-see", "the tower alone learns to see, from dense labels", steps=800, batch_size=32, learning_rate=3e-3)
# An untrained language model's gradients would unlearn what the tower sees, so the tower waits, as in the paper.
LISTEN = Stage(
    "2-listen",
    "projector and language model learn to listen, on all 64 patches",
    steps=500,
    batch_size=16,
    vision_token_choices=(64,),
    freeze=("vision_tower",),
)
FLEX = Stage(
    "3-flex",
    "the whole model, on 4, 16 or 36 vision tokens drawn per step",
    steps=2000,
    batch_size=16,
    learning_rate=1e-3,
)
STAGES = (SEE, LISTEN, FLEX)

TRAIN_SEEDS = {"1-see": 1, "2-listen": 2, "3-flex": 3}
TEST_SEED = 1000  # images that no stage draws


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
    model, processor = tiny_model_and_processor(seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    _say(f"A tiny TokenFLEX model: {parameters:,} parameters, {torch.get_num_threads()} CPU threads, seed {seed}.")
    settings = {"seed": seed, "steps_scale": steps_scale, "code": _code_digest(), "stages": []}
    minutes = 0.0
    for number, stage in enumerate(STAGES, start=1):
        settings["stages"].append(asdict(stage))
        _say(f"\nStage {number} of {len(STAGES)}: {stage.summary}.")
        model, spent = _run_stage(stage, model, processor, output_dir, settings, fresh)
        minutes += spent

    _say(f"\nEvaluation at every count, on {test_images} images that training never saw.")
    start = time.time()
    report, predictions = evaluate(model, processor, SyntheticVQA(test_images, TEST_SEED))
    report["minutes"] = round(minutes + (time.time() - start) / 60, 2)
    processes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)  # the largest data loader worker is the child
    report["peak_memory_gib"] = round(sum(resource.getrusage(who).ru_maxrss for who in processes) / 2**20, 2)
    report |= {"settings": settings, "dataset": ["synthetic"], "dataset_split": f"generator seed {TEST_SEED}"}
    save_report(output_dir, report, predictions, "TokenFLEX, tiny model, synthetic questions")
    checkpoint = output_dir / "checkpoint"
    save_checkpoint(checkpoint, model, processor, provenance=_provenance(settings))
    _say("\n" + markdown_table(report))
    _try_out(checkpoint, output_dir)
    _say(
        f"\n{report['minutes']} minutes of training and evaluation, {report['peak_memory_gib']} GiB of memory at most. Written to {output_dir}:"
    )
    _say("  results.md, results.json, results.png, predictions.jsonl, question.png, checkpoint/")
    return checkpoint


def _provenance(settings: dict) -> dict:
    made = add_stage({"base_models": [], "stages": []}, "new weights", seed=settings["seed"])
    for stage in STAGES:
        made = add_stage(
            made,
            stage.summary,
            data=["synthetic"],
            vision_token_choices=stage.vision_token_choices,
            frozen=stage.freeze or None,
            steps=_num_steps(stage, settings),
            batch_size=stage.batch_size,
            learning_rate=stage.learning_rate,
            seed=settings["seed"],
        )
    return made


def _num_steps(stage: Stage, settings: dict) -> int:
    return max(1, round(stage.steps * settings["steps_scale"]))


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def _run_stage(stage: Stage, model: nn.Module, processor, output_dir: Path, settings: dict, fresh: bool):
    """The stage's model, trained now or by a former run, and the minutes that took."""
    folder, record = output_dir / "stages" / stage.name, json.loads(json.dumps(settings))
    done = folder / "tokenflex_stage.json"
    former = json.loads(done.read_text()) if done.is_file() and not fresh else {}
    if former.get("settings") == record:
        _say(f"  Done by a former run: using {folder}.")
        return AutoModelForImageTextToText.from_pretrained(folder), former["minutes"]
    start = time.time()
    args = _arguments(stage, output_dir, settings)
    if stage is SEE:
        with torch.random.fork_rng():
            torch.manual_seed(settings["seed"])
            labelled = PatchLabelModel(model.model.vision_tower, model.config.patch_grid)
        dataset = PatchLabelDataset(args.max_steps * stage.batch_size, TRAIN_SEEDS[stage.name])
        optimizer = MuonAdamW(labelled, args.learning_rate)
        trainer = Trainer(
            labelled,
            args,
            data_collator=PatchLabelCollator(processor),
            train_dataset=dataset,
            optimizers=(optimizer, None),
        )
    else:
        choices = list(stage.vision_token_choices) if stage.vision_token_choices else None
        weights = [1.0] * len(choices) if choices else None
        freeze_parts(model, list(stage.freeze))
        dataset = SyntheticVQA(args.max_steps * stage.batch_size, TRAIN_SEEDS[stage.name])
        trainer = TokenFlexTrainer(
            model,
            args,
            processing_class=processor,
            vision_token_choices=choices,
            vision_token_weights=weights,
            train_dataset=dataset,
        )
    trainer.train()
    save_checkpoint(folder, model, processor)
    minutes = (time.time() - start) / 60
    write_file(done, json.dumps({"settings": record, "minutes": minutes}))
    return model, minutes


def _code_digest() -> str:
    """Stages trained by other code are not used again."""
    root = Path(__file__).parents[1]
    rooms = ("data", "towers", "training")
    files = sorted([*root.glob("*_tokenflex.py"), *(file for room in rooms for file in (root / room).glob("*.py"))])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _arguments(stage: Stage, output_dir: Path, settings: dict) -> TokenFlexTrainingArguments:
    steps = _num_steps(stage, settings)
    return TokenFlexTrainingArguments(
        output_dir=str(output_dir / "stages" / f"{stage.name}-trainer"),
        max_steps=steps,
        per_device_train_batch_size=stage.batch_size,
        learning_rate=stage.learning_rate,
        weight_decay=0.01,
        muon=True,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": steps // 2, "decay_type": "linear", "min_lr_ratio": 0.02},
        warmup_steps=min(50, steps // 10),
        seed=settings["seed"],
        logging_steps=max(1, steps // 8),
        disable_tqdm=False,
        save_strategy="no",
        report_to="none",
        dataloader_num_workers=1,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


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
    for count in (min(model.config.vision_token_choices), max(model.config.vision_token_choices)):
        _say(f"  {count:>2} vision tokens: {answer(model, processor, scene.image, question, count)}")
