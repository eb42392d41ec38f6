"""`tokenflex train`: trains a TokenFLEX checkpoint, in one stage or several, and goes on where it was stopped."""

import argparse
import contextlib
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from ..checkpoints.adapters import refuse_adapters
from ..checkpoints.files import save_checkpoint
from ..checkpoints.provenance import public_names, read_provenance, untrained_tokens
from ..data.arguments import DataArguments, SourceArguments
from ..data.loading import load_rows
from .arguments import PARTS, EvaluationArguments, ModelArguments, TokenFlexTrainingArguments, find_recipe, read_recipe
from .collator import TokenFlexDataCollator
from .lora import add_adapters, lora_config, merge_adapters, nf4_config
from .resume import begin_run, check_same_model, clean_up, describe_run, end_run, find_checkpoint, has_ended
from .trainer import TokenFlexTrainer


logger = logging.get_logger(__name__)


def freeze_parts(model: nn.Module, parts: list[str]) -> None:
    """
    Turns gradients off for the named parts and on for the others, except for weights that never get a gradient.

    Args:
        model ([`TokenFlexForConditionalGeneration`]): The model.
        parts (`list[str]`): Some of `PARTS`.

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
    model.lm_head.requires_grad_("language_model" not in parts)
    if "vision_tower" not in parts:
        _freeze_idle(model.model)


def _freeze_idle(model: nn.Module) -> None:
    """
    Some towers hold weights that the features do not depend on, such as the norm of CLIP's class token or the layers
    above the feature layer. Data parallelism would wait for their gradients.
    """
    config, tower = model.config, model.vision_tower
    size = (1, config.vision_config.num_channels, *config.image_size)
    image = torch.zeros(size, device=model.device, dtype=tower.dtype)
    parameters = list(tower.parameters())
    with _gathered([*parameters, *model.multi_modal_projector.parameters()]), torch.enable_grad():
        features = model.get_image_features(image, num_vision_tokens=1).last_hidden_state
        gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients):
        parameter.requires_grad_(gradient is not None)


def _gathered(parameters: list[nn.Parameter]):
    """A context in which weights are whole that DeepSpeed's ZeRO-3 has shared out on loading."""
    if not is_deepspeed_zero3_enabled():
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    eval_args: EvaluationArguments,
    args: TokenFlexTrainingArguments,
) -> Path:
    """
    Trains and saves the model and its processor to `<output_dir>/final`. Started again, it goes on from the last
    checkpoint; if it had ended, it does nothing.

    Args:
        model_args ([`ModelArguments`]): The checkpoint and what of it is trained.
        data_args ([`DataArguments`]): The rows to train on.
        eval_args ([`EvaluationArguments`]): The rows to evaluate on while training, if any.
        args ([`TokenFlexTrainingArguments`]): How to train.

    Returns:
        `Path`: The saved checkpoint.

    Raises:
        ValueError: If arguments do not fit each other, the data or the checkpoint to go on from.
    """
    refuse_adapters(model_args.model_name_or_path)
    output_dir = Path(args.output_dir)
    final = output_dir / "final"
    described = describe_run(model_args, data_args, eval_args, args)
    resume = args.resume_from_checkpoint or "auto"
    if resume == "auto" and has_ended(output_dir, described):
        logger.warning(f"{final} is there: this run has ended. To train again, name another `output_dir`.")
        return final
    clean_up(output_dir)
    checkpoint = find_checkpoint(resume, output_dir, described)

    made = read_provenance(model_args.model_name_or_path)
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
    frozen = [part for part in model_args.freeze if part != "none"]
    if model_args.lora_rank:
        if frozen:
            raise ValueError(
                f"`freeze`={frozen} with `lora_rank`={model_args.lora_rank}: adapters freeze what they do not adapt. "
                "Leave `freeze` out, or over a recipe say `--freeze none`."
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
        freeze_parts(model, frozen)
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # every weight that is trained has a gradient in every step
    tokens = untrained_tokens(made)
    if tokens and not model.get_input_embeddings().weight.requires_grad:
        logger.warning(
            f"{' and '.join(tokens)}, which chats are written with, are new to the language model and not trained "
            "here: until they are, its answers do not end. Train it, now or in a later stage, without "
            "`lora_rank` and with no `language_model` in `freeze`."
        )
    if checkpoint is not None:
        check_same_model(checkpoint, model)

    choices = model_args.vision_token_choices
    weights = model_args.vision_token_weights
    if choices is None and weights is None:
        choices, weights = list(model.config.vision_token_choices), list(model.config.vision_token_weights)
    max_length = data_args.max_length if data_args.on_long_row == "truncate" else None
    collator = TokenFlexDataCollator.from_arguments(processor, args, choices, weights, max_length)
    rows = load_rows(data_args, processor, collator.largest_choice, args.seed, endless=True)
    eval_rows = None
    if eval_args.eval_dataset is not None:
        sources = SourceArguments([eval_args.eval_dataset], eval_args.eval_dataset_split, data_args.image_folder)
        eval_rows = load_rows(sources, processor)
    pushes, args.push_to_hub = args.push_to_hub, False  # the whole model, once, when it is done
    trainer = TokenFlexTrainer(
        model, args, collator, processing_class=processor, train_dataset=rows, eval_dataset=eval_rows
    )
    trainer.accelerator.wait_for_everyone()  # all have read what stood there
    if trainer.is_world_process_zero():
        begin_run(output_dir, described)
    trainer.train(resume_from_checkpoint=checkpoint)
    described_data = {"data": public_names(data_args.dataset), "frozen": frozen or None}
    provenance = trainer.describe_stage(made, **described_data, lora_rank=model_args.lora_rank or None)
    _save(trainer, model_args, final, provenance)
    if trainer.is_world_process_zero():
        end_run(output_dir, described)
    if pushes:
        source = {"dataset": public_names(eval_args.eval_dataset), "dataset_split": eval_args.eval_dataset_split}
        trainer.accelerator.wait_for_everyone()
        merged = None
        if model_args.lora_rank:
            merged = AutoModelForImageTextToText.from_pretrained(final, device_map=args.device)
        evaluations = trainer.evaluate_to_publish(source, merged)
        if trainer.is_world_process_zero():
            _publish(trainer, final, evaluations)
    trainer.accelerator.wait_for_everyone()
    return final


def _publish(trainer: TokenFlexTrainer, final: Path, evaluations: list[Path]) -> None:
    try:
        trainer.publish(final, evaluations)
    except (ValueError, ConnectionError) as error:
        scores = f"--evaluation {' '.join(map(str, evaluations))}" if evaluations else "--without_evaluation"
        raise type(error)(
            f"{error} The checkpoint is in {final}: `tokenflex push --model_name_or_path {final} --repo_id NAME "
            f"{scores}` publishes it."
        ) from None


def _save(trainer: TokenFlexTrainer, model_args: ModelArguments, final: Path, provenance: dict) -> None:
    """The whole model, adapters merged into it; the adapters stand beside it as well."""
    processor = trainer.processing_class
    if model_args.lora_rank:
        adapter = final.with_name("adapter")
        trainer.save_model(str(adapter))
        if trainer.is_world_process_zero():
            merged = merge_adapters(model_args.model_name_or_path, adapter)
            save_checkpoint(final, merged, processor, provenance=provenance)
    else:
        # Where weights are shared out, every process takes part in gathering them.
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        for name in trainer.model.all_tied_weights_keys:
            state.pop(name, None)
        if trainer.is_world_process_zero():
            model = trainer.accelerator.unwrap_model(trainer.model)
            save_checkpoint(final, model, processor, state_dict=state, provenance=provenance)
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
    names = [recipe.stem for recipe in recipes]
    if len(set(names)) < len(names):
        raise ValueError(f"`config` names the stages {', '.join(names)}, each of which needs a name of its own.")
    parser, stages = make_parser(), []
    for recipe in recipes:  # all of them before the first stage begins, so that a slip in the last shows at once
        start = ["--model_name_or_path", str(Path(stages[-1][-1].output_dir, "final"))] if stages else []
        arguments = [*read_recipe(recipe, parser.fields), *argv, *start]
        stages.append(parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)[:4])
        args = stages[-1][-1]
        if len(recipes) > 1:
            args.output_dir = str(Path(args.output_dir) / recipe.stem)
            if (args.resume_from_checkpoint or "auto") not in ("auto", "false"):
                raise ValueError(
                    f"`resume_from_checkpoint`={args.resume_from_checkpoint!r} with several stages: use auto or false."
                )
    for stage in stages:
        final = train(*stage)
    return final


class RecipeParser(HfArgumentParser):
    """An `HfArgumentParser` that knows its `fields` by their names, for [`read_recipe`]."""

    def __init__(self, *args, **kwargs):
        self.fields = {}
        super().__init__(*args, **kwargs)

    def add_argument(self, *args, **kwargs) -> argparse.Action:
        action = super().add_argument(*args, **kwargs)
        self.fields[action.dest] = action
        return action


def make_parser() -> RecipeParser:
    parser = RecipeParser(
        (ModelArguments, DataArguments, EvaluationArguments, TokenFlexTrainingArguments),
        prog="tokenflex train",
        description="Train a TokenFLEX checkpoint with vision-token counts drawn per step.",
        allow_abbrev=False,
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
    state = PartialState()
    state.print(f"Saved {final}")
    state.destroy_process_group()
