"""`tokenflex train`: trains a TokenFLEX checkpoint, in one stage or several, and goes on where it was stopped."""

import argparse
import json
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, HfArgumentParser
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..files import save_checkpoint, write_file
from .arguments import PARTS, EvaluationArguments, ModelArguments, TokenFlexTrainingArguments, find_recipe, read_recipe
from .collator import TokenFlexDataCollator
from .datasets import DataArguments, load_rows
from .lora import add_adapters, lora_config, merge_adapters, nf4_config
from .trainer import INCOMPLETE, TokenFlexTrainer


logger = logging.get_logger(__name__)


def freeze_parts(model: nn.Module, parts: list[str]) -> None:
    """
    Turns gradients off for the named parts and on for the others, except for weights that never get a gradient.

    Args:
        model ([`TokenFlexForConditionalGeneration`]): The model.
        parts (`list[str]`): Some of `PARTS`; `["none"]` is none.

    Raises:
        ValueError: If a part is not one of `PARTS`, or nothing would be left to train.
    """
    parts = [] if parts == ["none"] else parts
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"`freeze` names {part!r}: the parts are {', '.join(PARTS)}.")
    if set(parts) == set(PARTS):
        raise ValueError(f"`freeze`={parts} leaves nothing to train.")
    for part in PARTS:
        getattr(model.model, part).requires_grad_(part not in parts)
    model.lm_head.requires_grad_("language_model" not in parts)
    if "vision_tower" not in parts:
        _freeze_idle(model.model)


def _freeze_idle(model: nn.Module) -> None:
    """
    Some towers hold weights that the features do not depend on, such as the norm of CLIP's class token or the layers
    above the feature layer. Data parallelism would wait for their gradients.
    """
    tower = model.vision_tower
    vision_config = model.config.vision_config
    size = vision_config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    image = torch.zeros(1, vision_config.num_channels, height, width, device=model.device, dtype=tower.dtype)
    with torch.enable_grad():
        features = model.get_image_features(image, num_vision_tokens=1).last_hidden_state
        parameters = list(tower.parameters())
        gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients):
        parameter.requires_grad_(gradient is not None)


def find_checkpoint(resume: str | None, output_dir: str | Path) -> str | None:
    """
    The checkpoint that training goes on from.

    Args:
        resume (`str`, *optional*): As [`TokenFlexTrainingArguments.resume_from_checkpoint`].
        output_dir (`str` or `Path`): The run's folder.

    Raises:
        ValueError: If a checkpoint is asked for that is not there.
    """
    wanted = (resume or "false").lower()
    if wanted == "false":
        return None
    if wanted in ("auto", "true"):
        last = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
        if last is None and wanted == "true":
            raise ValueError(f"`resume_from_checkpoint`=true: {output_dir} holds no checkpoint. Use auto or false.")
        return last
    if not (Path(resume) / "trainer_state.json").is_file():
        raise ValueError(f"`resume_from_checkpoint`={resume!r} is no checkpoint of a training run.")
    return resume


def check_same_model(checkpoint: str | Path, model: nn.Module) -> None:
    """
    Refuses to go on from a checkpoint of another model.

    Raises:
        ValueError: If the checkpoint's towers, or its adapters, are not those of `model`.
    """
    saved = Path(checkpoint)
    has_adapter, is_adapted = (saved / "adapter_config.json").is_file(), hasattr(model, "peft_config")
    if has_adapter != is_adapted:
        kinds = ["a whole model", "adapters"]
        raise ValueError(
            f"The checkpoint {checkpoint} holds {kinds[has_adapter]}, but {kinds[is_adapted]} are to be trained: name "
            "another `output_dir`, or set `resume_from_checkpoint` to false."
        )
    if has_adapter:
        rank = json.loads((saved / "adapter_config.json").read_text())["r"]
        own = next(iter(model.peft_config.values())).r
        differing = [] if rank == own else [f"lora_rank ({rank}, not {own})"]
    elif (saved / "config.json").is_file():
        other = AutoConfig.from_pretrained(saved)
        differing = [
            f"{part}.{name} ({value}, not {own})"
            for part in ("vision_config", "text_config")
            for name, value in getattr(other, part).to_diff_dict().items()
            if value != (own := getattr(getattr(model.config, part), name, None))
            and name not in ("transformers_version", "_name_or_path", "dtype", "use_cache")
        ]
    else:
        return
    if differing:
        raise ValueError(
            f"The checkpoint {checkpoint} is of another model, which differs in {', '.join(differing)}: name another "
            "`output_dir`, or set `resume_from_checkpoint` to false."
        )


