"""One run of the experiment: train a model from its seed's base, test it at every count, keep what it got right."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PrinterCallback, Trainer

from ..checkpoints.files import write_module
from ..data.synthetic import SyntheticVQA
from ..evaluation.metrics import get_metric
from ..evaluation.sweep import predict
from ..towers.tiny import tiny_model_and_processor
from ..training.arguments import TokenFlexTrainingArguments
from ..training.optimization import MuonAdamW
from ..training.patch_labels import PatchLabelCollator, PatchLabelDataset, PatchLabelModel
from ..training.train import freeze_parts
from ..training.trainer import TokenFlexTrainer
from .arms import NUM_PATCHES, Arm
from .baselines import shrink_image, use_gelu


# Of the generator; the run's seed is added to the first three. Nothing else of the project draws from any of them.
TOWER_SEED, BASE_SEED, TRAIN_SEED, TEST_SEED, CLAIM_TEST_SEED = 21_000, 22_000, 23_000, 29_000, 29_100


@dataclass(frozen=True)
class Size:
    """
    Size of the experiment.

    Args:
        width (`int`): The hidden size of both towers.
        tower_steps (`int`): Steps of twice `batch_size` images in which the tower learns to see, from dense labels.
        base_steps (`int`):
            Steps in which projector and language model learn to listen, to all patches of fresh images.
        steps (`int`): Steps of every run after that.
        num_images (`int`): Images of the data-limited runs.
        batch_size (`int`, *optional*, defaults to 16): Images per step.
        questions (`int`, *optional*, defaults to 4): Questions per image of the runs; the base has six.
        test_images (`int`, *optional*, defaults to 1000): Images to test on, with six questions each.
        test_seed (`int`, *optional*, defaults to 29000): The generator's seed of these images.
    """

    width: int
    tower_steps: int
    base_steps: int
    steps: int
    num_images: int
    batch_size: int = 16
    questions: int = 4
    test_images: int = 1000
    test_seed: int = TEST_SEED


@dataclass(frozen=True)
class Run:
    """
    Args:
        arm (`Arm`): Arm to train.
        seed (`int`): The seed of weights, data and draws.
        steps (`int`): Optimizer steps.
        num_images (`int`, *optional*): Images that training goes over again and again; fresh ones if not given.
    """

    arm: Arm
    seed: int
    steps: int
    num_images: int | None = None

    @property
    def name(self) -> str:
        return f"{self.arm.name}-{self.num_images or 'fresh'}-{self.steps}-{self.seed}"


def base_file(folder: Path, arm: Arm, seed: int) -> Path:
    """Folder of the weights that an arm starts from."""
    return folder / f"base-{arm.projector}-{seed}.pt"


def train_base(arm: Arm, seed: int, size: Size, folder: Path) -> float:
    """
    Trains what all runs of a seed start from: a tower that sees, and a language model that listens to all patches. The
    tower is the same whatever the projector. Returns the CPU seconds it took.
    """
    start = time.process_time()
    model, processor = _new_model(arm, seed, size)
    tower = folder / f"tower-{seed}.pt"
    if not tower.is_file():
        _train_tower(model, processor, seed, size, folder)
        write_module(tower, model.model.vision_tower)
    model.model.vision_tower.load_state_dict(torch.load(tower, weights_only=True))
    freeze_parts(model, ["vision_tower"])
    trainer = TokenFlexTrainer(
        model,
        _arguments(folder, size.base_steps, seed, size.batch_size, learning_rate=2e-3, muon=True),
        processing_class=processor,
        vision_token_choices=[NUM_PATCHES],
        vision_token_weights=[1.0],
        train_dataset=SyntheticVQA(size.base_steps * size.batch_size, BASE_SEED + seed),
    )
    _train(trainer)
    write_module(base_file(folder, arm, seed), model)
    return time.process_time() - start


def train_and_test(run: Run, steps: int, size: Size, folder: Path) -> dict:
    """
    Trains one model from its base and tests it.

    Args:
        run (`Run`): Run to train.
        steps (`int`): The steps to take: the run's, or as many as have the compute of the run's.
        size (`Size`): Size of the experiment.
        folder (`Path`): Folder of the base.

    Returns:
        `dict`: `right`, for each count a 1 or 0 for every question; the questions' `families` and `images`; `losses`
        and `cpu_seconds`.
    """
    start, arm = time.process_time(), run.arm
    model, processor = _new_model(arm, run.seed, size)
    model.load_state_dict(torch.load(base_file(folder, arm, run.seed), weights_only=True))
    if arm.downsampled:
        model, processor = shrink_image(model, processor, arm.choices[0])
    else:
        freeze_parts(model, ["vision_tower"])
    rows = SyntheticVQA(run.num_images or steps * size.batch_size, TRAIN_SEED + run.seed, size.questions)
    trainer = TokenFlexTrainer(
        model,
        _arguments(folder, steps, run.seed, size.batch_size, learning_rate=2e-3, scheme=arm.scheme, muon=True),
        processing_class=processor,
        vision_token_choices=list(arm.choices),
        vision_token_weights=list(arm.weights),
        train_dataset=list(rows) if run.num_images else rows,
    )
    _train(trainer)
    test = SyntheticVQA(size.test_images, size.test_seed)
    predictions = predict(model, processor, test, arm.counts, batch_size=128, show_progress=False)
    rate = get_metric("exact_match")
    return {
        "arm": arm.name,
        "num_images": run.num_images,
        "compared_at": run.steps,
        "steps": steps,
        "seed": run.seed,
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "right": {str(n): [int(p.rate(rate, n)) for p in predictions] for n in arm.counts},
        "families": [p.family for p in predictions],
        "images": [p.index for p in predictions],
        "cpu_seconds": time.process_time() - start,
    }


def _new_model(arm: Arm, seed: int, size: Size):
    model, processor = tiny_model_and_processor(seed, size.width)
    if arm.projector == "gelu":
        use_gelu(model, seed)
    return model, processor


def _train_tower(model: nn.Module, processor, seed: int, size: Size, folder: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        labeled = PatchLabelModel(model.model.vision_tower, model.config.patch_grid)
    args = _arguments(folder, size.tower_steps, seed, 2 * size.batch_size, learning_rate=3e-3)
    trainer = Trainer(
        labeled,
        args,
        data_collator=PatchLabelCollator(processor),
        train_dataset=PatchLabelDataset(size.tower_steps * 2 * size.batch_size, TOWER_SEED + seed),
        optimizers=(MuonAdamW(labeled, args.learning_rate, args.weight_decay), None),
    )
    _train(trainer)


def _train(trainer: Trainer) -> None:
    trainer.remove_callback(PrinterCallback)  # several runs at a time would talk over each other
    trainer.train()


def _arguments(folder: Path, steps: int, seed: int, batch_size: int, **options) -> TokenFlexTrainingArguments:
    return TokenFlexTrainingArguments(
        output_dir=str(folder),  # nothing is saved on the way
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        weight_decay=0.01,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": steps // 2, "decay_type": "linear", "min_lr_ratio": 0.02},
        warmup_steps=min(50, steps // 10),
        seed=seed,
        logging_steps=max(1, steps // 8),
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        **options,
    )
