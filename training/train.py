"""`tokenflex train`: trains a TokenFLEX checkpoint on a data set through `transformers.Trainer`."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser, Trainer, TrainingArguments

from ..files import save_checkpoint
from .collator import TokenFlexDataCollator
from .datasets import DataArguments, load_rows
from .optimization import MuonAdamW


PARTS = ("vision_tower", "multi_modal_projector", "language_model")


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Checkpoint folder or Hub id of a TokenFLEX model."})
    freeze: list[str] = field(
        default_factory=list,
        metadata={"help": f"Parts of the model that are not trained, of {', '.join(PARTS)}. Default: none."},
    )
    vision_token_choices: list[int] | None = field(
        default=None, metadata={"help": "Vision-token counts to draw from. Default: the model config's."}
    )
    vision_token_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per choice. Default: the model config's."}
    )


@dataclass
class TokenFlexTrainingArguments(TrainingArguments):
    muon: bool = field(
        default=False,
        metadata={
            "help": "Use Muon on hidden matrices and AdamW on the rest, with one learning rate. Helps models that are "
            "trained from scratch."
        },
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Whether to drop columns before collating; the collator needs them."}
    )


def build_trainer(
    model: nn.Module,
    processor,
    args: TokenFlexTrainingArguments,
    train_dataset,
    vision_token_choices: list[int] | None = None,
    vision_token_weights: list[float] | None = None,
) -> Trainer:
    """
    A plain `Trainer` with this project's collator, its callback and, if asked for, Muon.

    Args:
        model ([`TokenFlexForConditionalGeneration`]): The model.
        processor ([`TokenFlexProcessor`]): Its processor.
        args ([`TokenFlexTrainingArguments`]): The Trainer's arguments.
        train_dataset: Rows as [`to_example`] takes them.
        vision_token_choices (`list[int]`, *optional*): The counts to draw from. Defaults to the model config's.
        vision_token_weights (`list[float]`, *optional*): One weight per choice.
    """
    collator = TokenFlexDataCollator(processor, vision_token_choices, vision_token_weights, seed=args.seed)
    optimizer = MuonAdamW(model, lr=args.learning_rate, weight_decay=args.weight_decay) if args.muon else None
    return Trainer(
        model,
        args,
        data_collator=collator,
        train_dataset=train_dataset,
        processing_class=processor,
        callbacks=[collator.callback],
        optimizers=(optimizer, None),
    )


def freeze_parts(model: nn.Module, parts: list[str]) -> None:
    """
    Turns gradients off for the named parts and on for the others.

    Raises:
        ValueError: If a part is not one of `PARTS`, or nothing would be left to train.
    """
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"`freeze` names {part!r}: the parts are {', '.join(PARTS)}.")
    if set(parts) == set(PARTS):
        raise ValueError(f"`freeze`={parts} leaves nothing to train.")
    for part in PARTS:
        getattr(model.model, part).requires_grad_(part not in parts)
    if "language_model" in parts:
        model.lm_head.requires_grad_(False)


def train(model_args: ModelArguments, data_args: DataArguments, args: TokenFlexTrainingArguments) -> Path:
    """
    Trains and saves the model and its processor to `<output_dir>/final`.

    Returns:
        `Path`: The saved checkpoint.
    """
    processor = AutoProcessor.from_pretrained(model_args.model_name_or_path)
    rows = load_rows(**vars(data_args), special_tokens=processor.tokenizer.all_special_tokens)
    model = AutoModelForImageTextToText.from_pretrained(model_args.model_name_or_path)
    freeze_parts(model, model_args.freeze)
    trainer = build_trainer(
        model, processor, args, rows, model_args.vision_token_choices, model_args.vision_token_weights
    )
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=resume.lower() == "true" or resume if resume else None)
    final = Path(args.output_dir) / "final"
    if trainer.is_world_process_zero():
        save_checkpoint(final, trainer.accelerator.unwrap_model(trainer.model), processor)
    return final


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, TokenFlexTrainingArguments),
        prog="tokenflex train",
        description="Train a TokenFLEX checkpoint with vision-token counts drawn per step.",
    )
    final = train(*parser.parse_args_into_dataclasses(argv))
    print(f"Saved {final}")  # noqa: T201