def _decisive(arguments: dict) -> dict:
    """Of a run's arguments, those on which its weights depend; where it runs and what it reports are none."""
    ignored = (
        "output_dir", "resume_from_checkpoint", "logging", "log_", "report_to", "run_name", "disable_tqdm", "dataloader",
        "save_", "eval", "hub", "push", "project", "trackio", "local_rank", "ddp", "deepspeed", "fsdp", "debug", "do_",
        "use_cpu", "torch_compile", "full_determinism", "accelerator",
    )  # fmt: skip
    kept = {name: value for name, value in arguments.items() if not name.startswith(ignored)}
    return json.loads(json.dumps(kept, default=str))


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    eval_args: EvaluationArguments,
    args: TokenFlexTrainingArguments,
) -> Path:
    """
    Trains and saves the model and its processor to `<output_dir>/final`. Started again, it goes on from the last
    checkpoint; if it had ended, it does nothing.

    Returns:
        `Path`: The saved checkpoint.

    Raises:
        ValueError: If arguments do not fit each other, the data or the checkpoint to go on from.
    """
    output_dir = Path(args.output_dir)
    final, record = output_dir / "final", output_dir / "arguments.json"
    own = {**vars(model_args), **vars(data_args), **args.to_sanitized_dict()}
    own = _decisive(own)
    checkpoint = find_checkpoint(args.resume_from_checkpoint, output_dir)
    before = json.loads(record.read_text()) if record.is_file() else None
    if args.resume_from_checkpoint == "auto" and before == own and (final / "config.json").is_file():
        logger.warning(f"{final} is there: this run has ended. `--resume_from_checkpoint false` trains anew.")
        return final

    processor = AutoProcessor.from_pretrained(model_args.model_name_or_path)
    options = {name: getattr(model_args, name) for name in ("dtype", "attn_implementation")}
    options = {name: value for name, value in options.items() if value is not None}
    if model_args.load_in_4bit:
        if not model_args.lora_rank:
            raise ValueError(
                "`load_in_4bit`=True: weights in 4 bits cannot be trained. Give a `lora_rank`, such as 16."
            )
        options["quantization_config"] = nf4_config()
    model = AutoModelForImageTextToText.from_pretrained(model_args.model_name_or_path, **options)
    if model_args.lora_rank:
        if model_args.freeze:
            raise ValueError(
                f"`freeze`={model_args.freeze} with `lora_rank`={model_args.lora_rank}: adapters freeze what they do not "
                "adapt. Leave `freeze` out."
            )
        config = lora_config(
            model,
            model_args.lora_rank,
            model_args.lora_alpha,
            model_args.lora_dropout,
            vision_tower=model_args.lora_vision_tower,
        )
        model = add_adapters(model, config)
    else:
        freeze_parts(model, model_args.freeze)
    if checkpoint is not None:
        check_same_model(checkpoint, model)
        changed = [name for name in own if before is not None and before.get(name) != own[name]]
        if changed:
            logger.warning(f"Going on from {checkpoint} with other values of {', '.join(changed)}.")

    choices = model_args.vision_token_choices
    weights = model_args.vision_token_weights
    if (choices is None) == (weights is None) and choices is None:
        choices, weights = list(model.config.vision_token_choices), list(model.config.vision_token_weights)
    collator = TokenFlexDataCollator(
        processor,
        choices,
        weights,
        seed=args.seed,
        scheme=args.scheme,
        packing=args.packing,
        max_length=data_args.max_length if data_args.on_long_row == "truncate" else None,
        distillation_weight=args.distillation_weight,
        distillation_temperature=args.distillation_temperature,
    )
    special_tokens = processor.tokenizer.all_special_tokens
    rows = load_rows(**vars(data_args), special_tokens=special_tokens, seed=args.seed, measure=collator.measure)
    eval_rows = None
    if eval_args.eval_dataset is not None:
        eval_rows = load_rows(
            eval_args.eval_dataset, eval_args.eval_dataset_split, data_args.image_folder, special_tokens=special_tokens
        )
    trainer = TokenFlexTrainer(
        model, args, collator, processing_class=processor, train_dataset=rows, eval_dataset=eval_rows
    )
    if trainer.is_world_process_zero():
        shutil.rmtree(output_dir / INCOMPLETE, ignore_errors=True)
        write_file(record, json.dumps(own, indent=2) + "\n")
    trainer.train(resume_from_checkpoint=checkpoint)
    _save(trainer, model_args, final)
    return final


