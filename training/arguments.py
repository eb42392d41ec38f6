"""The arguments of `tokenflex train`, on the command line or in a recipe."""

import argparse
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import TrainingArguments

from ..choices_tokenflex import parse_choice
from .schemes import SCHEMES


RECIPES = Path(__file__).parent / "recipes"
PARTS = ("vision_tower", "multi_modal_projector", "language_model")


@dataclass
class ModelArguments:
    """Which checkpoint to train, and what of it."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint folder or Hub id of a TokenFLEX model."})
    freeze: list[str] = field(
        default_factory=list,
        metadata={"help": f"Parts of the model that are not trained, of {', '.join(PARTS)}; `none` is none of them."},
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "What weights are loaded in: `float32`, `bfloat16` or `float16`. Default: as saved. With `--bf16` "
            "load `float32`: mixed precision then keeps full weights."
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "`sdpa`, `eager`, `flex_attention` or a flash attention that is installed. Default: transformers'."
        },
    )
    vision_token_choices: list[str] | None = field(
        default=None,
        metadata={
            "help": "Vision-token counts to draw from, in tokens per image, such as 64, or 64@224 for images that the "
            "vision tower sees at 224 pixels. Default: the model config's."
        },
    )
    vision_token_weights: list[float] | None = field(
        default=None,
        metadata={"help": "One weight per choice, in any unit: they are normalized. Default: the model config's."},
    )
    lora_rank: int = field(
        default=0,
        metadata={
            "help": "Train adapters of this rank on the language model, and the projector in full, in place of the "
            "whole model. 0: no adapters."
        },
    )
    lora_alpha: float = field(default=32, metadata={"help": "Adapters are scaled by lora_alpha / lora_rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters, as a probability."})
    lora_vision_tower: bool = field(default=False, metadata={"help": "Put adapters on the vision tower as well."})
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "QLoRA: keep the language model in 4 bits under the adapters. Needs bitsandbytes."},
    )

    def __post_init__(self):
        if self.vision_token_choices is not None:
            self.vision_token_choices = [parse_choice(choice) for choice in self.vision_token_choices]


@dataclass
class EvaluationArguments:
    """The rows to evaluate on while training."""

    eval_dataset: str | None = field(
        default=None, metadata={"help": "What to evaluate on while training, named as for `--dataset`."}
    )
    eval_dataset_split: str = field(default="test", metadata={"help": "Its split, for a Hub id or a folder."})


@dataclass
class TokenFlexTrainingArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`], and what is told to [`TokenFlexTrainer`] beside them."""

    scheme: str = field(
        default="batch",
        metadata={
            "help": "What a step trains at. " + "; ".join(f"`{name}`: {text}" for name, text in SCHEMES.items()) + ".",
            "choices": list(SCHEMES),
        },
    )
    distillation_weight: float = field(
        default=1.0, metadata={"help": "With `--scheme distill`, the weight of the divergence beside the loss."}
    )
    distillation_temperature: float = field(
        default=1.0, metadata={"help": "With `--scheme distill`, what logits are divided by before they are compared."}
    )
    distillation_from_base: bool = field(
        default=False,
        metadata={
            "help": "With `--scheme distill` and adapters, every count follows the model as it was before them at the "
            "largest count, so that what it knows there is kept. Default: the smaller follow the largest as it is."
        },
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Put the samples of a micro-batch behind each other into as few rows as they fit."},
    )
    cache_features: str | None = field(
        default=None,
        metadata={
            "help": "Folder to keep the features of a frozen vision tower in, so that it sees each image once, "
            "whatever the number of epochs and runs. An image takes num_patches * width * bytes of its dtype for each "
            "resolution."
        },
    )
    vision_tower_learning_rate: float | None = field(
        default=None, metadata={"help": "The vision tower's peak learning rate. Default: `learning_rate`."}
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "The projector's peak learning rate. Default: `learning_rate`."}
    )
    muon: bool = field(
        default=False,
        metadata={
            "help": "Use Muon on hidden matrices and AdamW with betas of 0.9 and 0.98 on the rest, in place of "
            "`optim`, with one learning rate. Helps models that are trained from scratch."
        },
    )
    eval_max_new_tokens: int = field(
        default=16, metadata={"help": "The longest answer when evaluating while training, in tokens."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "What `tokenflex train` goes on from: `auto`, its default, is the last checkpoint in "
            "`output_dir`, if there is one; `true` demands one; `false` starts anew; else the checkpoint's folder."
        },
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Whether to drop columns before collating; the collator needs them."}
    )

    def __post_init__(self):
        watches = self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
        compares = watches or self.load_best_model_at_end or self.save_strategy == "best"
        if compares and self.metric_for_best_model is None:
            self.metric_for_best_model = "accuracy"
        super().__post_init__()
        if watches:  # torch's default is to take less for better
            mode = "max" if self.greater_is_better else "min"
            self.lr_scheduler_kwargs = {"mode": mode, **(self.lr_scheduler_kwargs or {})}
        own_rates = self.vision_tower_learning_rate is not None or self.projector_learning_rate is not None
        if self.muon and own_rates:
            raise ValueError("`muon`=True has one learning rate: leave the parts' own learning rates out, or Muon.")


def read_recipe(path: str | Path, fields: Mapping[str, argparse.Action]) -> list[str]:
    """
    Reads a YAML file of field names and values as command-line arguments.

    Args:
        path (`str` or `Path`): The file.
        fields (`Mapping[str, argparse.Action]`): A parser's arguments by their names.

    Returns:
        `list[str]`: The arguments, to be put before those of the command line, which then have the last word.

    Raises:
        ValueError: If the file is missing or no YAML mapping, names a field that does not exist, or lists values for a
            field that takes one.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`config`={str(path)!r}: there is no such file. {_shipped_recipes()}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} has to hold `field: value` lines, but holds {type(values).__name__}.")
    arguments = []
    for name, value in values.items():
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"Did you mean `{near[0]}`?" if near else "`tokenflex train --help` lists the fields."
            raise ValueError(f"{path}: there is no field `{name}`. {hint}")
        if value is None or value == []:
            continue
        if value is False and "no" in (fields[name].choices or ()):
            value = "no"  # which YAML takes for false
        if isinstance(value, list) and fields[name].nargs == "+":
            arguments += [f"--{name}", *map(str, value)]
        elif isinstance(value, list):
            raise ValueError(f"{path}: `{name}` takes one value, not {value}.")
        else:
            arguments.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return arguments


def find_recipe(name: str | Path) -> Path:
    """
    A recipe's file: the path itself, or, where there is none, that of a recipe that the package ships.

    Args:
        name (`str` or `Path`): A path, or a shipped recipe such as `full/stage1.yaml`.
    """
    shipped = RECIPES / name
    return shipped if shipped.is_file() and not Path(name).exists() else Path(name)


def _shipped_recipes() -> str:
    names = sorted(path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.yaml"))
    return f"The package ships {', '.join(names)}."