def _save(trainer: TokenFlexTrainer, model_args: ModelArguments, final: Path) -> None:
    """The whole model, adapters merged into it; the adapters stand beside it as well."""
    processor = trainer.processing_class
    if model_args.lora_rank:
        adapter = final.with_name("adapter")
        trainer.save_model(str(adapter))
        if trainer.is_world_process_zero():
            save_checkpoint(final, merge_adapters(model_args.model_name_or_path, adapter), processor)
    else:
        state = trainer.accelerator.get_state_dict(
            trainer.model_wrapped
        )  # a collective call where weights are shared out
        if trainer.is_world_process_zero():
            save_checkpoint(final, trainer.accelerator.unwrap_model(trainer.model), processor, state_dict=state)
    trainer.accelerator.wait_for_everyone()


def train_stages(recipes: list[Path], argv: list[str]) -> Path:
    """
    Trains by one recipe after the other, each stage from the checkpoint of the one before, in a folder of its own.

    Args:
        recipes (`list[Path]`): YAML files of arguments.
        argv (`list[str]`): Arguments that go before the recipes'.

    Returns:
        `Path`: The last stage's checkpoint.
    """
    final = None
    parser = make_parser()
    fields = [action.dest for action in parser._actions if action.dest not in ("help", "config")]
    stages = [read_recipe(recipe, fields) + argv for recipe in recipes]  # so that a slip in the last shows at once
    for recipe, stage in zip(recipes, stages):
        if final is not None:
            stage = [*stage, "--model_name_or_path", str(final)]
        *others, args = parser.parse_args_into_dataclasses(stage, look_for_args_file=False)[:4]
        if len(recipes) > 1:
            args.output_dir = str(Path(args.output_dir) / recipe.stem)
        final = train(*others, args)
    return final


def make_parser() -> HfArgumentParser:
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, EvaluationArguments, TokenFlexTrainingArguments),
        prog="tokenflex train",
        description="Train a TokenFLEX checkpoint with vision-token counts drawn per step.",
    )
    parser.add_argument(
        "--config",
        nargs="+",
        metavar="RECIPE",
        help="YAML files of the fields below; what stands on the command line goes before them. Several are stages, "
        "trained one after the other, each from the checkpoint of the one before.",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config", nargs="+")
    config, rest = before.parse_known_args(argv)
    if config.config:
        final = train_stages([find_recipe(name) for name in config.config], rest)
    else:
        final = train(*make_parser().parse_args_into_dataclasses(rest, look_for_args_file=False)[:4])
    print(f"Saved {final}")  # noqa: T201
